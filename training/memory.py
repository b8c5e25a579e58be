"""The memory of a run: estimated before it is taken, and refused where it cannot fit.

All sizes are in bytes. The memory of the machine means what this process may use: also of the container that it
runs in, if that is less.
"""

import contextlib
import copy
import os
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.memory import KERNELS, give_back_free_memory, heap_memory, machine_memory, resident_memory
from model.LMConfig import LMConfig
from model.loading import count_parameters, new_model

from .checkpoint import random_state, set_random_state
from .kept_memory import GROWTH

PER_WEIGHT = 16  # float32: a trained weight, its gradient, and AdamW's two moments
PROBE = 1024  # positions of the smaller of two probes: more than a loss works through at once
KERNEL_SIZE = 900_000  # a compiled matrix product of bfloat16 and its description, measured


# Before anything is allocated


def refuse_a_model_that_cannot_fit(args, config: LMConfig, is_trained: bool = True) -> None:
    """Raises ValueError if the weights, or what training them takes without activations, exceed the machine's memory.

    Nothing is allocated for it.
    """
    machine = machine_memory()
    per_weight = PER_WEIGHT if is_trained and not args.deepspeed else 4  # ZeRO spreads the rest over the processes
    parameters = planned_parameters(config)
    if machine and parameters * per_weight > machine:
        takes = "weights, gradients and AdamW's moments" if per_weight > 4 else "weights"
        raise ValueError(
            f"--dim {config.dim} --n_layers {config.n_layers}: a model of {parameters / 1e6:,.0f} million parameters "
            f"takes {megabytes(parameters * per_weight)} for {takes}, and this machine has {megabytes(machine)}: lower "
            "--dim or --n_layers (--dim 512 --n_layers 8 takes 413 MB)"
        )


def planned_parameters(config: LMConfig) -> int:
    """Parameters of a model of this configuration; blocks are all alike, so it builds one and two, without memory."""
    small, counts = copy.deepcopy(config), []
    for small.n_layers in (1, 2):
        with torch.device("meta"):
            counts.append(count_parameters(new_model(small)))
    one, two = counts
    return one + (config.n_layers - 1) * (two - one)


# Before training


def memory_report(run, args, model: nn.Module, loss_fn, units, budget: int) -> tuple[str, int]:
    """The memory that training will take, before it takes it, as a line and as a number for KeptMemory.

    Gradients and AdamW's two moments are float32. Activations are measured, not guessed: the most that is alive in the
    forward and backward pass of some units and of twice as many, extended along that line to the full micro-batch;
    torch.compile needs less. On a CPU the process with its libraries and weights is measured too.

    Args: units: training.inputs.Data.train; budget: positions of a full micro-batch.
    Raises: ValueError when a CPU run needs more than the machine has.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    activations = most_activations(run, model, loss_fn, units, budget)
    gradients = trained * (2 if run.world_size > 1 else 1)  # the all-reduce works on one flat copy
    parts = {"gradients": gradients, "optimizer": 2 * trained, "activations": activations}
    needed = sum(parts.values())
    if run.device.type == "cpu":
        give_back_free_memory()
        process, saving = resident_memory(), weights + 2 * trained
        kernels = KERNELS * KERNEL_SIZE if run.dtype == torch.bfloat16 else 0
        heap = heap_memory() + needed + saving + kernels
        needed += process + saving + kernels
        kept = (GROWTH - 1) * needed
        parts = {"process with its weights": process, **parts, "copy while saving": saving}
        parts |= {"compiled kernels": kernels, "freed memory kept": kept}
        machine = machine_memory()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
        if machine and needed * here > machine:
            together = f" in each of {here} processes" if here > 1 else ""
            raise ValueError(
                f"{memory_line(parts)}{together}, and this machine has {megabytes(machine)}: {what_to_lower(args)}"
            )
        return memory_line(parts, of=machine), heap
    parts = {"weights": weights, **parts}
    if run.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(run.device)
        remark = f"; this will probably not fit: {what_to_lower(args)}" if needed + weights > free else ""
        return memory_line(parts, of=free) + remark, 0
    return memory_line(parts), 0


def memory_line(parts: dict[str, float], of: int | None = None) -> str:
    """``memory: about 60 MB of 8,000 MB = process 40 + gradients 20``; a part that takes nothing is left out."""
    total = megabytes(sum(parts.values())) + (f" of {megabytes(of)}" if of else "")
    return f"memory: about {total} = {' + '.join(f'{name} {size / 1e6:,.0f}' for name, size in parts.items() if size)}"


def most_activations(run, model: nn.Module, loss_fn, units, budget: int) -> float:
    """Bytes alive at once, at most, in the forward and backward pass of a full micro-batch, without gradients.

    Measured on a few units that are most like the average one in their share of supervised tokens, of those that are
    not shorter than half of all; a batch never holds more than all units.
    """
    share = abs(units.weights / units.lengths - units.weights.sum() / units.lengths.sum())
    typical = np.flatnonzero(units.lengths >= np.median(units.lengths))
    typical = typical[np.argsort(share[typical], kind="stable")]
    before = random_state(run.device)
    probes = []
    rows = max(1, round(PROBE / np.median(units.lengths)))
    for count in sorted({min(count, len(typical)) for count in (rows, 2 * rows)}):
        batch = run.to_device(units.collate(np.sort(typical[:count])))
        probes.append((batch["input_ids"].numel(), live_peak(run, model, loss_fn, batch)))
    set_random_state(before, run.device)
    (x0, y0), (x1, y1) = probes[0], probes[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else y0 / x0
    return max(0.0, y1 + slope * (min(budget, int(units.lengths.sum())) - x1))


def live_peak(run, model: nn.Module, loss_fn, batch: dict[str, Tensor]) -> int:
    """The most bytes alive at once that one micro-batch's forward and backward pass made, without its gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with LivePeak() as counter:
        with run.autocast():
            loss, *_ = loss_fn(model, batch)
        loss.backward()
        del loss
    for parameter in trained:
        parameter.grad = None
    return counter.peak


class LivePeak(TorchDispatchMode):
    """Counts the memory of all tensors that operations inside it return; ``peak`` is the most that was alive at once.

    What an operation allocates and frees within itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place not in given | self._known:  # neither a view nor a result in place
                    self._known.add(place)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, place, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


# Words


def megabytes(count: float) -> str:
    """``1234567890`` -> ``1,235 MB``."""
    return f"{count / 1e6:,.0f} MB"


def what_to_lower(args) -> str:
    """The flags that save memory, with the values that keep the result the same where that is possible."""
    half = max(1, args.batch_size // 2)
    return (
        f"lower --batch_size {args.batch_size} to {half} and raise --accumulation_steps {args.accumulation_steps} to "
        f"{2 * args.accumulation_steps} (the step stays the same size), or lower --max_seq_len {args.max_seq_len}, "
        f"--dim {args.dim} or --n_layers {args.n_layers}"
    )


@contextlib.contextmanager
def out_of_memory_advice(args) -> Iterator[None]:
    """Turn an out-of-memory error into a message that names the flags to lower. Raises SystemExit."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU allocator raises a plain RuntimeError.
        is_memory = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        if not is_memory and "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise SystemExit(
            f"out of memory: {reason}\n{what_to_lower(args)}. Whatever was saved before is whole; if weights "
            "were, a new run can start from them (--from_weight), but --resume cannot take another --batch_size: the "
            "data plan changes."
        ) from error
