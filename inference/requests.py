"""What is asked of a batch, and what came of it: the two data classes that batch.py and engine.py work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from inference.sampling import SamplingParams

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how.

    Attributes:
        prompt: token ids, from `<s>` on.
        params: how tokens are chosen, and how many at most.
        stop: the text ends before the first of these strings; an Engine looks for them, a Batch knows no text.
        eos_token_ids: tokens that end the answer and are no part of it; () for none, None for the usual ones.
        top_logprobs: None for no log-probabilities, 0 for those of the sampled tokens, k for the k likeliest, too.
        prompt_logprobs: also those of the prompt's tokens.
        adapter: the name of the LoRA adapter to answer with; None for the model as it is.
        allowed_tokens: for constrained decoding: is given the new tokens so far, before every token, and returns which
            may come next, (V,) bool, or None for all.

    Log-probabilities are those that the model gives: natural logarithm, temperature 1, no penalties.
    """

    prompt: list[int]
    params: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] | None = None
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    adapter: str | None = None
    allowed_tokens: Callable[[list[int]], Tensor | None] | None = None


@dataclass(eq=False)
class Continuation:
    """A request in a batch, and what came of it so far.

    Attributes:
        tokens: the new ones, without prompt and end token.
        logprobs, top_logprobs: of each token, and {token: logprob} of the likeliest, where asked for.
        prompt_logprobs: of the prompt's tokens; None for the first, which nothing predicts.
        n_reused: tokens of the prompt that a row held already.
        finish_reason: None while more may come; "stop" (an end token), "length" (`max_new_tokens`, or the context is
            used up), "cancelled".
        error: what made it impossible to go on.
    """

    request: Request
    model: nn.Module
    budget: int  # the most new tokens
    row: int
    n_reused: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    prompt_top_logprobs: list[dict[int, float] | None] = field(default_factory=lambda: [None])
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.error is not None


def problems_of(request: Request, vocab_size: int, context: int, adapters: list[str]) -> list[str]:
    """Everything that makes a request impossible; empty when it can be answered."""
    ids, top, most = request.prompt, request.top_logprobs, min(MAX_TOP_LOGPROBS, vocab_size)
    outside = [token for token in (*ids, *request.params.logit_bias) if not 0 <= token < vocab_size]
    known = ", ".join(sorted(adapters)) or "the model itself"
    rules = [
        (ids, "the prompt holds no token: begin it with the tokenizer's <s>"),
        (len(ids) < context, f"the prompt has {len(ids)} tokens of {context} for prompt and answer: shorten it"),
        (not outside, f"there are no tokens {outside[:3]}: ids go from 0 to {vocab_size - 1}"),
        (top is None or 0 <= top <= most, f"top_logprobs is {top}: use 0 to {most}, or None"),
        (
            request.adapter is None or request.adapter in adapters,
            f"there is no adapter {request.adapter!r}, only {known}",
        ),
        (
            "" not in request.stop and len(request.stop) <= MAX_STOP_STRINGS,
            f"stop is {request.stop}: use at most {MAX_STOP_STRINGS} strings, none of them empty",
        ),
    ]
    return [message for valid, message in rules if not valid]
