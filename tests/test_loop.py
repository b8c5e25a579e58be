"""The training loop: what a step is, what is logged and saved, and that an interrupted run continues exactly."""

import itertools
import math
import os
import re
import signal
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from toy import largest_difference, same_weights, toy_model, toy_run, toy_sequences, toy_train

from dataset.batching import plan_batches, tokens_per_batch
from training.checkpoint import Progress, list_states
from training.curves import read_log
from training.loop import add_gradients, count_steps
from training.losses import next_token_loss
from training.optim import make_optimizer
from training.source import Place, PlannedBatches
from training.stats import StepStats
from training.updater import Updater

UPSTREAM_LINE = re.compile(r"Epoch:\[\d+/\d+\]\(\d+/\d+\) loss:[\d.]+ lr:\d\.\de-\d\d epoch_Time:[\d.]+min:")


def states(out_dir):
    return list_states(out_dir / "checkpoints" / "toy_16")


def records(out_dir):
    return [record for path in sorted((out_dir / "logs").glob("*.jsonl")) for record in read_log(path)]


def interrupt_at(step: int, number: int = signal.SIGTERM):
    """next_token_loss that sends this process a signal in the forward pass of a step (one micro-batch a step)."""
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += model.training and torch.is_grad_enabled()
        if calls == step and model.training:
            os.kill(os.getpid(), number)
        return next_token_loss(model, batch)

    return loss_fn


# Steps


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_step_does_not_depend_on_how_it_is_cut_into_micro_batches(use_moe):
    """8 x 1 == 4 x 2 == 3 + 3 + 2 sequences: the mean over all tokens of the step (upstream T4, T6)."""
    sequences, results = toy_sequences(), []
    for cuts in ([1] * 8, [2] * 4, [3, 3, 2], [8]):
        run, model = toy_run(), toy_model(use_moe=use_moe, aux_loss_alpha=0.1)
        updater, stats = Updater(run, model, make_optimizer(model, 1e-3, 0.1), scale=0.01), StepStats(run)
        for first in (0, 8, 16):
            ids = np.split(np.arange(first, first + 8), np.cumsum(cuts)[:-1])
            stats.begin()
            add_gradients(run, updater, next_token_loss, map(sequences.collate, ids), stats)
            updater.step(stats, lr=1e-3)
        results.append(model.state_dict())
    assert max(largest_difference(results[0], other) for other in results[1:]) < 1e-6


def test_a_step_without_supervised_tokens_leaves_a_finite_model():
    run, model = toy_run(), toy_model()
    updater, stats = Updater(run, model, make_optimizer(model, 1e-3, 0.1)), StepStats(run)
    batch = toy_sequences().collate(np.arange(3))
    empty = {**batch, "positions": batch["positions"][:0], "targets": batch["targets"][:0]}
    add_gradients(run, updater, next_token_loss, [empty], stats)
    updater.step(stats, lr=1e-3)
    assert stats["grad_norm"] == 0 and stats["skipped"] == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Numbered(PlannedBatches):
    """Two epochs of 7 micro-batches, which are the numbers 0 to 6, then 10 to 16."""

    def __init__(self, window: int, rank: int = 0, world_size: int = 1, prefetched: int = 0):
        run = toy_run()
        run.rank, run.world_size = rank, world_size
        units = SimpleNamespace(lengths=None, collate=lambda ids: int(ids[0]))
        super().__init__(
            run, units, 0, epochs=2, accumulation_steps=window // world_size, seed=0, prefetched=prefetched
        )

    def plan(self, epoch: int) -> list[np.ndarray]:
        return [np.array([10 * epoch + i]) for i in range(7)]


ALL_BATCHES = [*range(7), *range(10, 17)]


@pytest.mark.parametrize("prefetched", [0, 1, 4])
def test_every_sequence_is_trained_on_once_per_epoch_on_any_number_of_ranks(prefetched):
    for world_size in (1, 2, 3):
        seen = []
        for rank in range(world_size):
            source = Numbered(2 * world_size, rank, world_size, prefetched)
            for micro_batches in source:
                seen += micro_batches
        assert sorted(seen) == ALL_BATCHES


def test_the_place_in_the_data_survives_a_change_of_the_number_of_processes():
    """A run of 2 processes continues with 4, and the other way round: nothing twice, nothing left out."""
    for first, second in ((2, 4), (4, 2), (1, 7), (7, 1)):
        for stop in range(1, 2 * math.ceil(7 / first)):
            before, after, seen = Numbered(first), Numbered(second), []
            for micro_batches in itertools.islice(before, stop):
                seen += micro_batches
            after.load_state(before.state())
            progress = Progress(step=stop)
            total = count_steps(after, progress)
            remaining = [list(micro_batches) for micro_batches in after]
            assert sorted(sum(remaining, seen)) == ALL_BATCHES
            assert progress.step + len(remaining) == total


