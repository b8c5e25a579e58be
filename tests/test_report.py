"""Log lines, jsonl, curve, trackers, and what watches over a run."""

import contextlib
import itertools
import json
import math
import statistics
import sys
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_loop import interrupt_at
from toy import VOCAB, toy_args, toy_run, toy_train

from training.checkpoint import Progress
from training.curves import draw, plot_log, read_log, series
from training.losses import next_token_loss
from training.report import Meter, Report, one_line
from training.source import Place
from training.trackers import NoTracker, start_tracker
from training.watch import SPIKE_MIN, Watch


def numbers(loss=2.0, weight=10.0, skipped=0.0, stop=0.0, save=0.0) -> dict[str, float]:
    """Those of a step, as they arrive from the device: float32."""
    values = {"loss": loss * weight, "weight": weight, "tokens": 12.0, "positions": 16.0, "nll": loss * weight,
              "stop": stop, "save": save, "grad_norm": 0.5, "skipped": skipped}  # fmt: skip
    return {name: float(np.float32(value)) for name, value in values.items()}


def make_watch(tmp_path):
    return Watch(Meter(), Progress(), Report(toy_run(), toy_args(tmp_path), "log", total_steps=100))


def read(watch, **step) -> None:
    """Let a step's numbers arrive."""
    watch.put(lambda: numbers(**step))
    watch.read()


# Meter and report


def test_means_are_weighted_and_skipped_steps_do_not_count():
    meter = Meter()
    for step in (numbers(1.0, 10), numbers(4.0, 30), numbers(math.nan, 10, skipped=1)):
        meter.add(step)
    means = meter.means()
    assert means["loss"] == means["nll"] == pytest.approx((10 + 120) / 40)
    assert means["grad_norm"] == 0.5 and means["padding"] == pytest.approx(1 - 12 / 16)
    meter.reset()
    meter.add(numbers(math.nan, 10, skipped=1))
    assert math.isnan(meter.means()["loss"]), "a window of skipped steps has no loss"


def test_a_run_leaves_a_log_and_a_curve(tmp_path):
    toy_train(tmp_path, "--max_steps", "10", "--eval_interval", "5", draw=True)
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert records[0]["flags"]["max_steps"] == 10
    assert [r["step"] for r in records if "loss" in r] == [1, 5, 10]
    assert log.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_is_drawn_from_whatever_there_is(tmp_path):
    log = tmp_path / "a.jsonl"
    log.write_text('{"event": "start"}\n')
    assert plot_log(log) is None
    log.write_text('{"step": 5, "heldout_loss": 2.0, "bits_per_byte": 1.5}\n{"step": 6, "loss": 3')
    assert plot_log(log).stat().st_size > 10_000


