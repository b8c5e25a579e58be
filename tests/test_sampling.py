"""inference/sampling.py: parity with transformers' logits processors, and the properties that sampling promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.sampling import (
    RowSampler,
    SamplingParams,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_presence,
    penalize_repetition,
)

B, V = 5, 97


def random_logits(seed: int = 0, rows: int = B) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def random_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, 20), generator=torch.Generator().manual_seed(seed))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def seen_in(ids: torch.Tensor, size: int = V) -> torch.Tensor:
    return torch.zeros(len(ids), size, dtype=torch.bool).scatter(1, ids, True)


def sample(logits, params: list[SamplingParams] | SamplingParams, prompts=None, made=()) -> torch.Tensor:
    """The next token of each row, after the tokens `made`, which other logits forced."""
    rows, size = logits.shape
    sampler = RowSampler(rows, size, "cpu")
    params = params if isinstance(params, list) else [params] * rows
    for row in range(rows):
        sampler.begin(row, params[row], [] if prompts is None else prompts[row], 30)
    for token in made:
        forced = torch.full((rows, size), -1e9)
        forced[:, token] = 1e9
        assert sampler.sample(forced, range(rows), slice(None)).tolist() == [token] * rows
    return sampler.sample(logits, range(rows), slice(None))


PENALTY = (0.5, 1.0, 1.3, 2.0, 1.1)  # one for each row


def test_repetition_penalty_equals_transformers_row_by_row():
    logits, ids = random_logits(), random_ids()
    ours = penalize_repetition(logits, seen_in(ids), column(*PENALTY))
    for row, penalty in enumerate(PENALTY):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids[row : row + 1], logits[row : row + 1].clone())
        torch.testing.assert_close(ours[row : row + 1], theirs)


def test_penalty_lowers_the_probability_of_a_seen_token_with_a_negative_logit():
    """Upstream G4: dividing a negative logit raises it."""
    logits = torch.tensor([[-2.0, 1.0, 0.5]])
    seen = torch.tensor([[True, False, False]])
    before, after = logits.softmax(-1), penalize_repetition(logits, seen, column(1.5)).softmax(-1)
    assert after[0, 0] < before[0, 0]


def test_presence_and_frequency_penalties_are_openais_formula():
    """mu_j - c_j * frequency - (c_j > 0) * presence, of the platform's documentation."""
    logits, ids = random_logits(), random_ids()[:, :6] % 10
    presence, frequency = (0.0, 1.0, 2.0, -1.0, 0.5), (0.5, 0.0, 2.0, 1.0, -2.0)
    counts = torch.stack([row.bincount(minlength=V) for row in ids]).float()
    ours = penalize_presence(logits, counts, column(*presence), column(*frequency))
    for row in range(B):
        for token in range(V):
            c = ids[row].tolist().count(token)
            expected = logits[row, token] - c * frequency[row] - float(c > 0) * presence[row]
            assert ours[row, token] == pytest.approx(expected.item(), abs=1e-6)


def test_presence_and_frequency_count_the_answer_and_repetition_the_prompt_too():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert sample(logits, SamplingParams(temperature=0, presence_penalty=1.5), [[0]]).tolist() == [0]
    assert sample(logits, SamplingParams(temperature=0, presence_penalty=1.5), [[0]], made=[0]).tolist() == [1]
    assert sample(logits, SamplingParams(temperature=0, frequency_penalty=0.6), [[0]], made=[0]).tolist() == [0]
    assert sample(logits, SamplingParams(temperature=0, frequency_penalty=0.6), [[0]], made=[0, 0]).tolist() == [1]
    assert sample(logits, SamplingParams(temperature=0, repetition_penalty=2), [[0]]).tolist() == [1]
    assert sample(logits, SamplingParams(temperature=0, repetition_penalty=4), [[0]], made=[1]).tolist() == [2]


def test_logit_bias_is_added_to_its_tokens_of_its_row():
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    params = [SamplingParams(temperature=0, logit_bias=bias) for bias in ({}, {0: -100}, {2: 5})]
    assert sample(logits, params).tolist() == [0, 1, 2]


def test_top_k_equals_transformers_row_by_row():
    logits, ks = random_logits(), (1, 2, 10, V, V + 5)
    ours = keep_top_k(logits, column(*ks), max(ks))
    for row, k in enumerate(ks):
        torch.testing.assert_close(ours[row : row + 1], TopKLogitsWarper(k)(None, logits[row : row + 1]))
    assert torch.equal(keep_top_k(logits, column(3, 0, 0, 0, 0), 3)[1:], logits[1:]), "0 keeps the row"


def test_top_p_equals_transformers_row_by_row():
    ps = (0.01, 0.3, 0.85, 0.99, 1.0)
    for seed in range(20):
        logits = random_logits(seed)
        ours = keep_top_p(logits, column(*ps))
        for row, p in enumerate(ps):
            expected = logits[row : row + 1] if p == 1 else TopPLogitsWarper(p)(None, logits[row : row + 1])
            torch.testing.assert_close(ours[row : row + 1], expected)


