"""Broken weights never replace good ones, of this run or of an earlier one, and such a run never ends as done."""

import pytest
import torch
from test_checkpoint import Immediately
from test_loop import states
from toy import toy_model, toy_run, toy_sequences, toy_train

from training.guard import MAX_WEIGHT, WeightGuard
from training.losses import next_token_loss


def everything(out) -> dict:
    return {path: path.read_bytes() for path in out.rglob("*.pt*")}


def explode(monkeypatch, lr: float) -> None:
    """The flags allow no more than 1, which is enough in most stages (tests/test_stages.py)."""
    monkeypatch.setattr("training.loop.lr_at", lambda *args: lr)


@pytest.mark.parametrize(
    ("lr", "flags"),
    [(1e6, ""), (1e6, "--save_interval 1"), (1e39, "--max_steps 3"), (10.0, "--max_steps 1"),
     (1e4, "--max_steps 2 --grad_clip 0")],
)  # fmt: skip
def test_an_exploded_run_leaves_an_earlier_ones_files_alone(lr, flags, tmp_path, capsys, monkeypatch):
    toy_train(tmp_path, "--max_steps", "12", "--save_interval", "4")
    before = everything(tmp_path)
    explode(monkeypatch, lr)
    with pytest.raises(SystemExit, match="this run is broken(.|\n)*The earlier run's .* is as it was(.|\n)*below 0"):
        toy_train(tmp_path, *flags.split())
    assert everything(tmp_path) == before
    assert "!!! NOT SAVED at step" in (out := capsys.readouterr().out) and "done" not in out.splitlines()[-1]


def test_nothing_is_left_of_a_run_that_exploded_at_once(tmp_path, monkeypatch):
    explode(monkeypatch, 1e6)
    with pytest.raises(SystemExit, match="Nothing was saved so far"):
        toy_train(tmp_path)
    assert not everything(tmp_path)


@pytest.mark.parametrize("factor", [float("nan"), 1e4, -30.0])
def test_the_last_good_weights_of_a_run_are_kept_and_said(factor, tmp_path, monkeypatch):
    monkeypatch.setattr("training.saver.ThreadPoolExecutor", Immediately)

    def breaks_in_step_12(model, batch):
        breaks_in_step_12.step += torch.is_grad_enabled()
        if breaks_in_step_12.step == 12:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(factor)
        return next_token_loss(model, batch)

    breaks_in_step_12.step = 0
    toy_train(tmp_path / "good", "--save_interval", "5", "--max_steps", "10", "--lr_schedule", "constant")
    flags = ["--save_interval", "5", "--max_steps", "60", "--lr_schedule", "constant"]
    with pytest.raises(SystemExit, match="holds the weights after step 10, .* the state after step 10(.|\n)*--from_"):
        toy_train(tmp_path / "broken", *flags, loss_fn=breaks_in_step_12)
    good, kept = (torch.load(tmp_path / name / "toy_16.pth", weights_only=True) for name in ("good", "broken"))
    assert all(torch.equal(good[name], kept[name]) for name in good)
    assert len(states(tmp_path / "broken")) == 2
    assert breaks_in_step_12.step < 30, "the run ends instead of going on broken"


def make_guard(model) -> WeightGuard:
    return WeightGuard(toy_run(), model, toy_sequences())


def test_what_training_does_to_weights_is_no_problem():
    model = toy_model()
    guard = make_guard(model)
    assert guard.problem(model) == "" and guard.problem(toy_model(seed=5)) == ""
    for parameter in model.parameters():
        parameter.data *= 2
    assert guard.problem(model) == "", "a wild start"
    assert model.training


def test_every_kind_of_broken_weights_is_named():
    guard = make_guard(toy_model())
    for value, message in ((float("nan"), "weight is nan"), (float("inf"), "weight is inf"), (2e4, "weight is 2e+04")):
        model = toy_model()
        model.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
        assert message in guard.problem(model)
    model = toy_model()
    model.lm_head.weight.data *= 0.9 * MAX_WEIGHT / model.lm_head.weight.abs().max()
    assert "nats per token more" in guard.problem(model)


def test_large_weights_to_start_from_are_no_problem():
    model = toy_model()
    model.model.layers[0].mlp.up_proj.weight.data[3, 2] = 3 * MAX_WEIGHT
    assert make_guard(model).problem(model) == ""


def test_rejected_answers_may_become_unlikely(monkeypatch):
    """Half of DPO's rows, as many as it likes; one chosen answer more is one too many."""
    guard = make_guard(toy_model())
    for unlikely, is_problem in ((4, False), (5, True)):
        rise = torch.tensor([0.0] * (8 - unlikely) + [50.0] * unlikely)
        monkeypatch.setattr(guard, "_nll", lambda model, rise=rise: guard._before + rise)
        assert bool(guard.problem(toy_model())) == is_problem
