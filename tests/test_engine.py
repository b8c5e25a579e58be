"""inference/engine.py: text, stop strings, cancelling; what happens to one request does not hurt the others."""

import asyncio
import threading
import time

import pytest
import torch
from tiny_batch import EOS, LONG, V, alone, make_adapter, make_model, ragged_requests

from inference.batch import Batch
from inference.engine import Engine, EngineClosed, EngineDead, QueueFull
from inference.requests import Request
from inference.sampling import SamplingParams
from model.model import MiniMindForCausalLM


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return make_model()


@pytest.fixture
def engine(model, tokenizer):
    with Engine(model, tokenizer, max_rows=4) as engine:
        yield engine


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
