"""inference/engine.py and batch.py on a random model of 10^4 parameters: what a request gets does not depend on the
others, and what happens to one does not hurt the others."""

import asyncio
import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.batch import Batch
from inference.engine import Engine, EngineClosed, EngineDead, QueueFull
from inference.generation import generate
from inference.requests import Request
from inference.sampling import SamplingParams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.model_lora import adaptable_weights, load_lora, remove_lora

V, EOS = 6400, 2
LONG = SamplingParams(100, temperature=0)


def make_model(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 160, "hidden_dim": 32}
    model = MiniMindForCausalLM(LMConfig(**{**sizes, **fields})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # sharper than a fresh model: near-ties would make tokens depend on rounding
    return model


def make_adapter(model, seed: int):
    random_numbers = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in adaptable_weights(model).items():
        *experts, outputs, inputs = weight.shape
        for side, shape in (("A", (*experts, 2, inputs)), ("B", (*experts, outputs, 2))):
            adapter[f"{name}.lora.{side}.weight"] = torch.randn(shape, generator=random_numbers) * 0.3
    return adapter


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def any_model(request) -> MiniMindForCausalLM:
    return make_model(use_moe=request.param)


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return make_model()


@pytest.fixture
def engine(model, tokenizer):
    with Engine(model, tokenizer, max_rows=4) as engine:
        yield engine


def ragged_requests(count: int, seed: int = 0, **fields) -> list[Request]:
    """Prompts of 1 to 60 tokens, answers of 1 to 20, every way of sampling."""
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        params = rng.choice(
            [
                {"temperature": 0},
                {"temperature": 0, "repetition_penalty": 1.3},
                {"temperature": 1.0, "top_p": 0.9, "seed": i},
                {"temperature": 0.8, "top_k": 7, "presence_penalty": 1.0, "top_p": 1.0, "seed": i},
                {"temperature": 1.2, "min_p": 0.05, "frequency_penalty": 0.5, "logit_bias": {7: 4.0}, "seed": i},
            ]
        )
        prompt = [1] + [rng.randrange(3, V) for _ in range(rng.randrange(60))]
        params = SamplingParams(max_new_tokens=rng.randrange(1, 21), **params)
        requests.append(Request(prompt, params, eos_token_ids=(EOS,), **fields))
    return requests


def run_batch(model, requests, max_rows: int = 8, joins: random.Random | None = None, **options):
    """All requests through one batch; `joins` lets them arrive at random moments."""
    batch, waiting, running = Batch(model, max_rows, **options), list(requests), {}
    while waiting or batch.running:
        while waiting and len(batch.running) < max_rows and (joins is None or joins.random() < 0.5):
            request = waiting.pop(0)
            running[id(request)] = batch.add(request)
        batch.step()
    results = [running[id(request)] for request in requests]
    for result in results:
        if result.error is not None:
            raise result.error
    return results


def alone(model, request, **options):
    return run_batch(model, [request], max_rows=1, **options)[0]


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


def test_200_ragged_streams_through_32_rows_of_the_engine(model, tokenizer):
    requests = ragged_requests(200, seed=1)
    with Engine(model, tokenizer, max_rows=32) as engine:
        answers = [engine.submit(request) for request in requests]
        results = [answer.result(60) for answer in answers]
    one_row = Batch(model, 1)
    for request, result in zip(requests, results, strict=True):
        expected = one_row.add(request)
        while one_row.running:
            one_row.step()
        assert (result.token_ids, result.finish_reason) == (expected.tokens, expected.finish_reason)
        assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)


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


def test_adapters_come_and_go(engine, model):
    engine.add_adapter("a", make_adapter(model, 0))
    assert engine.adapters == ["a"]
    gate = Gate()
    request = Request([1, 5], SamplingParams(3), eos_token_ids=(), adapter="a", allowed_tokens=gate)
    answer = engine.submit(request)
    assert gate.entered.wait(10)
    engine.remove_adapter("a")
    gate.opened.set()
    assert len(answer.result(10).token_ids) == 3, "who uses it goes on"
    with pytest.raises(ValueError, match="no adapter 'a'"):
        engine.submit(Request([1, 5], adapter="a"))
    with pytest.raises(ValueError, match="does not fit"):
        engine.add_adapter("b", make_adapter(make_model(dim=32), 0))


