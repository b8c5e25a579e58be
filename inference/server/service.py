"""What all endpoints share: the engine, the names of its models, and how a request becomes sampling parameters."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.server.constraints import Constraints
from inference.server.errors import ApiError
from inference.server.metrics import Metrics
from inference.server.protocol import UNTIL_THE_END, Sampling
from inference.server.vocabulary import Vocabulary
from model.chat_format import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_TOP_P = 1e-6
LEAST_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    Attributes:
        name: of the model; its adapters are "name:adapter".
        adapter: the one that `name` itself means, None for the model as it is.
        continue_text: the model continues text instead of answering, as after pretraining.
        params: for what a request leaves open; `max_new_tokens` for chat completions.
        request_timeout: seconds until an answer must be over.
        raw_reasoning: leave `<think>` in the content.
        drop_old_turns: leave out the oldest turns of a dialogue that is too long, instead of refusing it.
        log_prompts: write prompts and answers into the log.
    """

    name: str = "minimind"
    adapter: str | None = None
    continue_text: bool = False
    params: SamplingParams = SamplingParams()
    request_timeout: float = 600
    raw_reasoning: bool = False
    drop_old_turns: bool = False
    log_prompts: bool = False


class Service:
    """An engine as a server sees it."""

    def __init__(self, engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings):
        self.engine, self.model, self.tokenizer, self.settings = engine, model, tokenizer, settings
        self.chat_format, self.vocabulary = ChatFormat(tokenizer), Vocabulary(tokenizer)
        self.constraints = Constraints(tokenizer, model.config.vocab_size)
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self.context = engine.batch.context
        identity = f"{settings.name} {model.config.to_json_string()} {self.chat_format.fingerprint()} {model.dtype}"
        self.fingerprint = f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"

    def models(self) -> list[dict]:
        """All models, as `GET /v1/models` lists them."""
        names = [self.settings.name, *(f"{self.settings.name}:{adapter}" for adapter in self.engine.adapters)]
        return [{"id": name, "object": "model", "created": self.created, "owned_by": "minimind"} for name in names]

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a model's name means. Raises ApiError if there is no such model."""
        name, _, adapter = model.partition(":")
        if name == self.settings.name and not adapter and ":" not in model:
            return self.settings.adapter
        if name == self.settings.name and adapter in self.engine.adapters:
            return adapter
        known = ", ".join(entry["id"] for entry in self.models())
        raise ApiError(
            404, f"there is no model {model[:200]!r}; there are: {known}", param="model", code="model_not_found"
        )

    def params(self, request: Sampling, n_prompt: int, max_tokens: int | None) -> SamplingParams:
        """How to choose tokens, as the request says, or else the server's settings.

        Args:
            n_prompt: tokens of the prompt.
            max_tokens: what the request says about it.

        Raises:
            ApiError: prompt and answer do not fit into the context, or impossible values.
        """
        room = self.context - n_prompt
        if room < 1 or (max_tokens is not None and max_tokens > room):
            answer = f" and {max_tokens} for the answer" if max_tokens else ""
            raise ApiError(
                400,
                f"the context has {self.context} tokens, but the prompt needs {n_prompt}{answer}: shorten it, or ask "
                "for fewer tokens",
                param="messages" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        defaults = self.settings.params
        if max_tokens is None:
            max_tokens = min(defaults.max_new_tokens, room)
        elif max_tokens == UNTIL_THE_END:
            max_tokens = room
        given = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], LEAST_TOP_P)  # 0 is OpenAI's way to say: the likeliest only
        if given.get("temperature", 0) < LEAST_TEMPERATURE and "temperature" in given:
            given["temperature"] = 0.0
        if given.get("top_k") == -1:  # vLLM's "off"
            given["top_k"] = 0
        if request.seed is not None:
            given["seed"] = request.seed % 2**63  # negative ones are OpenAI's, too
        try:
            bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
        except ValueError as error:
            raise ApiError(400, f"logit_bias is by token id, a number: {error}", param="logit_bias") from error
        size = self.model.config.vocab_size
        if not all(0 <= token < size for token in bias):
            raise ApiError(400, f"logit_bias: token ids go from 0 to {size - 1}", param="logit_bias")
        try:
            return dataclasses.replace(defaults, max_new_tokens=max_tokens, logit_bias=bias, **given)
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from error

    def each_seed(self, params: SamplingParams, n: int) -> list[SamplingParams]:
        """The parameters of n answers to one prompt: a seed makes each reproducible, and all of them different."""
        if params.seed is None:
            return [params] * n
        return [dataclasses.replace(params, seed=(params.seed + i) % 2**63) for i in range(n)]


def check_stream_options(request: Sampling) -> None:
    """Raises ApiError for options of a stream where there is none."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is allowed only with stream: true", param="stream_options")


def stop_strings(request: Sampling) -> tuple[str, ...]:
    """The strings that end an answer; some clients send an empty one for none."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return tuple(stop for stop in stops if stop)
