"""inference/batch.py: what a request gets does not depend on the others in the batch."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_batch import LONG, V, alone, make_adapter, make_model, ragged_requests, run_batch

from inference.batch import Batch
from inference.generation import generate
from inference.requests import Request
from inference.sampling import SamplingParams
from model.model import MiniMindForCausalLM
from model.model_lora import load_lora, remove_lora


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def any_model(request) -> MiniMindForCausalLM:
    return make_model(use_moe=request.param)


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return make_model()


# What a request gets does not depend on the others


def test_in_any_company_a_request_gets_what_it_gets_alone(any_model):
    requests = ragged_requests(24, top_logprobs=3)
    expected = [alone(any_model, request) for request in requests]
    for seed in range(2):
        order = list(range(len(requests)))
        random.Random(seed).shuffle(order)
        results = run_batch(any_model, [requests[i] for i in order], max_rows=3 + 8 * seed, joins=random.Random(seed))
        for i, result in zip(order, results, strict=True):
            assert (result.tokens, result.finish_reason) == (expected[i].tokens, expected[i].finish_reason)
            assert result.logprobs == pytest.approx(expected[i].logprobs, abs=1e-4)


def test_exact_batches_give_every_request_the_same_bits_as_alone():
    model = make_model(dim=128, n_layers=1, hidden_dim=256)
    requests = ragged_requests(30, seed=2, top_logprobs=5)
    together = run_batch(model, requests, max_rows=24, joins=random.Random(0), exact=True)
    for request, result in zip(requests, together, strict=True):
        expected = run_batch(model, [request], max_rows=24, exact=True)[0]
        assert result.tokens == expected.tokens and result.logprobs == expected.logprobs
        assert result.top_logprobs == expected.top_logprobs
    for impossible in (make_model(use_moe=True), make_model().bfloat16()):
        with pytest.raises(ValueError, match="exact"):
            Batch(impossible, exact=True)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_prompts_read_in_pieces_change_nothing(any_model, chunk):
    requests = ragged_requests(8, seed=3)
    whole = run_batch(any_model, requests, prefill_chunk=1000)
    pieces = run_batch(any_model, requests, prefill_chunk=chunk)
    assert [r.tokens for r in pieces] == [r.tokens for r in whole]


def test_a_long_prompt_does_not_keep_the_others_waiting(model):
    batch = Batch(model, 2, prefill_chunk=8)
    short = batch.add(Request([1, 5], LONG))
    batch.step()
    batch.add(Request([1] + [9] * 80, LONG))
    for n in range(2, 8):
        batch.step()
        assert len(short.tokens) == n
    assert batch._unread(1) > 0


def test_the_next_turn_reads_only_what_is_new(any_model):
    prompt = [1, *range(10, 50)]
    plain, reusing = Batch(any_model, 3, reuse_prefixes=False), Batch(any_model, 3)
    for turn in range(3):
        answers = []
        for batch in (plain, reusing):
            batch.add(Request([1, 700 + turn, 8, 9], SamplingParams(3, temperature=0)))  # somebody else comes between
            continuation = batch.add(Request(prompt, SamplingParams(10, temperature=0)))
            while batch.running:
                batch.step()
            answers.append(continuation)
        assert answers[0].tokens == answers[1].tokens and answers[0].n_reused == 0
        # All that was read: the last new token of the turn before never was.
        assert answers[1].n_reused == (len(prompt) - 4 if turn else 0) or turn == 0
        prompt = [*prompt, *answers[0].tokens, 60 + turn, 61, 62]


def test_dialogues_that_share_a_beginning_do_not_take_each_others_rows(model):
    batch, system = Batch(model, 4), [1, *range(100, 120)]
    turns = {}
    for who in (300, 400):
        continuation = batch.add(Request([*system, *range(who, who + 60)], SamplingParams(4, temperature=0)))
        turns[who] = (continuation, [*system, *range(who, who + 60)])
        while batch.running:
            batch.step()
    assert turns[400][0].n_reused == len(system)
    for who, (continuation, prompt) in turns.items():
        following = batch.add(Request([*prompt, *continuation.tokens, who], SamplingParams(4, temperature=0)))
        while batch.running:
            batch.step()
        assert following.n_reused == len(prompt) + 3


def test_the_same_prompt_at_once_is_read_once(model):
    batch, prompt = Batch(model, 4), [1, *range(10, 90)]
    first = batch.add(Request(prompt, SamplingParams(4, temperature=1.0, seed=1)))
    batch.step()
    second = batch.add(Request(prompt, SamplingParams(4, temperature=1.0, seed=2)))
    while batch.running:
        batch.step()
    assert (first.n_reused, second.n_reused) == (0, len(prompt) - 1)
    for continuation, seed in ((first, 1), (second, 2)):
        expected = alone(model, Request(prompt, SamplingParams(4, temperature=1.0, seed=seed)))
        assert continuation.tokens == expected.tokens


@given(seed=st.integers(0, 10**6), max_rows=st.integers(1, 5), chunk=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_leaving_and_coming_back_in_any_order(seed, max_rows, chunk):
    """Requests that share beginnings join and are thrown out at random; those that stay get what they get alone."""
    model, rng = make_model(n_layers=1), random.Random(seed)
    batch, expected, running = Batch(model, max_rows, prefill_chunk=chunk), {}, []
    for _ in range(25):
        if len(batch.running) < max_rows and rng.random() < 0.5:
            prompt = [1, *range(10, 10 + rng.randrange(20)), *(rng.randrange(3, V) for _ in range(rng.randrange(8)))]
            running.append(batch.add(Request(prompt, SamplingParams(rng.randrange(1, 8), temperature=0))))
        if batch.running and rng.random() < 0.2:
            gone = rng.choice(batch.running)
            batch.remove(gone)
            running.remove(gone)
        batch.step()
        assert [continuation.row for continuation in batch.running] == list(range(len(batch.running)))
    for continuation in running:
        key = tuple(continuation.request.prompt)
        if key not in expected:
            request = Request(list(key), SamplingParams(8, temperature=0))
            expected[key] = alone(model, request, reuse_prefixes=False).tokens
        assert expected[key][: len(continuation.tokens)] == continuation.tokens


# Log-probabilities


def test_logprobs_are_those_of_a_plain_forward(any_model):
    prompt = [1, *range(30, 45)]
    params = SamplingParams(10, temperature=1.5, top_k=5, repetition_penalty=1.5, seed=4)
    request = Request(prompt, params, top_logprobs=4, prompt_logprobs=True)
    result = run_batch(any_model, [*ragged_requests(5), request], prefill_chunk=7)[-1]
    ids = prompt + result.tokens
    with torch.no_grad():
        logprobs = any_model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    expected = [logprobs[i - 1, ids[i]].item() for i in range(1, len(ids))]
    assert result.prompt_logprobs[0] is None
    assert result.prompt_logprobs[1:] + result.logprobs == pytest.approx(expected, abs=1e-4)
    tops = result.prompt_top_logprobs[1:] + result.top_logprobs
    for i, top in enumerate(tops):
        values, tokens = logprobs[i].topk(4)
        assert list(top) == tokens.tolist() and list(top.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_only_for_those_who_ask(model):
    requests = [Request([1, 5], LONG, top_logprobs=top) for top in (None, 0, 2)]
    results = run_batch(model, requests)
    assert [len(result.logprobs) for result in results] == [0, 100, 100]
    assert [len(result.top_logprobs[0]) if result.top_logprobs else None for result in results] == [None, 0, 2]


# Adapters


def test_requests_with_different_adapters_share_a_batch(any_model):
    adapters = {name: make_adapter(any_model, seed) for seed, name in enumerate(("a", "b"))}
    batch = Batch(any_model, 6)
    for name, adapter in adapters.items():
        batch.add_adapter(name, adapter)
    who = [None, "a", "b", "a", None, "b"]
    prompts = [[1, *range(20, 24 + n)] for n in range(3) for _ in range(2)]
    requests = [
        Request(p, SamplingParams(12, temperature=0), adapter=name) for p, name in zip(prompts, who, strict=True)
    ]
    running = [batch.add(request) for request in requests]
    while batch.running:
        batch.step()
    model = make_model(use_moe=any_model.config.use_moe)
    for continuation, prompt, name in zip(running, prompts, who, strict=True):
        remove_lora(model) if name is None else load_lora(model, adapters[name])
        assert continuation.tokens == generate(model, [prompt], SamplingParams(12, temperature=0), -1)[0]
    assert len({tuple(c.tokens) for c in running}) == 6, "the adapters must make a difference"
    assert batch.add(Request(prompts[1], LONG, adapter="b")).n_reused == 4
    batch.add_adapter("b", adapters["a"])
    again = batch.add(Request(prompts[1], LONG, adapter="b"))
    assert again.n_reused == 0, "what another adapter read is of no use"
