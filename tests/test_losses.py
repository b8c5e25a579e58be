"""Losses against naive formulas. They are sums over a micro-batch, with the weight to divide by."""

import numpy as np
import pytest
import torch
from toy import VOCAB, toy_model, toy_sequences

from training import losses
from training.losses import balance_loss, next_token_loss, supervised_per_row, token_nll


def naive_loss(model, sequences, ids) -> float:
    """Each sequence alone, each token alone, in float64 after the logits."""
    total = 0.0
    for i in ids:
        start, length = int(sequences.starts[i]), int(sequences.lengths[i])
        row = torch.from_numpy(sequences.tokens[start : start + length + 1].astype(np.int64))
        logits = model(row[None, :-1]).logits[0].double()
        for t in range(length):
            total -= torch.log_softmax(logits[t], -1)[row[t + 1]].item()
    return total


def test_next_token_loss_is_the_sum_of_every_tokens_nll():
    model, sequences, ids = toy_model().eval(), toy_sequences(), np.array([3, 7, 11, 20])
    loss, weight, metrics = next_token_loss(model, sequences.collate(ids))
    assert weight == sequences.lengths[ids].sum()
    assert loss.item() == pytest.approx(naive_loss(model, sequences, ids), rel=1e-5)
    assert metrics["nll"].item() == pytest.approx(loss.item()) and metrics.keys() == {"nll"}


@pytest.mark.parametrize("use_moe", [False, True])
def test_padding_never_matters(use_moe):
    model = toy_model(use_moe=use_moe, aux_loss_alpha=0.1).eval()
    sequences, ids = toy_sequences(), np.array([3, 7, 11])
    batch = sequences.collate(ids)
    rows, width = batch["input_ids"].shape
    b, t = batch["positions"] // width, batch["positions"] % width
    wider = {**batch, "input_ids": torch.full((rows, width + 9), VOCAB - 1)}
    wider["input_ids"][:, :width] = batch["input_ids"]
    for row, length in enumerate(batch["lengths"]):
        wider["input_ids"][row, length:] = VOCAB - 1
    wider["positions"] = b * (width + 9) + t
    for a, b in zip(next_token_loss(model, batch)[:2], next_token_loss(model, wider)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 8, 21])
def test_token_nll_is_cross_entropy_whatever_the_chunks(dtype, count, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 8)
    ours = (5 * torch.randn(count, 50)).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    targets, factors = torch.randint(50, (count,)), torch.randn(count)
    nll = token_nll(ours, targets)
    expected = torch.nn.functional.cross_entropy(theirs.float(), targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    (nll * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_batch_without_supervised_tokens_gives_zero_and_no_nan():
    model = toy_model(use_moe=True, aux_loss_alpha=0.1)
    batch = toy_sequences().collate(np.arange(3))
    nothing = torch.zeros(0, dtype=torch.int64)
    loss, weight, _ = next_token_loss(model, {**batch, "positions": nothing, "targets": nothing})
    loss.backward()
    assert loss == 0 and weight == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_moe_balance_loss_is_weighted_by_tokens_not_by_batches():
    """Two micro-batches of different size add up to the loss of both rows together."""
    model = toy_model(use_moe=True, aux_loss_alpha=0.5).eval()
    sequences = toy_sequences()
    parts = [next_token_loss(model, sequences.collate(np.array(ids))) for ids in ([3, 7], [11], [20, 21, 22])]
    whole = next_token_loss(model, sequences.collate(np.array([3, 7, 11, 20, 21, 22])))
    assert sum(p[0] for p in parts).item() == pytest.approx(whole[0].item(), rel=1e-5)
    assert sum(p[2]["aux_loss"] for p in parts).item() == pytest.approx(whole[2]["aux_loss"].item(), rel=1e-5)
    assert whole[2]["aux_loss"] > 0


def test_balance_loss_and_rows():
    batch = {"input_ids": torch.zeros(3, 4), "positions": torch.tensor([0, 1, 8, 9, 11])}
    assert supervised_per_row(batch).tolist() == [2, 0, 3]
    assert balance_loss(torch.tensor([1.0, 10.0, 100.0]), batch) == 302


def test_token_nll_is_float32_whatever_the_logits_are():
    logits, targets = torch.randn(5, VOCAB, dtype=torch.bfloat16), torch.arange(5)
    expected = -torch.log_softmax(logits.double(), -1)[torch.arange(5), targets]
    nll = token_nll(logits, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
