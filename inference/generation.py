"""Continue prompts in the caller's own thread: all at once (`generate`), or one token at a time (`stream`).

Both are thin callers of `Batch`; programs with many callers use an Engine. Prompts are lists of token ids; what comes
back are the new token ids only, never the prompt and never the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from inference.batch import Batch
from inference.requests import Request
from inference.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams, eos_token_id: int, max_rows: int = 32
) -> list[list[int]]:
    """Continue all prompts.

    Args:
        model: a causal language model in evaluation mode.
        prompts: lists of token ids, of any lengths.
        params: how to sample; the first prompt gets the seed, the second the one after it, and so on.
        eos_token_id: ends an answer; not part of it.
        max_rows: prompts that run at once; memory grows with their number.

    Returns:
        The new tokens of each prompt: at most `max_new_tokens`, and prompt and answer together at most the model's
        context. A prompt that fills the context gets an empty answer (upstream G3).

    Raises:
        ValueError: an empty prompt, or a model in training mode.
    """
    context = model.config.max_position_embeddings
    batch = Batch(model, max(1, min(max_rows, len(prompts))), eos_token_ids=(eos_token_id,))
    waiting = []
    for i, prompt in enumerate(prompts):
        own = params if params.seed is None else replace(params, seed=(params.seed + i) % 2**63)
        if len(prompt) < context:
            waiting.append((i, Request(prompt, own)))
    waiting.reverse()  # the next one is the last
    answers, places = [[] for _ in prompts], {}
    while waiting or batch.running:
        while waiting and len(batch.running) < batch.max_rows:
            i, request = waiting.pop()
            places[batch.add(request)] = i
        for continuation in batch.step():
            if continuation.error is not None:
                raise continuation.error
            answers[places[continuation]] = continuation.tokens
    return answers


class TokenStream:
    """The new tokens of one prompt, each as soon as it is known: an iterator of ints.

    `finish_reason` is None while more may come, then "stop" (end-of-sequence token) or "length" (`max_new_tokens` or
    the context is used up).
    """

    def __init__(self, model: PreTrainedModel, prompt: list[int], params: SamplingParams, eos_token_id: int):
        self._batch = Batch(model, 1, eos_token_ids=(eos_token_id,))
        self.finish_reason: str | None = None
        if len(prompt) >= self._batch.context:
            self.finish_reason = "length"
        else:
            self._continuation = self._batch.add(Request(prompt, params))

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.finish_reason is not None:
            raise StopIteration
        before = len(self._continuation.tokens)
        while len(self._continuation.tokens) == before and not self._continuation.is_over:
            self._batch.step()  # a long prompt takes several
        if self._continuation.error is not None:
            raise self._continuation.error
        self.finish_reason = self._continuation.finish_reason
        if len(self._continuation.tokens) == before:
            raise StopIteration
        return self._continuation.tokens[-1]


def stream(model: PreTrainedModel, prompt: list[int], params: SamplingParams, eos_token_id: int) -> TokenStream:
    """`generate` for one prompt, token by token; the same tokens for the same seed, and the same errors."""
    return TokenStream(model, prompt, params, eos_token_id)
