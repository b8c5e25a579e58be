"""Where a run's micro-batches come from: here, from a plan of the data for every epoch.

A source owns its place. All that a loop and the saver need of one is

    for micro_batches in source:    an iterator over this process' micro-batches of the next optimizer step
    source.state()                  its place, as a small dict of plain values and tensors; all ranks call it
    source.load_state(state)        go on from there

so a source that samples answers from the model, as reinforcement learning does, can stand where `PlannedBatches` does.
It is already behind a step when it yields the step's micro-batches: a state saved right after the step continues with
the next one.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dataset.batching import plan_batches, prefetch

from .processes import Run


@dataclass(frozen=True)
class Place:
    """How far a run is, for people: in this epoch (from 1) of all, after this step of all of the epoch."""

    epoch: int
    epochs: int
    step: int
    steps: int


class PlannedBatches:
    """Every unit of the data once an epoch: `plan_batches` cuts it into micro-batches, and a window of them is a step.

    Each rank takes every world_size-th micro-batch of a window; the last window of an epoch may be short. Example: 7
    micro-batches an epoch, 2 ranks, ``accumulation_steps`` 2, so a window of 4:

        step 1    micro-batches 0 1 2 3    rank 0 takes 0 2, rank 1 takes 1 3
        step 2    micro-batches 4 5 6      rank 0 takes 4 6, rank 1 takes 5

    The place is (epoch, next_batch), here (0, 4) after step 1. It counts micro-batches, not steps, because a run may
    continue with another number of processes or of micro-batches a step: nothing is trained on twice or left out.

    Args:
        units: what is trained on, with ``lengths`` (N,) and ``collate(ids) -> micro-batch``.
        budget: positions of a micro-batch, see `plan_batches`.
        accumulation_steps: micro-batches of a step for each process.
        prefetched: micro-batches to prepare ahead, by a thread; 0 for none.
        equal_shares: every process must get the same number of micro-batches, so leave out what does not divide.
    """

    def __init__(
        self,
        run: Run,
        units,
        budget: int,
        *,
        epochs: int,
        accumulation_steps: int,
        seed: int,
        prefetched: int = 0,
        equal_shares: bool = False,
    ):
        self._run, self._lengths, self._collate = run, units.lengths, run.pinned(units.collate)
        self._budget, self._seed, self._prefetched = budget, seed, prefetched
        self._multiple = run.world_size if equal_shares else 1
        self._window = accumulation_steps * run.world_size  # micro-batches of a step, of all processes together
        self._epochs = epochs
        self._epoch = 0
        self._next_batch = 0  # first micro-batch of this epoch's plan that was not trained on
        self._per_epoch = len(self.plan(0))  # the same in every epoch

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The micro-batches of an epoch, arrays of ids; made when the epoch begins."""
        batches = plan_batches(self._lengths, self._budget, self._seed, epoch)
        return batches[: len(batches) // self._multiple * self._multiple]

    def __iter__(self) -> Iterator[Iterator[dict[str, Tensor]]]:
        """Yield, for every step from the place on, an iterator over this rank's micro-batches of that step."""
        for epoch in range(self._epoch, self._epochs):
            planned = self.plan(epoch)
            starts = range(self._next_batch, len(planned), self._window)
            shares = []  # for each step the ids of this rank's micro-batches
            for start in starts:
                window = planned[start : start + self._window]
                shares.append(window[self._run.rank :: self._run.world_size])
            with self._made(list(itertools.chain.from_iterable(shares))) as batches:
                for start, share in zip(starts, shares, strict=True):
                    self._epoch = epoch
                    self._next_batch = start + self._window
                    yield itertools.islice(batches, len(share))
            self._next_batch = 0

    def _made(self, order: list[np.ndarray]):
        """A context manager that gives the micro-batches of these ids, one after the other."""
        if self._prefetched:
            return prefetch(self._collate, order, self._prefetched)
        return contextlib.nullcontext(map(self._collate, order))

    def state(self) -> dict:
        """The place in the plan. It is the same on every rank."""
        return {"epoch": self._epoch, "next_batch": self._next_batch}

    def load_state(self, state: dict) -> None:
        """Continue at a place that `state` returned, perhaps of a run with another number of processes."""
        self._epoch = state["epoch"]
        self._next_batch = state["next_batch"]

    def place(self) -> Place:
        """The place in steps, the one just yielded included."""
        return Place(self._epoch + 1, self._epochs, self._steps(self._trained), self._steps(self._per_epoch))

    def steps_done(self) -> int:
        """Steps of today's size before the place: of 7 micro-batches a step 4, after (epoch 1, next_batch 4), 2 + 1."""
        return self._epoch * self._steps(self._per_epoch) + self._steps(self._trained)

    def steps_left(self) -> int:
        """Steps from the place to the end of the last epoch."""
        later_epochs = self._epochs - self._epoch - 1
        return self._steps(self._per_epoch - self._trained) + later_epochs * self._steps(self._per_epoch)

    @property
    def _trained(self) -> int:
        """Micro-batches of this epoch that were trained on; a short last window leaves next_batch beyond the end."""
        return min(self._next_batch, self._per_epoch)

    def _steps(self, batches: int) -> int:
        """Steps that a number of micro-batches makes; the last may be short."""
        return math.ceil(batches / self._window)
