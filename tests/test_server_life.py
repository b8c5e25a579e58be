"""How answers end early: the client goes away, or the server is told to stop. And that nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
from served import Scripted, random_model, served

from inference.server import stream
from inference.server.service import Settings
from inference.server.serving import listen
from model.loading import save_weights, weights_path
from model.record import write_record

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"
HELLO = {"model": "minimind", "messages": [{"role": "user", "content": "hi"}]}
ENDLESS = {**HELLO, "max_tokens": -1, "ignore_eos": True}


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_client_that_leaves_a_stream_stops_the_answer():
    with served(model=random_model(2**15)) as server:
        with server.http.stream("POST", CHAT, json={**ENDLESS, "stream": True}) as response:
            lines = response.iter_lines()
            for _ in range(5):
                next(lines)
        wait_until(lambda: server.engine.stats().finished.get("cancelled") == 1)
        assert server.engine.stats().running == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_before_the_first_token_leaves_the_queue(streaming):
    with served(Scripted(is_holding=True)) as server:
        with contextlib.suppress(httpx2.ReadTimeout):
            server.http.post(CHAT, json={**HELLO, "n": 2, "stream": streaming}, timeout=0.3)
        wait_until(lambda: len(server.engine.answers) == 2)
        wait_until(lambda: all(answer.is_cancelled.is_set() for answer in server.engine.answers))


def test_a_stream_that_waits_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr("inference.server.completion.IDLE", 0.05)
    with served(Scripted("好", is_holding=True)) as server:
        with server.http.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
            text = ""
            for piece in response.iter_text():
                text += piece
                if stream.KEEP_ALIVE in text:
                    server.engine.release()
        assert text.endswith(stream.DONE) and "好" in text


def test_answers_leave_no_thread_behind():
    with served(settings=Settings(request_timeout=60)) as server:
        server.http.post(CHAT, json={**HELLO, "max_tokens": 2})
        before = threading.active_count()
        for _ in range(20):
            assert server.http.post(CHAT, json={**HELLO, "max_tokens": 2}).status_code == 200
        assert threading.active_count() <= before + 1


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("out")
    model = random_model(2**13)
    path = weights_path(directory, "full_sft", model.config)
    save_weights(model.state_dict(), path)
    write_record(path, model.config)
    return directory


@contextlib.contextmanager
def program(out_dir: Path, *flags: str):
    """The script itself: (process, address)."""
    command = [sys.executable, ROOT / "scripts" / "serve_openai_api.py", "--out_dir", out_dir, "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, command)], env=environment, **pipes) as process:
        try:
            yield process, process.stdout.readline().split()[0].removesuffix("/v1")
        finally:
            process.kill()


def test_sigterm_lets_running_answers_finish(out_dir):
    with program(out_dir) as (process, url):
        ask = {**HELLO, "max_tokens": 600, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", url + CHAT, json=ask, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(url))
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert process.wait(timeout=20) == 0


def test_after_the_shutdown_timeout_nobody_is_waited_for(out_dir):
    with program(out_dir, "--shutdown_timeout", "0", "--max_rows", "1") as (process, url):
        with httpx2.stream("POST", url + CHAT, json={**ENDLESS, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx2.HTTPError):
                list(lines)
        assert process.wait(timeout=10) == 0


def is_refused(url: str) -> bool:
    try:
        httpx2.get(url + "/health")
    except httpx2.TransportError:
        return True
    return False


def test_a_port_that_is_taken_is_named_with_the_remedy():
    with listen("127.0.0.1", 0) as first, pytest.raises(ValueError, match="another --port"):
        listen("127.0.0.1", first.getsockname()[1])