# Text


def forced(ids: list[int]):
    """A hook that lets exactly these tokens come, one after the other."""

    def allowed(tokens: list[int]) -> torch.Tensor:
        mask = torch.zeros(V, dtype=torch.bool)
        mask[ids[len(tokens)]] = True
        return mask

    return allowed


def forced_request(tokenizer, text: str, **fields) -> Request:
    ids = tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(len(ids), temperature=0)
    return Request([1, 5], params, allowed_tokens=forced(ids), **fields)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("你好世界，龘字", ("世界",), "你好"),
        ("鑫𠮷龘👩🏽‍🚀尾", ("龘",), "鑫𠮷"),
        ("鑫𠮷龘👩🏽‍🚀尾", ("🚀尾",), "鑫𠮷龘👩🏽‍"),
        ("one two three", ("o th",), "one tw"),
        ("one two three", ("four", "e t"), "on"),
        ("one two three", ("three!",), "one two three"),
        ("甲乙丙", ("甲",), ""),
    ],
)
def test_text_ends_before_a_stop_string_wherever_the_tokens_end(engine, tokenizer, text, stop, expected):
    deltas = list(engine.submit(forced_request(tokenizer, text, stop=stop)))
    assert "".join(delta.text for delta in deltas) == expected
    found = any(string in text for string in stop)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == ("stop" if found else "length")
    assert not any("\ufffd" in delta.text for delta in deltas)


def test_deltas_add_up_to_the_answer(engine, tokenizer):
    answer = engine.submit(Request([1, 9, 9], SamplingParams(25, temperature=1.0, seed=3), top_logprobs=2))
    deltas = list(answer)
    assert (
        "".join(delta.text for delta in deltas)
        == answer.text
        == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    )
    assert [token for delta in deltas for token in delta.token_ids] == answer.token_ids
    assert [x for delta in deltas for x in delta.logprobs] == answer.logprobs and len(answer.logprobs) == 25
    assert (answer.finish_reason, answer.n_prompt) == ("length", 3)


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(engine, tokenizer):
    ids = [*tokenizer.encode("好", add_special_tokens=False), EOS, 9, 9]
    request = Request([1, 5], SamplingParams(len(ids), temperature=0), allowed_tokens=forced(ids))
    answer = engine.submit(request).result(10)
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("好", "stop", ids[:-3])
    ignoring = Request(request.prompt, request.params, allowed_tokens=forced(ids), eos_token_ids=())
    assert engine.submit(ignoring).result(10).token_ids == ids


def test_the_context_ends_an_answer(engine):
    answer = engine.submit(Request([1] + [7] * 150, LONG, eos_token_ids=())).result(10)
    assert (len(answer.token_ids), answer.finish_reason) == (9, "length")


# Cancelling, faults, the queue, the end


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


class Gate:
    """A hook that holds the engine's thread until it is opened, and counts its calls."""

    def __init__(self):
        self.entered, self.opened, self.calls = threading.Event(), threading.Event(), 0

    def __call__(self, tokens):
        self.calls += 1
        self.entered.set()
        assert self.opened.wait(10)


def test_cancelling_frees_the_row_within_two_tokens(model, tokenizer):
    with Engine(model, tokenizer, max_rows=1) as engine:
        answer = engine.submit(Request([1, 5], LONG, eos_token_ids=()))
        deltas = iter(answer)
        next(deltas)
        made = len(answer.token_ids)
        answer.cancel()
        assert [delta.finish_reason for delta in deltas][-1] == "cancelled"
        assert len(answer.token_ids) <= made + 12  # what the thread made before it could know
        assert engine.submit(Request([1, 6], SamplingParams(3, temperature=0), eos_token_ids=())).result(10)
        answer.cancel()  # again: no effect
        # And exactly: the thread is held in a step while the answer is cancelled.
        gate = Gate()
        held = engine.submit(Request([1, 7], LONG, eos_token_ids=(), allowed_tokens=gate))
        waiting = engine.submit(Request([1, 8], LONG))
        assert gate.entered.wait(10)
        held.cancel()
        waiting.cancel()
        gate.opened.set()
        assert held.result(10).finish_reason == waiting.result(10).finish_reason == "cancelled"
        assert gate.calls == 1 and len(held.token_ids) == 1 and waiting.token_ids == []
        assert engine.stats().running == engine.stats().waiting == 0