def test_a_full_disk_keeps_the_curves_drawn_before(tmp_path, monkeypatch):
    log = tmp_path / "a.jsonl"
    log.write_text('{"step": 5, "loss": 2.0}\n{"step": 6, "loss": 1.0}\n')
    before = plot_log(log).read_bytes()

    def full_disk(self, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", full_disk)
    with pytest.raises(OSError, match="No space"):
        plot_log(log)
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def panels(records: list[dict]) -> list:
    figure = draw(records, "title")
    FigureCanvasAgg(figure).draw()
    return figure.axes


def test_every_stage_has_its_panels_and_the_start_is_shown():
    step = {"step": 5, "loss": 2.0}
    start, end = ({"step": i, "heldout_loss": 3.0 - i / 10, "bits_per_byte": 1.5} for i in (0, 10))
    labels = [axes.get_ylabel() for axes in panels([{"event": "start"}, start, step, end])]
    assert labels == ["loss (nats per token)", "bits per byte"]
    assert panels([start, step, end])[0].get_legend().get_texts()[1].get_text() == "held-out: 3.000 → 2.000"
    dpo = [{**step, "reward_margin": 1.0, "reward_accuracy": 0.5}, {"step": 5, "heldout_reward_accuracy": 1.0}]
    labels = [axes.get_ylabel() for axes in panels(dpo)]
    assert labels == ["DPO loss (per pair)", "reward margin", "preference accuracy"]


def test_nothing_in_the_curves_covers_anything_else():
    names = ("loss", "bits_per_byte", "reward_margin", "reward_accuracy", "kl", "tag_obedience", "expert_entropy")
    records = [{"step": i, **{f"{part}{n}": i for part in ("", "heldout_") for n in names}} for i in (0, 100)]
    rows = panels(records)
    artists = [artist for axes in rows for artist in (axes.get_legend(), axes.yaxis.label, axes)]
    boxes = [artist.get_window_extent() for artist in artists]
    assert len(rows) == len(names)
    assert not any(a.overlaps(b.padded(-2)) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_lines_fit_the_terminal(columns, tmp_path, capsys, monkeypatch):
    """Those of steps need up to 120 columns, held-out figures and samples no more than there are."""
    monkeypatch.setenv("COLUMNS", str(columns))
    report = Report(toy_run(), toy_args(tmp_path), "log", total_steps=12 * 44_160)
    meter = Meter()
    meter.add(numbers(12.3456))
    meter.started -= 1e-3
    report.log_step(Progress(step=44_159), Place(1, 12, 44_159, 44_160), 1.5e-3, meter)
    report.heldout(44_160, {f"heldout_some_figure_{i}": -123.4567 for i in range(9)})
    report.samples([("问" * 200, "答\n\n\x1b[31m" + "a" * 300), ("\n" * 64, "")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Epoch:[1/12](44159/44160) loss:12.346 lr:1.5e-03 epoch_Time:0.0min: ")
    widths = [sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) for line in lines]
    assert widths[0] <= 120 and max(widths[1:]) <= min(columns, 120)
    assert len(lines) >= 1 + 3 + 4 and "\x1b" not in "".join(lines)


def test_a_line_reaches_a_file_at_once(tmp_path):
    """With `> train.log` the lines lay in Python's buffer, 8 KB of them, until the run was nearly over."""
    with open(tmp_path / "train.log", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        Report(toy_run(), toy_args(tmp_path), "log", total_steps=1).line("Epoch")
        assert (tmp_path / "train.log").read_text() == "Epoch\n"


def test_a_sample_keeps_its_beginning_and_its_end():
    assert one_line("<think>\n想\n</think>\n好", columns=80) == "<think> 想 </think> 好"
    assert one_line("ab" * 10, columns=20) == "ab" * 10
    for text in ("0123456789" * 3, "零一二三四五六七八九" * 3):
        cut = one_line(text, columns=20)
        head, tail = cut.split(" … ")
        assert text.startswith(head) and text.endswith(tail) and head and tail
        assert sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in cut) in (19, 20)


def test_a_line_cut_off_by_a_kill_and_repeated_steps(tmp_path):
    log = tmp_path / "a.jsonl"
    log.write_text('{"step": 10, "loss": 3}\n{"step": 20, "loss": 2}\n{"step": 3\n{"step": 20, "loss": 2.5}\n')
    records = read_log(log)
    assert len(records) == 3 and series(records, "loss") == [(10, 3), (20, 2.5)]


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    report = Report(toy_run(), toy_args(tmp_path), "log", total_steps=1)
    report.path = Path("/dev/full")
    for _ in range(3):
        report.record({"step": 1, "loss": 2.0})
    assert capsys.readouterr().out.count("the log cannot be written") == 1


def test_other_ranks_write_nothing(tmp_path, capsys):
    run = toy_run()
    run.rank = 1
    report = Report(run, toy_args(tmp_path), "log", total_steps=1)
    report.line("x")
    report.record({"step": 1})
    report.step_done()
    report.plot()
    report.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


# Trackers


class FakePackage:
    """Stands for wandb, swanlab and torch's SummaryWriter, which are not installed everywhere: notes every call."""

    def __init__(self):
        self.calls, self.id = [], "made-up-id"

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def finish(self):
        self.calls.append(("finish",))

    close = finish


@pytest.mark.parametrize("name", ["wandb", "swanlab", "tensorboard"])
def test_a_tracker_receives_what_the_log_receives(name, tmp_path, monkeypatch):
    fake = FakePackage()
    monkeypatch.setattr("training.cli.is_installed", lambda package: True)
    if name == "tensorboard":
        module = types.SimpleNamespace(SummaryWriter=lambda folder: fake.init(folder=folder))
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    else:
        monkeypatch.setitem(sys.modules, name, fake)
    flags = ["--tracker", name, "--wandb_project", "P", "--wandb_run_name", "R"]
    toy_train(tmp_path, "--max_steps", "4", "--log_interval", "2", *flags)
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    received = [(call[1], call[2]["loss"]) for call in fake.calls if call[0] == "log" and "loss" in call[2]]
    assert received == series(read_log(log), "loss") and len(received) == 3
    options = fake.calls[0][1]
    if name == "tensorboard":
        assert options["folder"] == tmp_path / "logs" / "tensorboard" / log.stem
    else:
        assert options["project"] == "P" and "R" in options.values() and options["config"]["max_steps"] == 4
    assert fake.calls[-1] == ("finish",)


def test_wandb_continues_the_run_of_the_saved_id(tmp_path, monkeypatch):
    fake = FakePackage()
    monkeypatch.setattr("training.cli.is_installed", lambda package: True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for run_id in (None, "abc"):
        assert start_tracker(toy_run(), toy_args(tmp_path, "--use_wandb"), "log", run_id).id == "made-up-id"
    first, second = (call[1] for call in fake.calls)
    assert (first["id"], first["resume"], first["name"]) == (None, None, "log")
    assert (second["id"], second["resume"]) == ("abc", "allow")


def test_a_continued_run_goes_on_with_the_same_tracker_run(tmp_path, monkeypatch):
    started = []

    class Recording(NoTracker):
        id = "abc123"

    def start(run, args, name, run_id=None):
        started.append((name, run_id))
        return Recording()

    monkeypatch.setattr("training.loop.start_tracker", start)
    with pytest.raises(SystemExit):
        toy_train(tmp_path, loss_fn=interrupt_at(3))
    toy_train(tmp_path, "--resume")
    assert started == [(started[0][0], None), (started[0][0], "abc123")]


def test_no_tracker_by_default_and_on_other_ranks(tmp_path):
    run, args = toy_run(), toy_args(tmp_path)
    assert isinstance(start_tracker(run, args, "x"), NoTracker)
    run.rank, args.tracker = 1, "wandb"
    assert isinstance(start_tracker(run, args, "x"), NoTracker)


# Watching


def test_numbers_are_read_once_and_wishes_are_remembered(tmp_path):
    watch = make_watch(tmp_path)
    watch.read()
    watch.put(lambda: numbers(stop=1.0))
    assert not watch.stop
    watch.read()
    watch.read()
    assert watch.stop and not watch.save_due and watch.progress.tokens == 12
    read(watch, save=2.0)
    assert watch.stop and watch.save_due


def feed(watch: Watch, losses) -> None:
    for loss in losses:
        read(watch, loss=loss)


def test_a_spike_of_ten_sigma_that_stays_is_told_once_and_counted(tmp_path, capsys):
    watch, rng = make_watch(tmp_path), np.random.default_rng(0)
    losses = (3 + 0.1 * rng.standard_normal(200)).tolist()
    feed(watch, losses)
    assert watch.progress.spikes == 0 and "spike" not in capsys.readouterr().out
    recent = [float(np.float32(loss)) for loss in losses[-128:]]
    mean, sigma = statistics.fmean(recent), statistics.pstdev(recent)
    for height, count in ((8, 0), (15, 1)):
        feed(watch, [mean + height * sigma] * 5 + losses[:30])
        assert watch.progress.spikes == count
    lines = capsys.readouterr().out.splitlines()
    assert "loss spike, 3 steps in a row" in lines[0] and all(len(line) <= 120 for line in lines)


def test_spikes_do_not_hide_each_other(tmp_path):
    """With mean and standard deviation, three outliers in the window made the next ones look ordinary."""
    watch, rng = make_watch(tmp_path), np.random.default_rng(0)
    ordinary = iter(3 + 0.1 * rng.standard_normal(200))
    feed(watch, itertools.islice(ordinary, 100))
    for _ in range(6):
        feed(watch, [20.0, 19.0, 18.0, *itertools.islice(ordinary, 10)])
    assert watch.progress.spikes == 6


def test_an_unusual_batch_is_no_spike(tmp_path):
    """Fine-tuning on the sample told of 16 in 1,875 healthy steps: batches with the few long programs among it."""
    watch, rng = make_watch(tmp_path), np.random.default_rng(0)
    for step, loss in enumerate(3 + 0.1 * rng.standard_normal(160)):
        feed(watch, [20.0 if step % 10 in (0, 1) else loss])
    assert watch.progress.spikes == 0


@pytest.mark.parametrize("harmed", ["batch", "weights"])
def test_only_what_harms_the_model_is_a_spike(harmed, tmp_path, capsys):
    """Six batches of random targets, from which one step learns little; or weights that are pushed away once."""
    steps, rng = itertools.count(1), torch.Generator().manual_seed(0)

    def loss_fn(model, batch):
        step = next(steps)
        if harmed == "batch" and step >= 100 and step % 20 == 0:
            batch["targets"] = torch.randint(VOCAB, batch["targets"].shape, generator=rng)
        elif harmed == "weights" and step == 150:
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.3 * torch.randn(weight.shape, generator=rng)
        return next_token_loss(model, batch)

    toy_train(tmp_path, "--epochs", "20", "--max_steps", "215", "--learning_rate", "1e-2", loss_fn=loss_fn)
    assert ("loss spike" in capsys.readouterr().out) == (harmed == "weights")


def test_no_spike_is_told_before_there_is_something_to_compare_with(tmp_path):
    watch = make_watch(tmp_path)
    feed(watch, [3.0] * (SPIKE_MIN - 3) + [30.0] * 5)
    assert watch.progress.spikes == 0


def test_five_skipped_steps_in_a_row_are_failing_four_are_not(tmp_path):
    watch = make_watch(tmp_path)
    for skipped in (1, 1, 1, 1, 0, 1, 1, 1, 1):
        read(watch, skipped=skipped)
        assert not watch.is_failing
    read(watch, skipped=1)
    assert watch.is_failing and watch.progress.skipped == 9
