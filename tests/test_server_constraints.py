"""inference/server/constraints.py: a model with random weights writes valid JSON, and calls the tool that it must."""

import json

import pytest
from served import random_model, served

ASK = {"model": "minimind", "messages": [{"role": "user", "content": "天气"}], "max_tokens": 120}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "warm": {"$ref": "#/$defs/warm"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
    "$defs": {"warm": {"enum": [True, False]}},
}


@pytest.fixture(scope="module")
def client():
    with served(model=random_model(1024)) as server:
        yield server.client()


def tool(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, **({"parameters": parameters} if parameters else {})}}


def test_a_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for choice in client.chat.completions.create(**ASK, response_format=wanted, seed=1, n=4).choices:
        answer = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and answer.keys() == {"city", "warm"} and answer["warm"] in (True, False)


def test_any_object_as_far_as_it_came(client):
    """Random weights do not think of an end: what is there must be a beginning of JSON."""
    answer = client.chat.completions.create(**ASK, response_format={"type": "json_object"}, seed=1).choices[0]
    assert answer.message.content.startswith('{"') or answer.message.content == "{}"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called(client, choice):
    tools = [tool("weather", CITY)]
    answer = client.chat.completions.create(**ASK, tools=tools, tool_choice=choice, seed=1).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert call.function.name == "weather" and json.loads(call.function.arguments).keys() == {"city", "warm"}
    chunks = client.chat.completions.create(**ASK, tools=tools, tool_choice=choice, seed=1, stream=True)
    streamed = [call.function.model_dump() for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert streamed == [call.function.model_dump()]


def test_one_of_the_allowed_tools(client):
    tools = [
        tool("weather", CITY),
        tool("stop_it", {"type": "object", "properties": {}, "additionalProperties": False}),
    ]
    named = [{"type": "function", "function": {"name": "stop_it"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": named}}
    (call,) = client.chat.completions.create(**ASK, tools=tools, tool_choice=choice).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("stop_it", "{}")


def test_where_the_library_is_missing_the_answer_says_so(monkeypatch):
    import sys

    import openai

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with served() as server, pytest.raises(openai.BadRequestError, match="pip install"):
        server.client().chat.completions.create(**ASK, response_format={"type": "json_object"})
