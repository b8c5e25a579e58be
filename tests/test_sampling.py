"""inference/sampling.py: parity with transformers' logits processors, and the properties that sampling promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.sampling import (
    SamplingParams,
    draw,
    keep_top_k,
    keep_top_p,
    make_generator,
    penalize_repetition,
    sample,
    tokens_seen,
)

B, V = 5, 97


def random_logits(seed: int = 0, rows: int = B) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def random_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, 20), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits, ids = random_logits(), random_ids()
    ours = penalize_repetition(logits, tokens_seen(ids, torch.ones_like(ids), V), penalty)
    torch.testing.assert_close(ours, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()))


def test_penalty_lowers_the_probability_of_a_seen_token_with_a_negative_logit():
    """Upstream G4: dividing a negative logit raises it."""
    logits = torch.tensor([[-2.0, 1.0, 0.5]])
    seen = torch.tensor([[True, False, False]])
    before, after = logits.softmax(-1), penalize_repetition(logits, seen, 1.5).softmax(-1)
    assert after[0, 0] < before[0, 0]


def test_each_row_has_its_own_penalty_history():
    """Upstream G4: row 0's tokens were penalised in all rows."""
    ids = torch.tensor([[1, 2], [3, 3]])
    seen = tokens_seen(ids, torch.ones_like(ids), 5)
    assert seen.tolist() == [[False, True, True, False, False], [False, False, False, True, False]]


def test_padding_is_not_seen_even_where_its_id_also_occurs():
    ids, mask = torch.tensor([[0, 0, 4], [0, 4, 0]]), torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert tokens_seen(ids, mask, 5).tolist() == [[False] * 4 + [True], [True] + [False] * 3 + [True]]


@pytest.mark.parametrize("k", [1, 2, 10, V, V + 5])
def test_top_k_equals_transformers(k):
    logits = random_logits()
    torch.testing.assert_close(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.85, 0.99])
def test_top_p_equals_transformers(p):
    for seed in range(20):
        logits = random_logits(seed)
        torch.testing.assert_close(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=30),
    p=st.floats(0.01, 0.999),
)
@settings(deadline=None, max_examples=200)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits, p):
    logits = torch.tensor([logits])
    probs = logits.double().softmax(-1)[0]
    kept = torch.isfinite(keep_top_p(logits, p))[0]
    assert kept.any()
    assert probs[kept].sum() >= p - 1e-5
    assert probs[kept].sum() - probs[kept].min() < p + 1e-5  # without its least likely token it falls short
    if not kept.all():
        assert probs[kept].min() >= probs[~kept].max() - 1e-9


def test_the_whole_chain_equals_transformers():
    logits, ids = random_logits(), random_ids()
    expected = logits.clone()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
    ):
        expected = processor(ids, expected)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.2)
    rows, generator, seen = 400, make_generator(0, "cpu"), tokens_seen(ids, torch.ones_like(ids), V)
    for row in range(B):
        drawn = sample(logits[row].expand(rows, V), params, generator, seen[row].expand(rows, V))
        allowed = torch.isfinite(expected[row]).nonzero().squeeze(1)
        assert set(drawn.tolist()) <= set(allowed.tolist())
        likely = (expected[row].softmax(-1) > 0.05).nonzero().squeeze(1)  # missed with probability 0.95^400 < 2e-9
        assert set(likely.tolist()) <= set(drawn.tolist())


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log()
    rows = 40_000
    counts = draw(logits.expand(rows, 5), make_generator(1, "cpu")).bincount(minlength=5)
    assert counts[2] == 0
    # Five standard deviations of a share: 5 * sqrt(0.25 / 40000) = 0.0125.
    torch.testing.assert_close(counts / rows, logits.exp(), atol=0.0125, rtol=0)


@pytest.mark.parametrize("kept", [0, 3, V - 1])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])  # the ends of what torch.rand returns
def test_draw_never_leaves_the_kept_tokens(monkeypatch, kept, uniform):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, uniform))
    logits = torch.full((1, V), -torch.inf)
    logits[:, kept] = 1.0
    assert draw(logits, make_generator(2, "cpu")).tolist() == [kept]


def test_draw_stays_inside_the_vocabulary_whatever_the_rounding(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, 1 - 2**-24))
    for seed in range(50):
        assert draw(random_logits(seed), make_generator(0, "cpu")).max() < V


def test_temperature_zero_is_greedy():
    """Upstream G5: dividing by 1e-9 overflowed in half precision."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (random_logits() * 1000).to(dtype)
        tokens = sample(logits, SamplingParams(temperature=0), make_generator(0, "cpu"))
        assert torch.equal(tokens, logits.argmax(-1))


def test_greedy_still_honours_the_repetition_penalty():
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample(logits, params, make_generator(0, "cpu"), torch.tensor([[True, False, False]])).tolist() == [1]


def test_equal_seeds_give_equal_tokens_whoever_else_draws():
    logits, params = random_logits(rows=64), SamplingParams(temperature=1.0, top_p=1.0)
    first = sample(logits, params, make_generator(7, "cpu"))
    torch.rand(100)
    assert torch.equal(first, sample(logits, params, make_generator(7, "cpu")))
    assert not torch.equal(first, sample(logits, params, make_generator(8, "cpu")))
    assert not torch.equal(*(sample(logits, params, make_generator(None, "cpu")) for _ in range(2)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -3}, "top_k is -3"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_values_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**values)


def test_all_impossible_values_are_reported_at_once():
    with pytest.raises(ValueError, match="top_p is 2.*top_k is -1"):
        SamplingParams(top_p=2, top_k=-1)
