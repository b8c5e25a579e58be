"""OpenAI's own client, which checks every answer against the protocol, on every endpoint, in one piece and streamed."""

import math

import pytest
from served import CONTEXT, served

HELLO = [{"role": "user", "content": "你好"}]
ASK = {"model": "minimind", "messages": HELLO, "seed": 1, "max_tokens": 12}


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def lenient(server):
    return server.client(strict=False)


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.object) == ("minimind", "model")
    assert client.models.retrieve("minimind").id == "minimind"


def test_a_stream_is_the_answer_in_pieces(client):
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert body[0].choices[0].delta.role == "assistant" and body[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in body]
    assert reasons == [None] * (len(body) - 1) + [whole.choices[0].finish_reason]
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    assert {(chunk.id, chunk.created) for chunk in chunks} == {(last.id, last.created)}
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"


def test_a_stream_without_usage_ends_with_its_finish_reason(client):
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length" and all(chunk.usage is None for chunk in chunks)


def test_the_bytes_of_a_stream(client):
    """Dify splits at exactly two newlines, and takes every chunk for one with choices."""
    with client.chat.completions.with_streaming_response.create(**ASK, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") and '"choices"' in line for line in lines[:-2])


def test_equal_seeds_give_equal_answers_and_n_different_ones(client):
    first, again = (client.chat.completions.create(**ASK, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in first.choices] == [0, 1, 2]
    alone = client.chat.completions.create(**ASK)
    assert first.usage.prompt_tokens == alone.usage.prompt_tokens and first.usage.completion_tokens == 36
    pieces = ["", "", ""]
    for chunk in client.chat.completions.create(**ASK, n=3, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == texts


def test_temperature_0_is_greedy_and_max_completion_tokens_wins(client):
    answers = [client.chat.completions.create(**{**ASK, "seed": i, "temperature": 0}) for i in range(2)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert client.chat.completions.create(**ASK, max_completion_tokens=3).usage.completion_tokens == 3


def test_minus_one_goes_on_until_the_context_is_full(client):
    """What early MiniMind's README sends."""
    usage = client.chat.completions.create(**{**ASK, "max_tokens": -1}, extra_body={"ignore_eos": True}).usage
    assert usage.total_tokens == CONTEXT


def test_a_stop_string_is_no_part_of_the_answer(client):
    text = client.chat.completions.create(**ASK).choices[0].message.content
    stop = text[4:7]
    for answer in (
        client.chat.completions.create(**ASK, stop=stop),
        client.chat.completions.create(**ASK, stop=["never", stop]),
    ):
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**ASK, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]


def test_log_probabilities(client, tokenizer):
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 12 and all(len(entry.top_logprobs) == 3 for entry in entries)
    text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert text == answer.choices[0].message.content
    assert all(entry.logprob <= entry.top_logprobs[0].logprob < 0 for entry in entries)
    streamed = []
    for chunk in client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == entries


def test_a_sampling_field_of_each_kind_is_read(client, server, monkeypatch):
    seen, submit = [], server.engine.submit

    def noted(request, **rest):
        seen.append(request)
        return submit(request, **rest)

    monkeypatch.setattr(server.engine, "submit", noted)
    client.chat.completions.create(
        **{**ASK, "seed": -1},
        temperature=0.5, top_p=0.25, presence_penalty=1, frequency_penalty=-1, logit_bias={"20": 5},
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True, "unknown": 1},
    )  # fmt: skip
    params = seen[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert params.logit_bias == {20: 5} and params.seed == 2**63 - 1 and seen[0].eos_token_ids == ()


def test_text_parts_and_the_developer_are_understood(client):
    parts = [{"role": "developer", "content": [{"type": "text", "text": "你"}]}, *HELLO]
    plain = [{"role": "system", "content": "你"}, *HELLO]
    usages = [client.chat.completions.create(**{**ASK, "messages": messages}).usage for messages in (parts, plain)]
    assert usages[0].prompt_tokens == usages[1].prompt_tokens


def test_completions(client, lenient, tokenizer):
    ask = {"model": "minimind", "max_tokens": 5, "seed": 1}
    whole = client.completions.create(**ask, prompt="你好")
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(lenient.completions.create(**ask, prompt="你好", **stream))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    ids = [1, *tokenizer.encode("你好", add_special_tokens=False)]
    several = client.completions.create(**ask, prompt=[ids, ids], n=2)
    texts = [choice.text for choice in several.choices]
    assert texts[0] == whole.choices[0].text and texts[:2] == texts[2:] and texts[0] != texts[1]
    assert several.usage.prompt_tokens == 2 * len(ids) and several.usage.completion_tokens == 20
    assert client.completions.create(**ask, prompt=["你好"], echo=True).choices[0].text == "你好" + texts[0]


def test_scoring_a_text_as_lm_eval_does(lenient, server, tokenizer):
    """One number for each token, none for the first, and one more for a token that it throws away, be it the end."""
    import torch

    ids = [1, *tokenizer.encode("天气很好", add_special_tokens=False)]
    end = {str(tokenizer.eos_token_id): 100}  # this model says nothing but "the end"
    ask = {"model": "minimind", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "seed": 1234}
    for bias in ({}, end):
        answer = lenient.completions.create(**ask, prompt=[ids], logit_bias=bias).choices[0].logprobs
        assert len(answer.token_logprobs) == len(ids) + 1 == len(answer.tokens) == len(answer.text_offset)
        assert answer.token_logprobs[0] is None and answer.top_logprobs[0] is None
        with torch.inference_mode():
            expected = server.service.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for i, token in enumerate(ids[1:]):
            assert math.isclose(answer.token_logprobs[i + 1], expected[i, token], abs_tol=1e-4)
            best = max(answer.top_logprobs[i + 1].values())
            assert math.isclose(best, expected[i].max(), abs_tol=1e-4)


def test_max_tokens_0_only_echoes(lenient):
    answer = lenient.completions.create(model="minimind", prompt="你好", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "你好" and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.token_logprobs) == answer.usage.prompt_tokens


def test_embeddings(client, lenient):
    """The client asks for base64 by itself."""
    both = lenient.embeddings.create(model="minimind", input=["你好", "天气"]).data
    (alone,) = client.embeddings.create(model="minimind", input="天气", encoding_format="float").data
    assert [entry.index for entry in both] == [0, 1] and len(alone.embedding) == 16
    assert both[1].embedding == pytest.approx(alone.embedding, abs=1e-6)
    assert math.isclose(sum(x * x for x in alone.embedding), 1, abs_tol=1e-5)
