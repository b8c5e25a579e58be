"""What a run tells: log lines, ``out/logs/<run>.jsonl``, curves, a progress bar, a tracker if asked for."""

import bisect
import contextlib
import itertools
import json
import math
import os
import shutil
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from .checkpoint import Progress
from .curves import plot_log
from .saver import plain_flags
from .source import Place
from .stats import StepStats, is_metric
from .trackers import NoTracker

FIRST_LINE = 4.0  # seconds after which the micro-batches of a first step that is not done yet are told
DATA_WAIT = 0.02  # share of the time spent waiting for data that a log line mentions
COLUMNS = 120  # widest line


class Meter:
    """Adds up the numbers of the steps since the last log line, and the time that went by."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.skipped = 0
        self.idle = 0.0  # seconds of evaluations and saves
        self.waited = 0.0  # seconds of waiting for data
        self.started = time.perf_counter()

    def add(self, numbers: dict[str, float]) -> None:
        """Add one step's numbers (`StepStats.fetch`). A skipped step adds nothing: its loss may be NaN."""
        self.steps += 1
        self.skipped += int(numbers["skipped"])
        self._names = list(numbers)
        if not numbers["skipped"]:
            for name, value in numbers.items():
                self.sums[name] = self.sums.get(name, 0.0) + value

    def timed(self, batches: Iterable) -> Iterator:
        """The same batches; the time that each takes to arrive counts as waiting for data."""
        batches = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (an evaluation, a save) does not count as training time."""
        started = time.perf_counter()
        yield
        self.idle += time.perf_counter() - started

    def seconds(self) -> float:
        """Training time of the window so far."""
        return max(time.perf_counter() - self.started - self.idle, 1e-9)

    def means(self) -> dict[str, float]:
        """Loss and stage metrics per unit of weight (``nll`` per token), gradient norm, and the rates of the window."""
        seconds = self.seconds()
        sums = self.sums or dict.fromkeys(self._names, math.nan)  # every step of the window was skipped
        weight = max(sums["weight"], 1)
        positions = max(sums["positions"], 1)
        means = {name: value / weight for name, value in sums.items() if is_metric(name)}
        if "nll" in means and sums.get("targets"):
            means["nll"] = sums["nll"] / sums["targets"]  # where tokens differ in weight, targets != weight
        return {
            **means,
            "grad_norm": sums["grad_norm"] / max(self.steps - self.skipped, 1),
            "tokens_per_s": sums["tokens"] / seconds,
            "data_wait": self.waited / seconds,
            "padding": 1 - sums["tokens"] / positions,
            "seconds_per_step": seconds / max(self.steps, 1),
        }


class Report:
    """The main process's log of one run; on other ranks every method does nothing.

    Nothing here ends a run: a log that cannot be written (full disk) or a tracker that fails is told once.

    Args: run: this process (training.processes.Run); name: of the log files; tracker: see training/trackers.py.
    """

    def __init__(self, run, args, name: str, total_steps: int, first_step: int = 0, tracker=None):
        self._run, self.active = run, run.is_main
        self.path = Path(args.out_dir) / "logs" / f"{name}.jsonl"
        if not self.active:
            return
        # The time left stands in the log lines, once.
        shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}"
        self._bar = tqdm(
            total=total_steps, initial=first_step, bar_format=shape, dynamic_ncols=True, disable=None, leave=False
        )
        self._tracker = tracker or NoTracker()
        self._total_steps, self._accumulation_steps = total_steps, args.accumulation_steps
        self._is_silent, self._micro_batches = True, 0  # until the first line
        self._is_writable = True
        self._is_drawn = False
        self.record({"event": "start", "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "flags": plain_flags(args)})

    def log_step(self, progress: Progress, place: Place, lr: float, meter: Meter) -> None:
        """One line in upstream's format plus rates, one JSON record; starts a new window of the meter."""
        if self.active:
            means = meter.means()
            seconds = means["seconds_per_step"]
            rates = [f"tokens/s:{means['tokens_per_s']:.0f}", f"grad_norm:{means['grad_norm']:.2f}"]
            rates += [f"data_wait:{means['data_wait']:.0%}"] if means["data_wait"] > DATA_WAIT else []
            rates += [f"ETA:{clock((self._total_steps - progress.step) * seconds)}"]
            minutes = (place.steps - place.step) * seconds / 60
            self.line(format_line(place, place.step, means["loss"], lr, minutes, *rates))
            self._is_silent = False
            self.record({"step": progress.step, "epoch": place.epoch, "lr": lr, "tokens": progress.tokens,
                         "skipped": progress.skipped, **means})  # fmt: skip
        meter.reset()

    def log_micro_batch(self, place: Place, lr: float, meter: Meter, stats: StepStats) -> None:
        """After each micro-batch: one line, on the screen only, if the run's first step is taking long."""
        if not self.active or not self._is_silent:
            return
        self._micro_batches += 1
        if (seconds := meter.seconds()) > FIRST_LINE:
            numbers = stats.so_far()
            done = place.step - 1  # this step is not
            seconds_per_step = seconds / self._micro_batches * self._accumulation_steps
            minutes = (place.steps - done) * seconds_per_step / 60
            loss = numbers["loss"] / max(numbers["weight"], 1)
            rate = f"tokens/s:{numbers['tokens'] / seconds:.0f}"
            self.line(format_line(place, done, loss, lr, minutes, rate))
            self._is_silent = False

    def line(self, text: str) -> None:
        """Print one line."""
        self._run.log(text)

    def heldout(self, step: int, measured: dict[str, float]) -> None:
        """Line and record of the held-out figures after this step."""
        figures = " ".join(f"{name.removeprefix('heldout_')}:{value:.4f}" for name, value in measured.items())
        self.line(fold(f"held-out {figures}"))
        self.record({"step": step, **measured})

    def samples(self, answers: list[tuple[str, str]]) -> None:
        """Sample questions and answers, a line each."""
        for question, answer in answers:
            self.line(f"👶: {one_line(question, width() - 5)}\n🤖️: {one_line(answer, width() - 5)}")

    def step_done(self) -> None:
        """Move the progress bar by one optimizer step."""
        if self.active:
            self._bar.update()

    def record(self, values: dict) -> None:
        """Append one JSON line; numbers also go to the tracker under the same keys."""
        if not self.active:
            return
        with self._disk_may_be_full():
            append_line(self.path, json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace"))
        self._is_drawn = False
        if "step" in values:
            with self._tracker_may_fail():
                self._tracker.log({key: value for key, value in values.items() if key != "step"}, step=values["step"])

    def plot(self) -> None:
        """Draw the curves beside the log, from the log: ``out/logs/<run>.png``."""
        if self.active and not self._is_drawn:
            with self._disk_may_be_full():
                plot_log(self.path)
            self._is_drawn = True

    def close(self) -> None:
        """Draw the curve a last time and close everything."""
        if self.active:
            self._bar.close()
            self.plot()
            with self._tracker_may_fail():
                self._tracker.finish()

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._is_writable:
                self.line(f"!!! the log cannot be written: {error}; the run goes on without it")
            self._is_writable = False

    @contextlib.contextmanager
    def _tracker_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # somebody else's package, with errors of its own
            self._tracker = NoTracker()
            self.line(f"!!! the tracker failed ({type(error).__name__}: {error}); the run goes on without it")


def append_line(path: Path, line: bytes) -> None:
    """Append a line at once, so that a kill loses none; on a new line where the last was cut off. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        file.write((b"" if file.read(1) in (b"", b"\n") else b"\n") + line + b"\n")


def format_line(place: Place, step: int, loss: float, lr: float, minutes: float, *rates: str) -> str:
    """A log line in upstream's shape, in at most 120 columns.

    Args: step: made in the epoch of ``place``; minutes: left of that epoch.
    """
    epoch = f"Epoch:[{place.epoch}/{place.epochs}]({step}/{place.steps})"
    return " ".join([f"{epoch} loss:{loss:.3f} lr:{lr:.1e} epoch_Time:{minutes:.1f}min:", *rates])


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: ``5025`` -> ``1:23:45``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def width() -> int:
    """Columns of the terminal; of a file, or of a wider terminal, COLUMNS."""
    return min(COLUMNS, shutil.get_terminal_size((COLUMNS, 0)).columns)


def fold(text: str) -> str:
    """A text broken into as many lines as the width asks for; the second and later ones are indented."""
    return textwrap.fill(text, width(), subsequent_indent="    ", break_on_hyphens=False)


def one_line(text: str, columns: int) -> str:
    """A sample for the log: white space runs become one blank, what is too wide loses its middle.

    A model that has just begun to learn writes blank lines and control characters, a reasoning one several paragraphs.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    widths = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]  # of CJK characters: two columns
    if sum(widths) <= columns:
        return text
    ends = list(itertools.accumulate(widths))
    head = bisect.bisect_right(ends, columns // 2 - 1)
    tail = bisect.bisect_left(ends, ends[-1] - columns // 2 + 2)
    return f"{text[:head]} … {text[tail + 1 :]}"
