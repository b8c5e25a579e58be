"""POST /v1/chat/completions: messages in, the assistant's next message out."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from inference.engine import Delta, Request
from inference.server.completion import Choice, Completion
from inference.server.disconnect import unless_gone
from inference.server.errors import ApiError
from inference.server.protocol import ChatMessage, ChatRequest
from inference.server.replies import CALL, END_OF_CALL, Piece, ReplyParser
from inference.server.run import Run
from inference.server.service import Service, check_stream_options, stop_strings
from inference.server.stream import EventStream
from inference.server.tools import Offer, described, offer_of, parse_call
from model.chat_format import Message


async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
    """The endpoint. Raises ApiError."""
    service: Service = http.app.state.service
    check(service, body)
    adapter, offer = service.adapter_of(body.model), offer_of(body)
    messages = [to_message(message, i) for i, message in enumerate(body.messages)]
    if offer.functions:
        messages = with_tools(messages, offer)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens == 0:
        raise ApiError(400, "max_tokens is 0: ask for at least 1 token", param="max_tokens")
    prompt = await run_in_threadpool(encode, service, messages, max_tokens)
    params = service.params(body, len(prompt), max_tokens)

    n = body.n or 1
    hooks = await run_in_threadpool(constrain, service, body, offer, n)
    requests = [
        Request(
            prompt,
            one,
            stop=stop_strings(body),
            eos_token_ids=() if body.ignore_eos else None,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            adapter=adapter,
            allowed_tokens=hook,
        )
        for one, hook in zip(service.each_seed(params, n), hooks, strict=True)
    ]
    run = Run(service.engine, requests, service.metrics, service.settings.request_timeout)
    completion = Completion(
        service,
        body,
        run,
        [ChatChoice(service, body, offer) for _ in requests],
        n=n,
        name="chat.completion.chunk" if body.stream else "chat.completion",
        prefix="chatcmpl",
        record=http.scope["record"],
    )
    if service.settings.log_prompts:
        http.scope["record"]["prompt"] = messages
    if body.stream:
        return EventStream(run, completion.chunks())
    return JSONResponse(await unless_gone(http, completion.whole()))


def check(service: Service, body: ChatRequest) -> None:
    """Raises ApiError for what is wrong or cannot be done."""
    check_stream_options(body)
    if service.settings.continue_text:
        raise ApiError(
            400,
            "this is a pretrained model: it continues text and knows no chat. Use /v1/completions, or start the server "
            "with another --model_mode",
            param="model",
        )
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.modalities and body.modalities != ["text"]:
        raise ApiError(400, "this model reads and writes text only", param="modalities")


def to_message(message: ChatMessage, index: int) -> Message:
    """A message of OpenAI's as one of ours: parts become one text. The model does not see names and ids."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        texts = []
        for part in message.content:
            text = part.text if part.type == "text" else part.refusal if part.type == "refusal" else None
            if text is None:
                where = f"messages.{index}.content"
                raise ApiError(400, f"a part of the type {part.type!r}: this model reads text only", param=where)
            texts.append(text)
        content = "\n".join(texts)
    else:
        content = message.content
    result: Message = {"role": role, "content": content}
    if message.reasoning_content:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        result["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return result


def with_tools(messages: list[Message], offer: Offer) -> list[Message]:
    """The messages with the functions described in the first system message, which is made if there is none."""
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "tools": [described(function) for function in offer.functions]}, *messages[1:]]


def encode(service: Service, messages: list[Message], max_tokens: int | None) -> list[int]:
    """The prompt's token ids. Raises ApiError for messages that cannot be one."""
    limit = None
    if service.settings.drop_old_turns:
        wanted = service.settings.params.max_new_tokens if max_tokens is None else max(max_tokens, 1)
        limit = service.context - min(wanted, service.context // 2)  # leaves room for the answer
    try:
        return service.chat_format.encode_prompt(messages, max_tokens=limit)
    except ValueError as error:
        is_too_long = "need" in str(error) and limit is not None
        code = "context_length_exceeded" if is_too_long else None
        raise ApiError(400, str(error), param="messages", code=code) from error


def constrain(service: Service, body: ChatRequest, offer: Offer, n: int) -> list:
    """What the n answers must be: a hook each, or None."""
    wanted = body.response_format
    if offer.is_forced:
        return service.constraints.call(list(offer.functions), n)
    if wanted is None or wanted.type == "text":
        return [None] * n
    if offer.functions:
        message = 'response_format and tools exclude each other: set tool_choice to "none", or force a tool'
        raise ApiError(400, message, param="response_format")
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise ApiError(400, "response_format json_schema needs json_schema: {name, schema}", param="response_format")
    return service.constraints.json(wanted.json_schema.json_schema if wanted.json_schema else None, n)


class ChatChoice(Choice):
    """One answer as it grows. Its deltas together are its message."""

    def __init__(self, service: Service, body: ChatRequest, offer: Offer):
        super().__init__()
        self._vocabulary, self._offer = service.vocabulary, offer
        self._has_logprobs = bool(body.logprobs)
        self._parser = ReplyParser(reasoning=not service.settings.raw_reasoning, tools=bool(offer.functions))
        self._content, self._reasoning = "", ""
        self._calls: list[dict] = []
        self._logprobs: list[dict] = []

    def begin(self) -> list[dict]:
        """Who speaks."""
        return [part({"role": "assistant", "content": ""})]

    def add(self, delta: Delta) -> list[dict]:
        """Take what is new; return it as choices of chunks, the finish reason in one of its own."""
        self.count(delta, self._parser.is_reasoning)
        pieces = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        parts = [part(self._take(piece)) for piece in pieces]
        if self._has_logprobs and delta.token_ids:
            logprobs = self._vocabulary.chat_logprobs(delta.token_ids, delta.logprobs, delta.top_logprobs)
            self._logprobs += logprobs["content"]
            if not parts:  # tokens that are no whole character yet
                parts = [part({})]
            parts[0]["logprobs"] = logprobs
        if delta.finish_reason is not None:
            self.finish_reason = "tool_calls" if self._calls and delta.finish_reason == "stop" else delta.finish_reason
            parts.append(part({}, self.finish_reason))
        return parts

    def _take(self, piece: Piece) -> dict:
        """A piece as a delta of the protocol."""
        if piece.kind == "reasoning":
            self._reasoning += piece.text
            return {"reasoning_content": piece.text}
        text = piece.text
        if piece.kind == "call":
            if call := parse_call(piece.text, self._offer):
                self._calls.append(call)
                return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}
            text = f"{CALL}{piece.text}{END_OF_CALL}"  # no call after all, so it stays visible
        self._content += text
        return {"content": text}

    def body(self) -> dict:
        """The whole answer."""
        message = {"role": "assistant", "content": self._content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message.update(tool_calls=self._calls, content=self._content or None)
        logprobs = {"content": self._logprobs, "refusal": None} if self._has_logprobs else None
        return {"message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


def part(delta: dict, finish_reason: str | None = None) -> dict:
    """A choice of a chunk."""
    return {"delta": delta, "logprobs": None, "finish_reason": finish_reason}