def test_a_full_queue_refuses_at_once(model, tokenizer):
    with Engine(model, tokenizer, max_rows=1, max_queue=2) as engine:
        gate = Gate()
        running = engine.submit(Request([1, 5], SamplingParams(2), allowed_tokens=gate))
        assert gate.entered.wait(10)
        waiting = [engine.submit(Request([1, 6], SamplingParams(2))) for _ in range(2)]
        start = time.monotonic()
        with pytest.raises(QueueFull, match="2 requests wait already"):
            engine.submit(Request([1, 7]))
        assert time.monotonic() - start < 0.1 and engine.stats().waiting == 2
        gate.opened.set()
        for answer in (running, *waiting):
            answer.result(10)


def test_a_fault_ends_its_own_request_only(model, tokenizer):
    def broken(tokens):
        if len(tokens) == 3:
            raise ZeroDivisionError("of the hook")

    def nothing(tokens):
        return torch.zeros(V, dtype=torch.bool)

    def closed(delta):
        raise RuntimeError("the event loop is closed")

    request = ragged_requests(1, seed=5)[0]
    with Engine(model, tokenizer, max_rows=4) as engine:
        faulty = engine.submit(Request([1, 5], LONG, eos_token_ids=(), allowed_tokens=broken))
        impossible = engine.submit(Request([1, 5], LONG, allowed_tokens=nothing))
        unread = engine.submit(Request([1, 5], LONG), on_delta=closed)
        good = engine.submit(request)
        with pytest.raises(ZeroDivisionError, match="of the hook"):
            list(faulty)
        with pytest.raises(ValueError, match="allows no token"):
            impossible.result(10)
        assert good.result(10).token_ids == alone(model, request).tokens and len(faulty.token_ids) == 3
        wait_until(lambda: engine.stats().running == 0)
        assert unread.finish_reason is None and engine.is_alive and engine.stats().finished["error"] == 3


def test_damaged_weights_end_their_own_requests_and_leave_nothing_behind(model, tokenizer):
    with Engine(model, tokenizer, max_rows=2) as engine:
        bad = make_adapter(model, 1)
        bad["model.layers.1.self_attn.v_proj.lora.B.weight"].fill_(float("nan"))
        engine.add_adapter("bad", bad)
        request = Request([1, 20, 21, 22], SamplingParams(8, temperature=0))
        answers = [engine.submit(Request(request.prompt, LONG, adapter="bad")), engine.submit(request)]
        with pytest.raises(FloatingPointError, match="not finite"):
            answers[0].result(10)
        expected = alone(model, request).tokens
        assert answers[1].result(10).token_ids == expected
        assert all(engine.submit(request).result(10).token_ids == expected for _ in range(4))


def test_a_forward_that_fails_ends_those_that_were_in_it(model, tokenizer, monkeypatch):
    with Engine(model, tokenizer, max_rows=2) as engine:
        forward = Batch._forward

        def out_of_memory(*args, **options):
            raise MemoryError("no room")

        monkeypatch.setattr(Batch, "_forward", out_of_memory)
        answers = [engine.submit(Request([1, 5, 6], LONG)) for _ in range(3)]
        for answer in answers:
            with pytest.raises(MemoryError):
                answer.result(10)
        monkeypatch.setattr(Batch, "_forward", forward)
        assert engine.submit(Request([1, 5, 6], SamplingParams(2))).result(10).n_prompt == 3


