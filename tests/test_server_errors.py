"""What the server refuses: with which status, in OpenAI's form, and that it still answers afterwards."""

import time

import openai
import pytest
from served import CONTEXT, Scripted, random_model, served

from inference.engine import EngineDead
from inference.sampling import SamplingParams
from inference.server.service import Settings

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = {"model": "minimind", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "minimind", "prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.fixture(scope="module")
def server():
    with served(max_body=20_000, cors_origins=("http://localhost:3000",)) as server:
        yield server
        answer = server.http.post(CHAT, json=HELLO)
        assert answer.status_code == 200, "after all that it answers as before"


def chat(**changes) -> tuple[str, dict]:
    return CHAT, {**HELLO, **changes}


def text(**changes) -> tuple[str, dict]:
    return COMPLETIONS, {**TEXT, **changes}


def schema(content: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}


REFUSED = [
    (chat(model="gpt-4"), 404, "model"),
    (chat(model="minimind:nobody"), 404, "model"),
    (chat(messages=[]), 400, "messages"),
    (chat(messages=None), 400, "messages"),
    (chat(messages=[{"role": "wizard", "content": "hi"}]), 400, "messages.0.role"),
    (chat(messages=[{"role": "user", "content": 5}]), 400, "messages.0.content"),
    (chat(messages=[{"role": "user"}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": [IMAGE]}]), 400, "messages.0.content"),
    (chat(messages=[{"role": "user", "content": "长" * 2 * CONTEXT}]), 400, "messages"),
    (chat(temperature=-1), 400, "temperature"),
    (chat(temperature=2.5), 400, "temperature"),
    (chat(top_p=1.5), 400, "top_p"),
    (chat(n=0), 400, "n"),
    (chat(n=1000), 400, "n"),
    (chat(max_tokens=0), 400, "max_tokens"),
    (chat(max_tokens=CONTEXT), 400, "max_tokens"),
    (chat(max_completion_tokens=-2), 400, "max_completion_tokens"),
    (chat(top_logprobs=3), 400, "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (chat(stop=["a"] * 17), 400, "stop"),
    (chat(logit_bias={"6400": 1}), 400, "logit_bias"),
    (chat(logit_bias={"x": 1}), 400, "logit_bias"),
    (chat(logit_bias={"5": 101}), 400, "logit_bias"),
    (chat(seed="x"), 400, "seed"),
    (chat(presence_penalty=3), 400, "presence_penalty"),
    (chat(response_format={"type": "xml"}), 400, "response_format.type"),
    (chat(response_format={"type": "json_schema"}), 400, "response_format"),
    (chat(response_format=schema({"type": "nothing"})), 400, "response_format"),
    (chat(response_format=schema({"$ref": "https://example.org/schema"})), 400, "response_format"),
    (chat(tool_choice="required"), 400, "tool_choice"),
    (chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), 400, "tool_choice"),
    (chat(tools=[TOOL, TOOL]), 400, "tools"),
    (chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), 400, "tools.0.type"),
    (chat(functions=[{"name": "f"}]), 400, "functions"),
    (chat(modalities=["audio"]), 400, "modalities"),
    (text(prompt=[]), 400, "prompt"),
    (text(prompt=[[]]), 400, "prompt"),
    (text(prompt=[6400]), 400, "prompt"),
    (text(prompt=["a"] * 9), 400, "prompt"),
    (text(max_tokens=0), 400, "max_tokens"),
    (text(best_of=3), 400, "best_of"),
    (text(suffix="x"), 400, "suffix"),
    (text(logprobs=21), 400, "logprobs"),
    ((EMBEDDINGS, {"model": "minimind", "input": []}), 400, "input"),
    ((EMBEDDINGS, {"model": "minimind", "input": "a", "dimensions": 5}), 400, "dimensions"),
]


@pytest.mark.parametrize(("request_", "status", "param"), REFUSED, ids=lambda value: str(value)[:70])
def test_impossible_values_name_their_field(server, request_, status, param):
    path, body = request_
    answer = server.http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert answer.json().keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{bad", 400),
        (b"[1]", 400),
        (b"", 400),
        (b'{"model": "minimind", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', 404),
        (b'{"model": "minimind", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', 400),
        (b"[" * 19_000, 400),
        (b'{"model": "' + b"a" * 20_000 + b'"}', 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies_that_are_no_request(server, content, status):
    headers = {"content-type": "application/json"}
    answer = server.http.post(CHAT, content=content, headers=headers)
    assert answer.status_code == status and answer.json()["error"]["message"]
    in_pieces = server.http.post(CHAT, content=iter([content[:9000], content[9000:]]), headers=headers)
    assert in_pieces.status_code == status


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405)])
def test_paths_and_methods_that_are_not_there(server, method, path, status):
    answer = server.http.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_null_is_the_same_as_absent(server):
    nothing = dict.fromkeys(["temperature", "top_p", "n", "stop", "tools", "logprobs", "stream", "seed", "logit_bias"])
    assert server.http.post(CHAT, json={**HELLO, **nothing, "max_tokens": 2}).status_code == 200


def test_pages_of_other_origins(server):
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    answer = server.http.options(CHAT, headers=preflight)
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "access-control-allow-credentials" not in answer.headers
    evil = server.http.options(CHAT, headers={**preflight, "Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in evil.headers


def test_the_key(caplog):
    caplog.set_level("INFO")
    with served(Scripted("好"), api_key="sesame", cors_origins=("*",)) as server:
        assert server.client(api_key="sesame").models.list().data[0].id == "minimind"
        for wrong in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sesame"},
            {"Authorization": "Basic sesame"},
        ):
            answer = server.http.post(CHAT, json=HELLO, headers={**wrong, "Origin": "http://a.example"})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["access-control-allow-origin"] == "*"  # or a browser could not read the error
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        assert server.http.get("/health").status_code == 200
        server.client(api_key="sesame").chat.completions.create(**HELLO)
    assert "sesame" not in caplog.text and "wrong" not in caplog.text


def test_a_full_queue_answers_at_once_that_it_is_full():
    with served(model=random_model(2**15), max_rows=1) as server:  # 32,000 tokens take a while
        endless = {**HELLO, "max_tokens": -1, "extra_body": {"ignore_eos": True}}
        server.engine.max_queue = 1
        client = server.client()
        with client.chat.completions.create(**endless, stream=True) as first:
            next(first)
            while server.engine.stats().running < 1:
                time.sleep(0.01)
            with client.chat.completions.create(**endless, stream=True) as second:
                next(second)
                begin = time.monotonic()
                refused = server.http.post(CHAT, json=HELLO)
                assert time.monotonic() - begin < 2  # 0.1 s on a machine that is not busy
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        assert server.client(max_retries=5).chat.completions.create(**HELLO, max_tokens=2).usage
        assert 'rejections_total{reason="queue_full"} 1.0' in server.http.get("/metrics").text


def test_several_answers_are_asked_for_all_or_none():
    with served(Scripted(is_holding=True)) as server:
        server.engine.max_queue = 2
        submit, count = server.engine.submit, []

        def submit_two(request, on_delta):
            count.append(1)
            if len(count) > 2:
                raise EngineDead("no more")
            return submit(request, on_delta)

        server.engine.submit = submit_two
        assert server.http.post(CHAT, json={**HELLO, "n": 3}).status_code == 503
        assert all(answer.is_cancelled.is_set() for answer in server.engine.answers)


def test_an_answer_that_takes_too_long():
    with served(Scripted("好", is_holding=True), settings=Settings(request_timeout=0.1)) as server:
        with pytest.raises(openai.APIStatusError) as refused:
            server.client(max_retries=2).chat.completions.create(**HELLO)
        assert refused.value.status_code == 408 and refused.value.code == "request_timeout"
        assert len(server.engine.answers) == 1, "the client must not ask again"
        assert server.engine.answers[0].is_cancelled.is_set()
        with pytest.raises(openai.APIError, match="longer than the 0.1 seconds"):
            list(server.client().chat.completions.create(**HELLO, stream=True))


def test_an_error_in_the_middle_of_a_stream():
    class Failing(Scripted):
        def submit(self, request, on_delta):
            answer = super().submit(request, lambda item: item.finish_reason or on_delta(item))
            on_delta(FloatingPointError("/secret/path: NaN"))
            return answer

    with served(Failing("好")) as server:
        text = ""
        with pytest.raises(openai.APIError, match="internal error"):
            for chunk in server.client().chat.completions.create(**HELLO, stream=True):
                text += chunk.choices[0].delta.content
        answer = server.http.post(CHAT, json=HELLO)
    assert text == "好" and answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text


def test_a_dead_engine_is_not_healthy():
    with served(Scripted()) as server:
        server.engine.is_alive = False
        assert server.http.get("/health").status_code == 503


def test_a_pretrained_model_continues_text_only():
    settings = Settings(params=SamplingParams(4), continue_text=True)
    with served(Scripted("好"), settings=settings) as server:
        assert server.http.post(CHAT, json=HELLO).status_code == 400
        assert server.http.post(COMPLETIONS, json=TEXT).json()["choices"][0]["text"] == "好"


def test_old_turns_are_dropped_only_where_that_is_wanted():
    turns = [{"role": "user", "content": "说" * 60}, {"role": "assistant", "content": "好"}] * 5
    long = {**HELLO, "messages": [*turns, *HELLO["messages"]]}
    with served(Scripted("好"), settings=Settings(drop_old_turns=True)) as server:
        usage = server.http.post(CHAT, json=long).json()["usage"]
        assert 60 < usage["prompt_tokens"] <= CONTEXT // 2
    with served(Scripted("好")) as server:
        error = server.http.post(CHAT, json=long).json()["error"]
        assert error["code"] == "context_length_exceeded"


def test_the_log_has_no_prompts_unless_asked(caplog):
    caplog.set_level("INFO", "minimind.server")
    with served(Scripted("回答")) as server:
        server.client().chat.completions.create(**{**HELLO, "messages": [{"role": "user", "content": "秘密"}]})
    assert '"prompt_tokens"' in caplog.text and "秘密" not in caplog.text and "回答" not in caplog.text
    with served(Scripted("回答"), settings=Settings(log_prompts=True)) as server:
        server.client().chat.completions.create(**{**HELLO, "messages": [{"role": "user", "content": "秘密"}]})
    assert "秘密" in caplog.text and "回答" in caplog.text