def test_count_steps_keeps_the_step_of_an_unchanged_run():
    for step, (epoch, next_batch) in enumerate([(0, 0), (0, 3), (0, 6), (0, 9), (1, 3), (1, 6), (1, 9)]):
        source, progress = Numbered(3), Progress(step=-1)
        source.load_state({"epoch": epoch, "next_batch": next_batch})
        assert count_steps(source, progress) == 6
        assert progress.step == step
        assert source.place() == Place(epoch + 1, 2, step - 3 * epoch, 3)


def test_the_budget_holds_the_longest_sequence():
    assert tokens_per_batch(4, np.array([10, 10, 10])) == 40
    assert tokens_per_batch(1, np.array([10, 500])) >= 504


def test_an_epoch_is_planned_when_it_begins(tmp_path):
    """The plans of a million epochs before the first step would take hours."""
    with patch("training.source.plan_batches", wraps=plan_batches) as planned:
        toy_train(tmp_path, "--epochs", "1000000", "--max_steps", "2")
    assert planned.call_count < 5


# Saving and logging


def test_a_run_shorter_than_every_interval_is_saved_and_logged(tmp_path, capsys):
    """Upstream T3: data of fewer steps than --save_interval was never saved."""
    model = toy_train(tmp_path, "--max_steps", "2", "--save_interval", "100", "--log_interval", "100")
    saved = torch.load(tmp_path / "toy_16.pth", weights_only=True)
    assert same_weights(saved, model.state_dict()) and len(states(tmp_path)) == 1
    assert UPSTREAM_LINE.search(capsys.readouterr().out)


def test_max_steps_and_epochs_bound_the_run(tmp_path):
    toy_train(tmp_path / "a", "--max_steps", "3")
    assert max(r["step"] for r in records(tmp_path / "a") if "step" in r) == 3
    toy_train(tmp_path / "b", "--epochs", "1", "--accumulation_steps", "100")
    assert max(r["step"] for r in records(tmp_path / "b") if "step" in r) == 1


def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_window(tmp_path):
    """Upstream T6 divided by the accumulation steps, and T7 logged the last micro-batch only."""
    sums = []

    def noting(model, batch):
        loss, weight, metrics = next_token_loss(model, batch)
        sums.append((loss.item(), float(weight)))
        return loss, weight, metrics

    toy_train(tmp_path, "--max_steps", "4", "--accumulation_steps", "3", "--log_interval", "2", loss_fn=noting)
    logged = [r["loss"] for r in records(tmp_path) if "loss" in r]
    windows = (sums[:3], sums[3:6], sums[6:12])  # the first step, which is told at once; up to step 2; up to step 4
    for window, value in zip(windows, logged, strict=True):
        losses, weights = zip(*window, strict=True)
        assert value == pytest.approx(sum(losses) / sum(weights), rel=1e-5)


def test_two_states_are_kept(tmp_path):
    toy_train(tmp_path, "--max_steps", "12", "--save_interval", "2")
    assert len(states(tmp_path)) == 2


def test_saving_by_minutes(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr("training.saver.write_state", lambda directory, state: saves.append(state["progress"]["step"]))
    toy_train(tmp_path, "--max_steps", "12", "--save_minutes", "0.0000001")
    assert len(saves) > 2, "one at the end is not enough"


def test_eval_interval(tmp_path):
    toy_train(tmp_path, "--max_steps", "10", "--eval_interval", "4")
    assert [r["step"] for r in records(tmp_path) if "heldout_loss" in r] == [0, 4, 8, 10]


def test_the_first_looks_at_a_run_come_at_growing_intervals(tmp_path):
    toy_train(tmp_path, "--max_steps", "64", "--epochs", "9", "--eval_interval", "60", "--log_interval", "30")
    assert [r["step"] for r in records(tmp_path) if "heldout_loss" in r] == [0, 10, 20, 50, 60, 64]
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 10, 20, 30, 60, 64]


