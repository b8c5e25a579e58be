"""The numbers of one optimizer step: what was computed, what the processes wish, how the update went.

They stay on the device as one small vector, because it travels twice: to the other processes, behind the gradients in
the step's only all-reduce, and to the host in one copy that nobody waits for. Everybody else asks by name; the order
of the vector is known in this file alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

COUNTS = ("weight", "tokens", "positions", "targets")  # sums over the step that are no figure by themselves
WISHES = ("stop", "save")  # how many processes want the run to stop, or to save
OUTCOME = ("grad_norm", "skipped")  # skipped: 1 if the update was dropped for a non-finite gradient


def is_metric(name: str) -> bool:
    """True for the loss and the stage's own numbers, which are logged as means over the weight."""
    return name not in (*COUNTS, *WISHES, *OUTCOME)


class StepStats:
    """The numbers of the step that is being made; one object serves all steps of a run.

        stats.begin()                                    a new step
        stats.add({"loss": ..., "weight": ..., ...})     after each micro-batch; names and order never change
        stats.wish(stop=False, save=False)               what this process wishes, as late as possible
        stats.pack(), stats.unpack(vector)               the updater sums the vector over all processes
        stats.finish(grad_norm, skipped)                 the updater says how it went
        read = stats.fetch()                             starts the copy to the host; read() gives {name: number}

    With two micro-batches whose loss sums are 30 and 20 on this process, and 50 on the other:

        add, add     loss 50
        pack         loss 50, stop 0, save 0
        unpack       loss 100, stop 0, save 0                          now on both processes
        finish       loss 100, stop 0, save 0, grad_norm 0.7, skipped 0
    """

    def __init__(self, run):
        self._run = run
        self._measured: list[str] = []  # names of what micro-batches add, equal on all processes
        self.begin()

    def begin(self) -> None:
        """Forget the step before."""
        self._names: list[str] = []
        self._vector = torch.zeros(0, device=self._run.device)  # (K,) float32, a number for each name
        self.wish()

    def add(self, numbers: dict[str, Tensor | float]) -> None:
        """Add the numbers of a micro-batch: scalar tensors on the device, or Python's."""
        vector = self._run.stack(numbers.values())
        if self._names:
            vector = self._vector + vector
        self._names = list(numbers)
        self._vector = vector

    def wish(self, stop: bool = False, save: bool = False) -> None:
        """Say what this process wishes to happen after the step. It happens if one of them wishes it."""
        self._wishes = (float(stop), float(save))

    def pack(self) -> Tensor:
        """This process' vector (K,), ready to be summed over all processes; as long on every one of them.

        A process may have had no micro-batch, in the last window of an epoch: it adds zeros. How many, it learns from
        rank 0, which always has one, in the first step of the run; so all processes must call this.
        """
        if not self._measured:
            self._measured = self._run.from_main(self._names)
        if not self._names:
            self._names = list(self._measured)
            self._vector = torch.zeros(len(self._measured), device=self._run.device)
        self._append(WISHES, self._run.stack(self._wishes))
        return self._vector

    def unpack(self, vector: Tensor) -> None:
        """Take the sum over all processes of what `pack` returned."""
        self._vector = vector

    def finish(self, grad_norm: Tensor, skipped: Tensor) -> None:
        """Add the outcome of the update, two scalar tensors."""
        self._append(OUTCOME, torch.stack([grad_norm, skipped]))

    def __getitem__(self, name: str) -> Tensor:
        """A number of the step as it is now, a scalar tensor on the device: nobody waits for it."""
        return self._vector[self._names.index(name)]

    def so_far(self) -> dict[str, float]:
        """The numbers as they are now. The host waits for the device."""
        return dict(zip(self._names, self._vector.tolist(), strict=True))

    def fetch(self) -> Callable[[], dict[str, float]]:
        """Start copying the numbers to the host; calling the result gives them, by then without a wait."""
        names, read = self._names, self._run.fetch(self._vector)
        return lambda: dict(zip(names, read(), strict=True))

    def _append(self, names: tuple[str, ...], values: Tensor) -> None:
        self._names = [*self._names, *names]
        self._vector = torch.cat([self._vector, values])
