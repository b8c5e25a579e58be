"""Freed memory is given back when it grows."""

import pytest

from training import kept_memory
from training.kept_memory import KeptMemory


def test_freed_memory_is_given_back_when_it_grows(monkeypatch):
    given_back, held = [], iter([100, 119, 121, 90, 121, 130, 129])
    monkeypatch.setattr(kept_memory, "heap_memory", lambda: next(held))
    monkeypatch.setattr(kept_memory, "give_back_free_memory", lambda: given_back.append(True))
    kept, counts = KeptMemory(100), []
    for _ in range(7):
        kept.end_step()
        counts.append(len(given_back))
    # 130 straight after memory was given back: a step needs as much, so that 129 is no growth.
    assert counts == [0, 0, 1, 1, 2, 3, 3] and kept.limit == 130


def test_a_gpu_run_leaves_the_heap_alone(monkeypatch):
    monkeypatch.setattr(kept_memory, "give_back_free_memory", lambda: pytest.fail("nothing to give back"))
    KeptMemory(0).end_step()