@pytest.mark.filterwarnings("error")
def test_everybody_who_waits_learns_of_a_dead_thread(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, max_rows=1)
    gate = Gate()
    answers = [engine.submit(Request([1, 5], LONG, allowed_tokens=gate)), engine.submit(Request([1, 6], LONG))]
    told = []
    engine.submit(Request([1, 7], LONG), on_delta=told.append)
    assert gate.entered.wait(10)
    monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
    gate.opened.set()
    for answer in answers:
        with pytest.raises(EngineDead) as error:
            answer.result(10)
        assert isinstance(error.value.__cause__, ZeroDivisionError)
    wait_until(lambda: bool(told))
    assert isinstance(told[0], EngineDead) and not engine.is_alive
    with pytest.raises(EngineDead, match="ZeroDivisionError"):
        engine.submit(Request([1, 5]))
    engine.close()


def test_closing_lets_answers_finish(model, tokenizer):
    engine = Engine(model, tokenizer, max_rows=1)
    answers = [engine.submit(Request([1, 5 + i], SamplingParams(20), eos_token_ids=())) for i in range(3)]
    engine.close()
    assert [answer.result(0).finish_reason for answer in answers] == ["length"] * 3 and not engine.is_alive
    with pytest.raises(EngineClosed):
        engine.submit(Request([1, 5]))
    engine.close()


def test_closing_cancels_after_its_timeout(model, tokenizer):
    engine = Engine(model, tokenizer, max_rows=1)
    slow = Request([1, 5], LONG, eos_token_ids=(), allowed_tokens=lambda tokens: time.sleep(0.05))
    answers = [engine.submit(slow) for _ in range(2)]
    start = time.monotonic()
    engine.close(timeout=0.2)
    assert time.monotonic() - start < 3
    assert [answer.result(0).finish_reason for answer in answers] == ["cancelled"] * 2
    assert answers[0].text and not answers[1].text


def test_threads_end_with_their_engines(model, tokenizer):
    before = threading.active_count()
    for _ in range(3):
        with Engine(model, tokenizer) as engine:
            engine.submit(Request([1, 5], SamplingParams(2))).result(10)
    assert threading.active_count() == before


def test_waiting_for_an_answer_may_time_out(engine):
    gate = Gate()
    answer = engine.submit(Request([1, 5], SamplingParams(2), eos_token_ids=(), allowed_tokens=gate))
    with pytest.raises(TimeoutError, match="0 tokens so far"):
        answer.result(0.01)
    gate.opened.set()
    assert len(answer.result(10).token_ids) == 2


def test_asyncio_reads_many_answers_in_one_thread(engine, model):
    requests = ragged_requests(12, seed=6)

    async def read(request: Request) -> list[int]:
        items, loop = asyncio.Queue(), asyncio.get_running_loop()
        engine.submit(request, on_delta=lambda item: loop.call_soon_threadsafe(items.put_nowait, item))
        tokens, reason = [], None
        while reason is None:
            delta = await items.get()
            tokens, reason = tokens + delta.token_ids, delta.finish_reason
        return tokens

    async def read_all():
        return await asyncio.gather(*map(read, requests))

    assert asyncio.run(read_all()) == [alone(model, request).tokens for request in requests]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "no token"),
        ({"prompt": [1] * 160}, "160 tokens of 160"),
        ({"prompt": [1, V]}, "no tokens \\[6400\\]"),
        ({"prompt": [-1]}, "no tokens \\[-1\\]"),
        ({"prompt": [1], "params": SamplingParams(logit_bias={V: 1})}, "no tokens"),
        ({"prompt": [1], "top_logprobs": 21}, "top_logprobs is 21: use 0 to 20"),
        ({"prompt": [1], "adapter": "x"}, "no adapter 'x'"),
        ({"prompt": [1], "stop": ("",)}, "none of them empty"),
        ({"prompt": [], "adapter": "x"}, "no token.*no adapter"),
    ],
)
def test_impossible_requests_are_refused_where_they_are_made(engine, fields, words):
    with pytest.raises(ValueError, match=words):
        engine.submit(Request(**fields))


def test_totals(engine):
    for i in range(3):
        engine.submit(Request([1, 5 + i, 6], SamplingParams(4), eos_token_ids=())).result(10)
    wait_until(lambda: engine.stats().running == 0)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished) == (9, 12, {"length": 3})
    assert stats.reused_tokens == 2 and (stats.max_rows, stats.waiting) == (4, 0)
