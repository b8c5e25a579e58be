"""What keeps an eye on a run: non-finite gradients, loss spikes, and the wish to stop or save."""

import statistics
from collections import deque
from collections.abc import Callable

from .checkpoint import Progress
from .report import Meter, Report, fold
from .saver import MAX_BAD_STEPS

SPIKE_SIGMA, SPIKE_STEPS, SPIKE_WINDOW, SPIKE_MIN = 10, 3, 128, 32


class Watch:
    """Reads each step's numbers one step late, when they have arrived on their own: the device always has work.

    stop, save_due: somebody, on any rank, asked the run to stop or to save.
    """

    def __init__(self, meter: Meter, progress: Progress, report: Report):
        self.meter, self.progress, self.report = meter, progress, report
        self.stop = self.save_due = False
        self._unread: Callable[[], dict[str, float]] | None = None
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._high_steps = 0  # in a row, up to now

    def put(self, numbers: Callable[[], dict[str, float]]) -> None:
        """Take the numbers of the step just made, on their way here (`StepStats.fetch`), and read those before them.

        These have arrived by now: nobody waits.
        """
        self.read()
        self._unread = numbers

    def read(self) -> None:
        """Fetch the last numbers and act on them; nothing happens if there are none, or they were read before."""
        if self._unread is None:
            return
        numbers = self._unread()
        self._unread = None
        self.meter.add(numbers)
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
        """Tell of losses far above those of up to 128 steps before, once three steps in a row have one.

        A step's loss is that before its update. So one high loss is of an unusual batch: in fine-tuning on the sample,
        those with a long program among short answers have 4 where all others have 0.6. An update that did harm shows
        in the losses of the steps after it.
        Median and MAD, which for normal noise is sigma / 1.4826: three outliers in the window would raise a standard
        deviation so far that the fourth is not seen.
        """
        if len(self._losses) >= SPIKE_MIN:
            median = statistics.median(self._losses)
            sigma = 1.4826 * statistics.median(abs(other - median) for other in self._losses)
            is_high = loss > median + SPIKE_SIGMA * max(sigma, 1e-4)
            self._high_steps = self._high_steps + 1 if is_high else 0
            if self._high_steps == SPIKE_STEPS:
                self.progress.spikes += 1
                self.report.line(
                    fold(
                        f"step {self.progress.step}: loss spike, {SPIKE_STEPS} steps in a row are more than "
                        f"{SPIKE_SIGMA} standard deviations above {median:.3f}, the median of {len(self._losses)} "
                        f"steps; this one is {loss:.3f} ({self.progress.spikes} so far). If the loss does not come "
                        "back within some hundred steps, lower --learning_rate"
                    )
                )
        self._losses.append(loss)
