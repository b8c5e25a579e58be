"""What a run tells: log lines, ``out/logs/<run>.jsonl``, a loss-curve PNG, a progress bar, a tracker if asked for."""

import contextlib
import datetime
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from .trackers import NoTracker


class Meter:
    """Adds up the numbers of the steps since the last log line, and the time that went by."""

    def __init__(self):
        self.names: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.sums: dict[str, float] = {}
        self.steps = self.skipped = 0
        self.idle, self.waited, self.started = 0.0, 0.0, time.perf_counter()

    def add(self, values: list[float]) -> dict[str, float]:
        """Add one step's numbers, in the order of ``names``; returns them by name. A skipped step adds nothing."""
        numbers = dict(zip(self.names, values, strict=True))
        self.steps += 1
        self.skipped += int(numbers["skipped"])
        if not numbers["skipped"]:
            for name, value in numbers.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        return numbers

    def wait_for(self, batches: Iterator):
        """The next of ``batches``; the time it takes counts as waiting for data."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (an evaluation, a save) does not count as training time."""
        started = time.perf_counter()
        yield
        self.idle += time.perf_counter() - started

    def means(self) -> dict[str, float]:
        """Loss and stage metrics per unit of weight (``nll`` per token), gradient norm, and the rates of the window."""
        seconds = max(time.perf_counter() - self.started - self.idle, 1e-9)
        sums = self.sums or dict.fromkeys(self.names, math.nan)
        weight, positions, steps = max(sums["weight"], 1), max(sums["positions"], 1), max(self.steps, 1)
        plain = ("weight", "tokens", "positions", "targets", "stop", "save", "grad_norm", "skipped")
        means = {name: value / weight for name, value in sums.items() if name not in plain}
        if "nll" in means and sums.get("targets"):
            means["nll"] = sums["nll"] / sums["targets"]  # where tokens differ in weight, targets != weight
        return {
            **means,
            "grad_norm": sums["grad_norm"] / max(self.steps - self.skipped, 1),
            "tokens_per_s": sums["tokens"] / seconds,
            "data_wait": self.waited / seconds,
            "padding": 1 - sums["tokens"] / positions,
            "seconds_per_step": seconds / steps,
        }


class Report:
    """The main process's log of one run; on other ranks every method does nothing.

    A log that cannot be written any more (full disk) is told once and does not end the run.

    Args: run: this process (training.runtime.Run); name: of the log files; tracker: see training/trackers.py.
    """

    def __init__(self, run, args, name: str, total_steps: int, first_step: int = 0, tracker=None):
        self.active = run.is_main
        self.path = Path(args.out_dir) / "logs" / f"{name}.jsonl"
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)  # unbuffered: a kill loses no line
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None, leave=False
        )
        self._tracker = tracker or NoTracker()
        self._epochs = args.epochs
        self._is_writable = True
        self._is_drawn = False
        self.record({"event": "start", "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "flags": vars(args)})

    def log_step(self, progress, meter: Meter, lr: float, place: tuple[int, int], total_steps: int) -> None:
        """One line in upstream's format plus rates, one JSON record; starts a new window of the meter.

        Args: place: optimizer steps made in this epoch, and those it has.
        """
        if self.active:
            means = meter.means()
            step, steps = place
            seconds = means["seconds_per_step"]
            self.line(
                f"Epoch:[{progress.epoch + 1}/{self._epochs}]({step}/{steps}) loss:{means['loss']:.3f} lr:{lr:.12f} "
                f"epoch_Time:{(steps - step) * seconds / 60:.1f}min: tokens/s:{means['tokens_per_s']:.0f} "
                f"data_wait:{means['data_wait']:.1%} padding:{means['padding']:.1%} grad_norm:{means['grad_norm']:.2f} "
                f"ETA:{datetime.timedelta(seconds=round((total_steps - progress.step) * seconds))}"
            )
            self.record({"step": progress.step, "epoch": progress.epoch + 1, "lr": lr, "tokens": progress.tokens,
                         "skipped": progress.skipped, **means})  # fmt: skip
        meter.reset()

    def line(self, text: str) -> None:
        """Print one line above the progress bar."""
        if self.active:
            tqdm.write(text)

    def step_done(self) -> None:
        """Move the progress bar by one optimizer step."""
        if self.active:
            self._bar.update()

    def record(self, values: dict) -> None:
        """Append one JSON line; numbers also go to the tracker under the same keys."""
        if not self.active:
            return
        with self._disk_may_be_full():
            self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self._is_drawn = False
        if "step" in values:
            self._tracker.log({key: value for key, value in values.items() if key != "step"}, step=values["step"])

    def plot(self) -> None:
        """Draw the loss curve beside the log, from the log: ``out/logs/<run>.png``."""
        if self.active and not self._is_drawn:
            with self._disk_may_be_full():
                plot_losses(self.path)
            self._is_drawn = True

    def close(self) -> None:
        """Draw the curve a last time and close everything."""
        if self.active:
            self._bar.close()
            self.plot()
            self._file.close()
            self._tracker.finish()

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._is_writable:
                self.line(f"!!! the log cannot be written: {error}; the run goes on without it")
            self._is_writable = False


def read_log(path: Path) -> list[dict]:
    """The records of a log file; a line that was cut off by a kill or a full disk is left out."""
    records = []
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def series(records: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of every record with this name, by step. Steps that a continued run repeated count once."""
    return sorted({r["step"]: r[name] for r in records if name in r and "step" in r}.items())


def plot_losses(log_path: Path) -> Path | None:
    """Draw training loss, held-out loss and bits per byte against the step; None while there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log_path)
    trained, heldout, bits = (series(records, name) for name in ("loss", "heldout_loss", "bits_per_byte"))
    if not trained and not heldout:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.7, linewidth=1, label="training loss")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color="tab:red", marker="o", markersize=4, label="held-out loss")
        axes.annotate(f"{heldout[-1][1]:.3f}", heldout[-1], textcoords="offset points", xytext=(4, 6), color="tab:red")
    axes.set(xlabel="step (optimizer updates)", ylabel="loss (nats per token)", title=Path(log_path).stem)
    axes.grid(alpha=0.3)
    lines, labels = axes.get_legend_handles_labels()
    if bits:
        right = axes.twinx()
        right.plot(
            *zip(*bits, strict=True), color="tab:green", marker="s", markersize=3, linestyle="--", label="bits per byte"
        )
        right.annotate(f"{bits[-1][1]:.3f}", bits[-1], textcoords="offset points", xytext=(4, -12), color="tab:green")
        right.set_ylabel("held-out bits per byte")
        right_lines, right_labels = right.get_legend_handles_labels()
        lines, labels = lines + right_lines, labels + right_labels
    axes.legend(lines, labels, loc="upper right")
    path = Path(log_path).with_suffix(".png")
    FigureCanvasAgg(figure).print_png(str(path))
    return path