def test_an_early_look_at_a_large_held_out_set_on_a_cpu_shows_samples_only(tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.QUICK_TOKENS", 10)
    monkeypatch.setattr("training.evaluation.Evaluation.answers", lambda self, model: [("question", "a\n\nb")])
    answers = []
    monkeypatch.setattr("training.report.Report.samples", lambda self, samples: answers.append(samples))
    toy_train(tmp_path, "--max_steps", "12", "--eval_interval", "20")
    assert [r["step"] for r in records(tmp_path) if "heldout_loss" in r] == [12] and len(answers) == 3


def test_a_first_step_that_takes_long_is_told_in_its_middle_and_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.report.FIRST_LINE", -1.0)  # "long" is anything
    toy_train(tmp_path, "--max_steps", "2", "--accumulation_steps", "3", "--log_interval", "100")
    lines = [line for line in capsys.readouterr().out.splitlines() if UPSTREAM_LINE.match(line)]
    assert [re.search(r"\((\d+)/", line).group(1) for line in lines] == ["0", "1", "2"]


def test_a_warm_up_longer_than_the_run_is_told_loudly(tmp_path, capsys):
    """`--warmup_iters 1000000` trained next to nothing without a word."""
    toy_train(tmp_path / "a", "--max_steps", "4", "--warmup_iters", "1000000")
    assert "!!! --warmup_iters 1000000: the run has 4 steps" in capsys.readouterr().out
    toy_train(tmp_path / "b", "--max_steps", "4", "--warmup_iters", "3")
    assert "!!!" not in capsys.readouterr().out


def test_training_learns(tmp_path):
    toy_train(tmp_path, "--epochs", "12", "--learning_rate", "1e-2", dropout=0.0)
    losses = [r["loss"] for r in records(tmp_path) if "loss" in r]
    assert losses[0] > 3.5 and losses[-1] < 2


# Trouble


def test_persistent_nan_stops_the_run_with_the_last_good_weights(tmp_path, capsys):
    good = {}

    def turning_bad(model, batch):
        loss, weight, metrics = next_token_loss(model, batch)
        turning_bad.step += 1
        if turning_bad.step == 4:
            good.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return loss * (float("nan") if turning_bad.step >= 4 else 1.0), weight, metrics

    turning_bad.step = 0
    with pytest.raises(SystemExit, match="--learning_rate below 0.0005"):
        toy_train(tmp_path, loss_fn=turning_bad)
    assert 8 <= turning_bad.step <= 9, "five steps in a row, read at most one step late"
    assert same_weights(torch.load(tmp_path / "toy_16.pth", weights_only=True), good)
    assert "update skipped (5 so far)" in capsys.readouterr().out


def test_a_single_bad_step_is_skipped_and_counted(tmp_path):
    def once_bad(model, batch):
        loss, weight, metrics = next_token_loss(model, batch)
        once_bad.step += 1
        return loss * (float("inf") if once_bad.step == 4 else 1.0), weight, metrics

    once_bad.step = 0
    model = toy_train(tmp_path, "--max_steps", "10", loss_fn=once_bad)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert records(tmp_path)[-1]["step"] == 10
    logged = [r for r in records(tmp_path) if "loss" in r]
    assert logged[-1]["skipped"] == 1 and all(np.isfinite(r["loss"]) for r in logged)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("log_interval", ["1", "5"])
def test_a_signal_saves_says_how_to_continue_and_loses_nothing(name, log_interval, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_toy.py", "--dim", "16"])
    flags = ["--log_interval", log_interval]
    straight = toy_train(tmp_path / "straight", *flags)
    number = getattr(signal, name)
    with pytest.raises(SystemExit) as stopped:
        toy_train(tmp_path / "stopped", *flags, loss_fn=interrupt_at(7, number))
    assert stopped.value.code == 128 + number
    out = capsys.readouterr().out
    assert re.search(r"stopped after step [78] of", out) and "train_toy.py --dim 16 --resume" in out
    resumed = toy_train(tmp_path / "stopped", *flags, "--resume", model=toy_model(seed=9, dropout=0.1))
    assert same_weights(resumed.state_dict(), straight.state_dict())
    assert same_weights(torch.load(tmp_path / "stopped/toy_16.pth", weights_only=True), straight.state_dict())


def test_stopping_at_every_step_and_resuming_is_bit_identical(tmp_path):
    """Weights, AdamW moments, schedule, place in the plan and dropout: all continue (upstream T1)."""
    flags = ["--epochs", "1", "--accumulation_steps", "3", "--warmup_iters", "3"]
    straight = toy_train(tmp_path / "straight", *flags)
    broken = tmp_path / "broken"
    for attempt in range(100):
        try:
            loss_fn = interrupt_at(1 if attempt % 2 else 4)
            model = toy_train(broken, *flags, "--resume", "auto", model=toy_model(dropout=0.1), loss_fn=loss_fn)
            break
        except SystemExit as stopped:
            assert stopped.code == 128 + signal.SIGTERM
    assert attempt > 2
    assert same_weights(model.state_dict(), straight.state_dict())


def test_a_finished_run_is_not_continued(tmp_path, capsys):
    before = toy_train(tmp_path, "--max_steps", "3").state_dict()
    after = toy_train(tmp_path, "--max_steps", "3", "--resume").state_dict()
    assert "already complete" in capsys.readouterr().out and same_weights(before, after)


def test_evaluating_and_the_memory_estimate_do_not_change_the_result(tmp_path):
    a = toy_train(tmp_path / "a", "--max_steps", "6")
    b = toy_train(tmp_path / "b", "--max_steps", "6", "--eval_interval", "4", "--save_interval", "1")
    assert same_weights(a.state_dict(), b.state_dict())
