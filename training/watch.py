"""What keeps an eye on a run: non-finite gradients, loss spikes, the wish to stop or save, and memory."""

import contextlib
import statistics
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint import Progress, random_state, set_random_state
from .report import Meter, Report
from .saver import MAX_BAD_STEPS

SPIKE_SIGMA, SPIKE_WINDOW, SPIKE_MIN = 10, 128, 32


class Watch:
    """Reads each step's numbers one step late, when they have arrived on their own: nobody waits for the device.

    stop, save_due: somebody, on any rank, asked the run to stop or to save.
    """

    def __init__(self, meter: Meter, progress: Progress, report: Report):
        self.meter, self.progress, self.report = meter, progress, report
        self.stop = self.save_due = False
        self._unread: Tensor | None = None
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def put(self, values: Tensor) -> None:
        """Take the numbers of the step just made, in the order of ``meter.names``; they stay on the device for now."""
        self._unread = values

    def read(self) -> None:
        """Fetch the last numbers and act on them; nothing happens if there are none, or they were read before."""
        if self._unread is None:
            return
        numbers, self._unread = self.meter.add(self._unread.tolist()), None
        progress = self.progress
        progress.tokens += int(numbers["tokens"])
        self.stop |= bool(numbers["stop"])
        self.save_due |= bool(numbers["save"])
        if numbers["skipped"]:
            progress.skipped += 1
            progress.bad_streak += 1
            self.report.line(f"step {progress.step}: non-finite gradient, update skipped ({progress.skipped} so far)")
        else:
            progress.bad_streak = 0
            self._look_for_spike(numbers["loss"] / max(numbers["weight"], 1))

    @property
    def is_failing(self) -> bool:
        """True when MAX_BAD_STEPS steps in a row had a non-finite gradient; the same on all ranks."""
        return self.progress.bad_streak >= MAX_BAD_STEPS

    def _look_for_spike(self, loss: float) -> None:
        """Tell of a loss far above those of up to 128 steps before.

        Median and MAD, which for normal noise is sigma / 1.4826: three outliers in the window would raise a standard
        deviation so far that the fourth is not seen.
        """
        if len(self._losses) >= SPIKE_MIN:
            median = statistics.median(self._losses)
            sigma = 1.4826 * statistics.median(abs(other - median) for other in self._losses)
            if loss > median + SPIKE_SIGMA * max(sigma, 1e-4):
                self.progress.spikes += 1
                self.report.line(
                    f"step {self.progress.step}: loss spike, {loss:.3f} is more than {SPIKE_SIGMA} standard deviations "
                    f"above {median:.3f}, the median of {len(self._losses)} steps ({self.progress.spikes} so far); if "
                    "the loss does not come back within some hundred steps, lower --learning_rate"
                )
        self._losses.append(loss)


def memory_report(run, args, model: nn.Module, loss_fn, units, budget: int) -> str:
    """One line: the memory that training will need, before it needs it.

    Weights, gradients and AdamW's two moments are float32. Activations are measured, not guessed: what autograd keeps
    for one and for two rows of a real batch, extended along that line to the full batch; torch.compile keeps less.

    Args: units: training.inputs.Data.train; budget: positions of a full micro-batch.
    """
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    before = random_state(run.device)
    probes = []
    for count in sorted({1, min(2, len(units))}):
        batch = run.to_device(units.collate(np.arange(count)))
        probes.append((batch["input_ids"].numel(), kept_for_backward(run, model, loss_fn, batch)))
    set_random_state(before, run.device)
    (x0, y0), (x1, y1) = probes[0], probes[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else y0 / x0
    activations = max(0.0, y1 + slope * (budget - x1))
    gradients = trained * (2 if run.world_size > 1 else 1)  # the all-reduce works on one flat copy
    total = model_bytes + gradients + 2 * trained + activations
    line = (
        f"memory: weights {megabytes(model_bytes)} + gradients {megabytes(gradients)} + optimizer "
        f"{megabytes(2 * trained)} + activations {megabytes(activations)} = about {megabytes(total)}"
    )
    if run.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(run.device)
        line += f" of {megabytes(free)} free"
        if total > free:
            line += f"; this will probably not fit: {what_to_lower(args)}"
    return line


def kept_for_backward(run, model: nn.Module, loss_fn, batch: dict[str, Tensor]) -> int:
    """Bytes of activations that autograd keeps between the forward and the backward pass of a micro-batch."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), run.autocast():
        loss_fn(model, batch)
    return sum(kept.values())


def megabytes(count: float) -> str:
    """``1234567890`` -> ``1235 MB``."""
    return f"{count / 1e6:.0f} MB"


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
            f"out of memory: {reason}\n{what_to_lower(args)}. The last saved state is whole; with another --batch_size "
            "start a new run from its weights (--from_weight), because the data plan changes."
        ) from error
