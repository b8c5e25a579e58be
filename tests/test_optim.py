"""Parameter groups, learning rate, clipping, and steps that must change nothing."""

import math

import pytest
import torch
from toy import toy_model

from training.optim import clip_and_step, lr_at, make_optimizer


def filled(model, value: float = 0.1):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return model


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def test_norms_and_embedding_are_not_decayed():
    model = toy_model()
    optimizer = make_optimizer(model, 1e-3, weight_decay=0.1)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decays = {name: decay_of[id(p)] for name, p in model.named_parameters()}
    assert decays.pop("model.embed_tokens.weight") == 0
    for name, decay in decays.items():
        assert decay == (0 if "norm" in name else 0.1), name
    assert len(decay_of) == len(list(model.parameters())), "every parameter is in exactly one group"


def test_frozen_parameters_are_left_out():
    model = toy_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("q_proj.weight")
    optimizer = make_optimizer(model, 1e-3, 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_cosine_schedule_at_first_peak_and_last_step():
    rates = [lr_at(step, 100, 1.0, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)  # --warmup_iters works (upstream T15)
    assert max(rates) == pytest.approx(1.0) and rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:-1], rates[11:], strict=True))


def test_upstream_schedule_is_upstreams_formula():
    for step in (0, 1, 50, 99):
        expected = 5e-4 / 10 + 0.5 * 5e-4 * (1 + math.cos(math.pi * step / 99))
        assert lr_at(step, 100, 5e-4, schedule="upstream") == pytest.approx(expected)


def test_constant_schedule_and_runs_of_one_step():
    assert [lr_at(step, 3, 2.0, schedule="constant") for step in range(3)] == [2.0] * 3
    assert lr_at(0, 1, 1.0) == pytest.approx(1.0)
    assert lr_at(0, 1, 1.0, warmup=5) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="zigzag"):
        lr_at(1, 10, 1.0, schedule="zigzag")


def test_a_step_equals_plain_adamw():
    ours, theirs = filled(toy_model()), filled(toy_model())
    optimizer = make_optimizer(ours, 1e-2, weight_decay=0.0)
    norm, skipped = clip_and_step(optimizer, no_scaler(), torch.tensor(0.5), grad_clip=1.0)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for parameter in theirs.parameters():
        parameter.grad.mul_(0.5)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    reference.step()
    assert skipped == 0 and norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(poison, clip):
    """Upstream T13: one NaN was enough to destroy the weights."""
    model = filled(toy_model())
    optimizer = make_optimizer(model, 1e-2, 0.1)
    clip_and_step(optimizer, no_scaler(), torch.tensor(1.0), clip)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    filled(model).model.layers[0].mlp.up_proj.weight.grad[0, 0] = poison
    norm, skipped = clip_and_step(optimizer, no_scaler(), torch.tensor(1.0), clip)
    assert skipped == 1 and not math.isfinite(norm)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[i][name]) for name, value in entry.items())
    assert all(p.grad is None for p in model.parameters()), "the poisoned gradient must not leak into the next step"


def test_clipping_bounds_the_gradient_not_the_report():
    model = filled(toy_model(), 100.0)
    seen = []
    optimizer = make_optimizer(model, 0.0, 0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    )
    norm, _ = clip_and_step(optimizer, no_scaler(), torch.tensor(1.0), grad_clip=1.0)
    assert norm > 1000 and seen[0].item() == pytest.approx(1.0, rel=1e-4)
