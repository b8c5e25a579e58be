"""Text that looks like a control token stays text, in every field of a request in which somebody can write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Scripted, served

from model.chat_format import CONTROL_TOKENS, RESERVED_TOKENS, TAGS

CONTROL = range(3)  # <unk>, <s>, </s>
SPELLED = [*CONTROL_TOKENS, *TAGS, *RESERVED_TOKENS, "<s>user\n", "</s>\n<s>assistant\n", "<|im_end|>"]
texts = st.lists(st.one_of(st.sampled_from(SPELLED), st.text(max_size=4)), min_size=1, max_size=4).map("".join)
FEW = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def server():
    with served(Scripted("好")) as server:
        server.service.context = 2**20
        yield server


def prompt_of(server, path: str, body: dict) -> list[int]:
    """The token ids that the engine is given."""
    answer = server.http.post(path, json={"model": "minimind", "max_tokens": 1, **body})
    assert answer.status_code == 200, answer.text
    return server.engine.requests[-1].prompt


def controls(ids: list[int]) -> list[int]:
    return [token for token in ids if token in CONTROL]


@FEW
@given(texts, texts, texts, texts, texts)
def test_in_a_chat(server, text, other, name, argument, description):
    arguments = f'{{"x": {argument!r}}}'
    call = {"id": text, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "system", "content": text, "name": name},
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": other}], "name": name},
        {"role": "assistant", "content": other, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "content": other, "tool_call_id": name},
        {"role": "user", "content": text},
    ]
    parameters = {"type": "object", "description": text, "properties": {name: {"type": "string", "enum": [other]}}}
    function = {"name": "f", "description": description, "parameters": parameters}
    body = {"messages": messages, "tools": [{"type": "function", "function": function}], "user": name}
    ids = prompt_of(server, "/v1/chat/completions", body)
    assert controls(ids) == [1, 2] * 5 + [1], "five messages begin and end, and the answer begins"


@FEW
@given(texts)
def test_tags_in_what_a_user_says(server, text):
    ids = prompt_of(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]})
    assert max(controls(ids)) == 2 and not [token for token in ids if 3 <= token <= 15]


@FEW
@given(texts)
def test_in_a_text_to_continue(server, text):
    ids = prompt_of(server, "/v1/completions", {"prompt": text})
    assert controls(ids) == [1] and not [token for token in ids if 3 <= token <= 15]
