"""A server in a thread of this process, with a random model of 100,000 parameters, or with answers known beforehand."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import httpx2
import openai
import torch
import uvicorn

from inference.engine import Delta, Engine
from inference.sampling import SamplingParams
from inference.server.app import make_app
from inference.server.service import Service, Settings
from model.LMConfig import LMConfig
from model.loading import load_tokenizer
from model.model import MiniMindForCausalLM

CONTEXT = 256


def random_model(context: int = CONTEXT) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=context)).eval()


class Scripted:
    """An engine that gives answers known beforehand, one character at a time, and notes what it is asked.

    With `is_holding` it answers nothing until `release` is called.
    """

    def __init__(self, text: str = "", is_holding: bool = False):
        self.text, self.requests, self.answers, self.is_alive = text, [], [], True
        self.adapters, self.max_queue, self.batch = ["medical"], 8, SimpleNamespace(context=CONTEXT)
        self._is_holding, self._held = is_holding, []

    def submit(self, request, on_delta):
        answer = SimpleNamespace(
            n_prompt=len(request.prompt), n_reused=0, prompt_logprobs=[], prompt_top_logprobs=[], text=self.text,
            is_cancelled=threading.Event(),
        )  # fmt: skip
        answer.cancel = answer.is_cancelled.set
        self.requests.append(request)
        self.answers.append(answer)
        self._held.append(on_delta)
        if not self._is_holding:
            self.release()
        return answer

    def release(self) -> None:
        for on_delta in self._held:
            for character in self.text:
                on_delta(Delta(character, [20]))
            on_delta(Delta("", finish_reason="stop"))
        self._held.clear()

    def stats(self):
        return SimpleNamespace(
            running=0, waiting=0, prompt_tokens=0, reused_tokens=0, generated_tokens=0, finished={"stop": 1}
        )


class Served:
    """Where a server is, its parts, and clients for it: a plain one, and OpenAI's."""

    def __init__(self, url: str, service: Service):
        self.url, self.service, self.engine = url, service, service.engine
        self.http = httpx2.Client(base_url=url, timeout=60)

    def client(self, strict: bool = True, **options) -> openai.OpenAI:
        """A client that refuses what is not exactly its types.

        These are narrower than the protocol in three places, where OpenAI's own server would be refused: null for the
        first token's log-probability, null for a finish reason in a stream of completions, embeddings in base64.
        """
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", _strict_response_validation=strict, **options)


@contextlib.contextmanager
def served(engine=None, model=None, settings: Settings | None = None, max_rows: int = 4, **options) -> Iterator[Served]:
    """Serve in a thread; `options` are those of `make_app`, `engine` replaces the real one."""
    tokenizer, model = load_tokenizer(), model or random_model()
    real = None if engine else Engine(model, tokenizer, max_rows=max_rows, max_queue=8)
    settings = settings or Settings(params=SamplingParams(16))
    service = Service(engine or real, model, tokenizer, settings)
    app = make_app(service, **options)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    place = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
    try:
        with place.http:
            yield place
    finally:
        server.should_exit = True
        thread.join()
        if real:
            real.close(timeout=0)
