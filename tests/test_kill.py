"""SIGKILL at any moment, also in the middle of a save, and continue: the weights are those of the unbroken run.

benchmarks/kill_resume.py does the same to the real stages, 30 times each.
"""

import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from toy import same_weights, toy_model, toy_train

from training.losses import next_token_loss

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--save_interval", "3", "--resume", "auto", "--log_interval", "100"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_forward(count: int):
    """A loss that kills its process in the forward pass of a micro-batch."""
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == count:
            die()
        return next_token_loss(model, batch)

    return loss_fn


def dies_in(name: str, count: int, after: bool):
    """Replace os.<name> by one that kills the process at its count-th call, before or after it has done its work."""
    original, calls = getattr(os, name), 0

    def deadly(*args):
        nonlocal calls
        if calls + 1 == count and not after:
            die()
        result = original(*args)  # unlink may raise: it did no work
        calls += 1
        if calls == count:
            die()
        return result

    return patch(f"os.{name}", deadly)


def dies_while_writing(size: int):
    """Kill the process when torch.save has written this many bytes."""
    original = torch.save

    def deadly(value, file):
        class Counting:
            def __init__(self):
                self.written = 0

            def write(self, data):
                self.written += len(data)
                file.write(data)
                if self.written > size:
                    file.flush()
                    die()
                return len(data)

            def flush(self):
                file.flush()

        original(value, Counting())

    return patch("torch.save", deadly)


def in_a_fork(work) -> int:
    """The wait status of a copy of this process that does ``work``."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of OpenMP's pool are not copied: waiting for them never ends
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


MOMENTS = {
    "forward 1": lambda: (dies_in_forward(1), None),
    "forward 5": lambda: (dies_in_forward(5), None),
    "forward 8": lambda: (dies_in_forward(8), None),
    "before the rename of the weights": lambda: (next_token_loss, dies_in("replace", 1, after=False)),
    "between weights and record": lambda: (next_token_loss, dies_in("replace", 1, after=True)),
    "before the rename of the record": lambda: (next_token_loss, dies_in("replace", 2, after=False)),
    "before the rename of a later record": lambda: (next_token_loss, dies_in("replace", 5, after=False)),
    "between record and state": lambda: (next_token_loss, dies_in("replace", 2, after=True)),
    "before the rename of the state": lambda: (next_token_loss, dies_in("replace", 3, after=False)),
    "after the rename of the state": lambda: (next_token_loss, dies_in("replace", 3, after=True)),
    "in the flush of a state": lambda: (next_token_loss, dies_in("fsync", 5, after=False)),
    "when an old state is deleted": lambda: (next_token_loss, dies_in("unlink", 1, after=True)),
    "in the middle of the weights": lambda: (next_token_loss, dies_while_writing(5_000)),
    "in the middle of a state": lambda: (next_token_loss, dies_while_writing(40_000)),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict:
    return toy_train(tmp_path_factory.mktemp("straight"), "--save_interval", "3", "--log_interval", "100").state_dict()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_continued_is_the_unbroken_run(moment, straight, tmp_path):
    def work():
        loss_fn, patched = MOMENTS[moment]()
        if patched:
            patched.start()
        toy_train(tmp_path, *FLAGS, loss_fn=loss_fn, model=toy_model(dropout=0.1))

    killed = sum(in_a_fork(work) == signal.SIGKILL for _ in range(3))
    assert killed == 3
    model = toy_train(tmp_path, *FLAGS)
    assert same_weights(model.state_dict(), straight)
    assert same_weights(torch.load(tmp_path / "toy_16.pth", weights_only=True), straight)
    assert not list(tmp_path.rglob("*.tmp")), "what killed writers left behind is removed"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["train_pretrain.py", "train_full_sft.py", "train_lora.py", "train_dpo.py"])
def test_stages_killed_at_random_moments(script, processes, tmp_path):
    with pytest.MonkeyPatch.context() as patches:
        patches.syspath_prepend(str(ROOT / "benchmarks"))
        patches.setattr(sys, "argv", ["kill_resume.py"])
        import kill_resume

        assert kill_resume.all_same([script], [processes], kills=3, max_steps=60, save_interval=5, work=tmp_path)
