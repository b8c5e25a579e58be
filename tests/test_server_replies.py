"""inference/server/replies.py and tools.py: what the model thinks, says and calls, however its text is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import Scripted, served

from inference.server.replies import Piece, ReplyParser
from inference.server.service import Settings
from model.chat_format import split_reasoning

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
replies = st.lists(st.sampled_from([*TAGS, "好", " ", "\n", "<", "<t", ">", "a<think", "x</"]), max_size=12).map(
    "".join
)


def parse(texts: list[str], **options) -> list[Piece]:
    parser = ReplyParser(**options)
    pieces = [piece for text in texts for piece in parser.push(text)]
    return pieces + parser.finish()


def joined(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


@given(replies, st.booleans(), st.booleans())
def test_it_does_not_matter_how_the_text_is_cut(text, reasoning, tools):
    options = {"reasoning": reasoning, "tools": tools}
    whole, cut = parse([text], **options), parse(list(text), **options)
    for kind in ("reasoning", "content", "call"):
        assert joined(whole, kind) == joined(cut, kind)


@given(replies)
def test_ordinary_text_comes_out_as_it_is(text):
    assert joined(parse(list(text), reasoning=False, tools=False), "content") == text


@given(replies.map(lambda text: f"<think>{text}"))
def test_a_thinking_reply_is_split_as_everywhere_else(text):
    pieces = parse(list(text))
    _, _, answer = text.partition("</think>")
    if answer.strip().startswith("<answer>") or "</answer>" not in answer:  # else an end without a beginning
        assert (joined(pieces, "reasoning"), joined(pieces, "content")) == split_reasoning(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("你好", [("content", "你好")]),
        (" a <think> b", [("content", " a <think> b")]),
        ("<think>\n想\n</think>\n<answer>\n答\n</answer>\n", [("reasoning", "想"), ("content", "答")]),
        ("<think>想", [("reasoning", "想")]),
        ("<think>想</think>\n\n答 。", [("reasoning", "想"), ("content", "答 。")]),
        ("看<tool_call>\n{}\n</tool_call>", [("content", "看"), ("call", "{}")]),
        (" <answer>答</answer>", [("content", "答")]),
        ("看\n<tool_call>1</tool_call>\n<tool_call>2</tool_call>\n", [("content", "看"), ("call", "1"), ("call", "2")]),
        ("<tool_call>{", [("content", "<tool_call>{")]),
        ("<thi", [("content", "<thi")]),
    ],
)
def test_examples(text, pieces):
    assert parse([text], tools=True) == [Piece(*piece) for piece in pieces]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASK = {"model": "minimind", "messages": [{"role": "user", "content": "天气"}]}
CALL = '看看。\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'


def streamed(client, **ask) -> dict:
    """The message that the deltas of a stream add up to."""
    message, reason = {"content": "", "reasoning_content": "", "tool_calls": []}, None
    for chunk in client.chat.completions.create(**ask, stream=True):
        delta = chunk.choices[0].delta
        message["content"] += delta.content or ""
        message["reasoning_content"] += getattr(delta, "reasoning_content", "")
        message["tool_calls"] += [(call.index, call.function.model_dump()) for call in delta.tool_calls or []]
        reason = chunk.choices[0].finish_reason
    return {**message, "finish_reason": reason}


def test_a_call_of_a_tool():
    with served(Scripted(CALL)) as server:
        client = server.client()
        choice = client.chat.completions.create(**ASK, tools=[WEATHER]).choices[0]
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content == "看看。"
        assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "北京"}
        stream = streamed(client, **ASK, tools=[WEATHER])
        assert stream["content"] == "看看。" and stream["tool_calls"] == [(0, call.function.model_dump())]
        assert stream["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_text_and_the_prompt_knows_none():
    with served(Scripted(CALL)) as server:
        client = server.client()
        lengths = []
        for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER]}):
            completion = client.chat.completions.create(**ASK, **options)
            lengths.append(completion.usage.prompt_tokens)
            if len(lengths) < 3:
                assert completion.choices[0].message.content == CALL and not completion.choices[0].message.tool_calls
        assert lengths[0] == lengths[1] < lengths[2]


@pytest.mark.parametrize("call", ["{bad", '{"name": "other", "arguments": {}}', "[]", "[" * 100_000])
def test_what_is_no_call_of_an_offered_tool_stays_text(call):
    text = f"<tool_call>{call}</tool_call>"
    parser = ReplyParser(tools=True)
    from inference.server.protocol import Function
    from inference.server.tools import Offer, parse_call

    assert parser.push(text) == [Piece("call", call)]
    assert parse_call(call, Offer((Function(name="weather"),))) is None


def test_thinking_is_apart_and_counted():
    with served(Scripted("<think>想一想</think>好")) as server:
        client = server.client()
        completion = client.chat.completions.create(**ASK)
        message = completion.choices[0].message
        assert (message.content, message.reasoning_content) == ("好", "想一想")
        assert 0 < completion.usage.completion_tokens_details.reasoning_tokens < completion.usage.completion_tokens
        assert streamed(client, **ASK)["reasoning_content"] == "想一想"
    with served(Scripted("<think>想一想</think>好"), settings=Settings(raw_reasoning=True)) as server:
        message = server.http.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]
        assert message["content"] == "<think>想一想</think>好"


def test_adapters_are_models_of_their_own():
    with served(Scripted("好")) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["minimind", "minimind:medical"]
        assert client.models.retrieve("minimind:medical").id == "minimind:medical"
        for model in ("minimind", "minimind:medical"):
            client.chat.completions.create(**{**ASK, "model": model})
            client.completions.create(model=model, prompt="a")
        assert [request.adapter for request in server.engine.requests] == [None, None, "medical", "medical"]


def test_line_ends_of_unicode_do_not_cut_an_event():
    """Some clients split a stream into lines as Python's str.splitlines does."""
    with served(Scripted("a\u2028b\x85c")) as server:
        with server.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
            lines = [line for line in response.read().decode().splitlines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert streamed(server.client(), **ASK)["content"] == "a\u2028b\x85c"


def test_every_chunk_of_a_stream_has_one_piece_of_news():
    with served(Scripted("<think>想</think>好")) as server:
        chunks = list(server.client().chat.completions.create(**ASK, stream=True))
        deltas = [chunk.choices[0].delta.model_dump(exclude_none=True) for chunk in chunks]
        assert deltas == [{"content": "", "role": "assistant"}, {"reasoning_content": "想"}, {"content": "好"}, {}]
        assert all(a.id == b.id for a, b in pairwise(chunks))