def test_min_p_equals_transformers_row_by_row():
    logits, ps = random_logits(), (0.0, 0.01, 0.1, 0.5, 1.0)
    ours = keep_min_p(logits, column(*ps))
    for row, p in enumerate(ps):
        torch.testing.assert_close(ours[row : row + 1], MinPLogitsWarper(p)(None, logits[row : row + 1]))


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=30),
    p=st.floats(0.01, 0.999),
)
@settings(deadline=None, max_examples=200)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits, p):
    logits = torch.tensor([logits])
    probs = logits.double().softmax(-1)[0]
    kept = torch.isfinite(keep_top_p(logits, column(p)))[0]
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
        MinPLogitsWarper(0.01),
    ):
        expected = processor(ids, expected)
    rows = 400
    for row in range(B):
        params = [
            SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.01, repetition_penalty=1.2, seed=seed)
            for seed in range(rows)
        ]
        drawn = sample(logits[row].expand(rows, V), params, [ids[row].tolist()] * rows)
        allowed = torch.isfinite(expected[row]).nonzero().squeeze(1)
        assert set(drawn.tolist()) <= set(allowed.tolist())
        likely = (expected[row].softmax(-1) > 0.05).nonzero().squeeze(1)  # missed with probability 0.95^400 < 2e-9
        assert set(likely.tolist()) <= set(drawn.tolist())


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log()
    rows = 40_000
    uniform = torch.rand(rows, 1, generator=torch.Generator().manual_seed(1))
    counts = draw(logits.expand(rows, 5), uniform).bincount(minlength=5)
    assert counts[2] == 0
    # Five standard deviations of a share: 5 * sqrt(0.25 / 40000) = 0.0125.
    torch.testing.assert_close(counts / rows, logits.exp(), atol=0.0125, rtol=0)


@pytest.mark.parametrize("kept", [0, 3, V - 1])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])  # the ends of what torch.rand returns
def test_draw_never_leaves_the_kept_tokens(kept, uniform):
    logits = torch.full((1, V), -torch.inf)
    logits[:, kept] = 1.0
    assert draw(logits, column(uniform)).tolist() == [kept]


def test_draw_stays_inside_the_vocabulary_whatever_the_rounding():
    for seed in range(50):
        assert draw(random_logits(seed), column(*[1 - 2**-24] * B)).max() < V


def test_temperature_zero_is_greedy():
    """Upstream G5: dividing by 1e-9 overflowed in half precision."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (random_logits() * 1000).to(dtype)
        assert torch.equal(sample(logits, SamplingParams(temperature=0)), logits.argmax(-1))


def test_greedy_still_honours_the_repetition_penalty():
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample(logits, params, [[0]]).tolist() == [1]


def test_a_seed_decides_alone_whoever_else_draws():
    logits = random_logits(rows=1)
    mixed = [
        SamplingParams(temperature=1.0, top_p=1.0, seed=7),
        SamplingParams(temperature=0),
        SamplingParams(temperature=2.0, top_k=3, min_p=0.1, repetition_penalty=1.3, logit_bias={3: 2}, seed=8),
        SamplingParams(temperature=0.7, top_p=0.5, presence_penalty=1, seed=9),
    ]
    together = sample(logits.expand(4, V), mixed, [[3, 4]] * 4).tolist()
    torch.rand(100)
    assert together == [sample(logits, params, [[3, 4]]).item() for params in mixed]
    open_ended = [SamplingParams(temperature=2.0, top_p=1.0) for _ in range(64)]
    assert len(set(sample(logits.expand(64, V), open_ended).tolist())) > 1, "without a seed they differ"


def test_the_random_numbers_are_those_of_one_generator_in_turn():
    sampler = RowSampler(1, V, "cpu")
    sampler.begin(0, SamplingParams(temperature=1.0, seed=5), [], 100)
    expected = torch.rand(100, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sampler.uniform[0, :100], expected)


def test_rows_that_change_places_keep_what_is_theirs():
    logits, sampler = random_logits(rows=1).expand(3, V), RowSampler(3, V, "cpu")
    params = [SamplingParams(temperature=1.0, top_p=1.0, seed=seed, frequency_penalty=1) for seed in (1, 2, 3)]
    for row in range(3):
        sampler.begin(row, params[row], [row], 10)
    alone = [sample(logits[:1], p, [[i]], made=()).item() for i, p in enumerate(params)]
    sampler.swap(0, 2)
    assert sampler.sample(logits, range(3), slice(None)).tolist() == alone[::-1]
    assert [int(sampler.tables["counts"][row, token]) for row, token in enumerate(alone[::-1])] == [1, 1, 1]


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
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101"),
    ],
)
def test_impossible_values_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**values)


def test_all_impossible_values_are_reported_at_once():
    with pytest.raises(ValueError, match="top_p is 2.*top_k is -1"):
        SamplingParams(top_p=2, top_k=-1)
