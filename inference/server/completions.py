"""POST /v1/completions: text or token ids in, what follows out. With `echo` and `logprobs` it scores text."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from inference.engine import Answer, Delta, Request
from inference.sampling import SamplingParams
from inference.server.completion import Choice, Completion
from inference.server.disconnect import unless_gone
from inference.server.errors import ApiError
from inference.server.protocol import MAX_INPUTS, CompletionRequest
from inference.server.run import Run
from inference.server.service import Service, check_stream_options, stop_strings
from inference.server.stream import EventStream

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
    """The endpoint. Raises ApiError."""
    service: Service = http.app.state.service
    check(body)
    adapter, n = service.adapter_of(body.model), body.n or 1
    prompts = await run_in_threadpool(prompts_of, service, body.prompt)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    requests = []
    for prompt in prompts:
        params = service.params(body, len(prompt.ids), max(max_tokens, 1) if body.echo else max_tokens)
        for one in service.each_seed(params, n):
            requests.append(to_request(body, prompt.ids, one, max_tokens, adapter))
    if len(requests) > service.engine.max_queue:
        message = f"{len(requests)} answers at once, the limit is {service.engine.max_queue}: send fewer prompts"
        raise ApiError(400, message, param="prompt")
    run = Run(service.engine, requests, service.metrics, service.settings.request_timeout)
    if service.settings.log_prompts:
        http.scope["record"]["prompt"] = body.prompt
    choices = [
        TextChoice(service, body, prompts[i // n], answer)  # answers 0 to n - 1 are to prompt 0
        for i, answer in enumerate(run.answers)
    ]
    completion = Completion(
        service, body, run, choices, n=n, name="text_completion", prefix="cmpl", record=http.scope["record"]
    )
    if body.stream:
        return EventStream(run, completion.chunks())
    return JSONResponse(await unless_gone(http, completion.whole()))


def check(body: CompletionRequest) -> None:
    """Raises ApiError for what is wrong or cannot be done."""
    check_stream_options(body)
    if body.suffix:
        raise ApiError(400, "suffix: this model cannot fill gaps, it only continues text", param="suffix")
    if body.best_of is not None and body.best_of not in (0, body.n or 1):
        message = f"best_of is {body.best_of}: only the same as n ({body.n or 1}) is possible"
        raise ApiError(400, message, param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0 and echo is off: there would be no answer", param="max_tokens")


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that they are."""

    ids: list[int]
    text: str


def prompts_of(service: Service, prompt: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """The prompts of a request: text begins with `<s>`, and none of it is read as a control token; ids are taken as
    they are. Raises ApiError for no prompt, or too many."""
    if isinstance(prompt, str):
        prompt = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    if not prompt or len(prompt) > MAX_INPUTS:
        raise ApiError(400, f"{len(prompt)} prompts: send 1 to {MAX_INPUTS}", param="prompt")
    prompts = []
    for one in prompt:
        if isinstance(one, str):
            prompts.append(Prompt(encode(service, one), one))
        else:
            check_ids(service, one)
            prompts.append(Prompt(one, service.tokenizer.decode(one, skip_special_tokens=True)))
    return prompts


def encode(service: Service, text: str) -> list[int]:
    """Token ids of text to be continued. Raises ApiError for half a surrogate pair."""
    try:
        return service.chat_format.encode_texts([text])[0][:-1]  # without </s>
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt") from error


def check_ids(service: Service, ids: list[int]) -> None:
    """Raises ApiError for token ids that there are not."""
    size = service.model.config.vocab_size
    if not ids or not all(0 <= token < size for token in ids):
        raise ApiError(400, f"token ids must be 0 to {size - 1}, and at least one", param="prompt")


def to_request(
    body: CompletionRequest, ids: list[int], params: SamplingParams, max_tokens: int, adapter: str | None
) -> Request:
    """One answer as the engine is asked for it."""
    # Whoever scores a prompt counts on exactly one token more than it has, be it the end.
    is_scoring = bool(body.echo) and body.logprobs is not None and max_tokens <= 1
    return Request(
        ids,
        params,
        stop=stop_strings(body),
        eos_token_ids=() if body.ignore_eos or is_scoring else None,
        top_logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        adapter=adapter,
    )


class TextChoice(Choice):
    """One answer as it grows, after its prompt if that is echoed."""

    def __init__(self, service: Service, body: CompletionRequest, prompt: Prompt, answer: Answer):
        super().__init__()
        self._vocabulary, self._prompt, self._answer = service.vocabulary, prompt, answer
        self._echoes, self._has_logprobs = bool(body.echo), body.logprobs is not None
        self._is_empty = body.max_tokens == 0  # one token is made all the same, and thrown away
        self._end = None if body.ignore_eos else service.tokenizer.eos_token_id
        self._has_begun, self._offset = False, 0
        self._text = ""
        self._logprobs: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}

    def add(self, delta: Delta) -> list[dict]:
        """Take what is new; return it as a choice of a chunk, those of the prompt with the first."""
        text, tokens = delta.text, delta.token_ids
        logprobs: list[float | None] = delta.logprobs
        tops: list[dict[int, float] | None] = delta.top_logprobs
        if self._is_empty:
            text, tokens, logprobs, tops = "", [], [], []
        else:
            self.count(delta)
        if self._echoes and not self._has_begun:
            text = self._prompt.text + text
            if self._has_logprobs:
                tokens = [*self._prompt.ids, *tokens]
                logprobs = [*self._answer.prompt_logprobs, *logprobs]
                tops = [*self._answer.prompt_top_logprobs, *tops]
        self._has_begun = True
        if delta.finish_reason is not None:
            is_end = self._end is not None and delta.token_ids[-1:] == [self._end]
            self.finish_reason = "stop" if is_end else delta.finish_reason
        self._text += text
        told = self._tell(tokens, logprobs, tops) if self._has_logprobs else None
        if not text and not tokens and delta.finish_reason is None:
            return []
        return [{"text": text, "logprobs": told, "finish_reason": self.finish_reason}]

    def _tell(self, tokens: list[int], logprobs: list[float | None], tops: list[dict[int, float] | None]) -> dict:
        told = self._vocabulary.completion_logprobs(tokens, logprobs, tops, self._offset)
        self._offset += sum(map(len, told["tokens"]))
        for name, values in told.items():
            self._logprobs[name] += values
        return told

    def body(self) -> dict:
        """The whole answer."""
        logprobs = self._logprobs if self._has_logprobs else None
        return {"text": self._text, "logprobs": logprobs, "finish_reason": self.finish_reason}
