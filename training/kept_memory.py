"""Freed memory that a process keeps from step to step on a CPU, and its bound. The C library: common/memory.py."""

from common.memory import give_back_free_memory, heap_memory

GROWTH = 1.2  # how much more than the run needs may stay with the process between steps


class KeptMemory:
    """Bounds the freed memory that stays with the process from step to step.

    The C library aligns a tensor within a slightly larger block and keeps the rest for small ones. Where such a small
    block stays, the freed tensor's place is too small for the next tensor of even the same size, which is taken from
    the system: without a bound a model of 0.5M parameters grew to 7.3 GB. So everything that is free is given back when
    the process holds a fifth more than the run was measured to need; or more than a single step turned out to need.

    Args: needed: heap of this process at its largest (memory_report); 0 where nothing is to be bounded.
    """

    def __init__(self, needed: int):
        self.limit = GROWTH * needed
        self._is_fresh = False

    def end_step(self) -> None:
        """Look at the memory after a step, in microseconds, and give back what is free when there is too much."""
        held = heap_memory() if self.limit else 0
        if held <= self.limit:
            self._is_fresh = False
            return
        if self._is_fresh:  # one step needs as much
            self.limit = held
        give_back_free_memory()
        self._is_fresh = True
