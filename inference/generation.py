"""Continue prompts with a causal language model: batched (`generate`), one token at a time (`stream`), and as text.

Works for `MiniMindForCausalLM` and for any causal model of transformers. Prompts are lists of token ids; what comes
back are the new token ids only, never the prompt and never the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from inference.sampling import SamplingParams, make_generator, sample, tokens_seen
from model.cache import KVCache
from model.LMConfig import LMConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_CHUNK = 512  # prompt tokens per forward: bounds the memory of a long prompt, and changes no result


def new_token_budget(model: PreTrainedModel, prompt: list[int], params: SamplingParams) -> int:
    """How many new tokens a prompt may get: `max_new_tokens`, less where the context ends before (0 if it is full).

    Raises:
        ValueError: the prompt is empty; there is nothing to continue.
    """
    if not prompt:
        raise ValueError("the prompt holds no token: begin it with the tokenizer's <s>")
    return max(0, min(params.max_new_tokens, model.config.max_position_embeddings - len(prompt)))


class Decoder:
    """Prompts that are being continued together, one token a row and step.

    Shorter prompts are padded on the left, so that all rows end in the same column: B rows, S columns so far.

    Args:
        model: in evaluation mode.
        prompts: B non-empty lists of token ids.
        params: how to sample.
        new_tokens: the most tokens that will be asked for; reserves the memory of keys and values.
        prefill_chunk: prompt tokens per forward.

    Raises:
        ValueError: the model is in training mode, where dropout would make every answer different.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        params: SamplingParams,
        new_tokens: int,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        if model.training:
            raise ValueError("the model is in training mode, where dropout is active: call model.eval() first")
        device, B, width = model.device, len(prompts), max(map(len, prompts))
        self.model, self.params, self.prefill_chunk = model, params, prefill_chunk
        self.generator = make_generator(params.seed, device)
        self.input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        self.padding = torch.tensor([[width - len(prompt)] for prompt in prompts], device=device)  # (B, 1)
        self.columns = 0  # S: columns that the cache holds

        real = torch.arange(width + new_tokens, device=device) >= self.padding  # (B, capacity)
        self.mask = None if all(len(prompt) == width for prompt in prompts) else real
        self.seen = None
        if params.repetition_penalty != 1:
            self.seen = tokens_seen(self.input_ids, real[:, :width], model.config.vocab_size)
        self.cache = (
            KVCache(model.config, B, width + new_tokens, device, model.dtype)
            if isinstance(model.config, LMConfig)
            else DynamicCache(config=model.config)
        )

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Read the tokens not read yet (at first the prompts, then the last tokens) and sample the next: (B,) int64.

        Inference mode is entered here, in every step: around a generator it would hold for the consumer's code, and not
        at all in another thread (upstream G7).
        """
        for chunk in self.input_ids.split(self.prefill_chunk, dim=1):
            logits = self._forward(chunk)
        tokens = sample(logits, self.params, self.generator, self.seen)
        self.input_ids = tokens[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, self.input_ids, True)
        return tokens

    def _forward(self, input_ids: Tensor) -> Tensor:
        """Read (B, T) tokens; the logits (B, V) after the last."""
        start, self.columns = self.columns, self.columns + input_ids.shape[1]
        masked = {}
        if self.mask is not None:
            positions = torch.arange(start, self.columns, device=input_ids.device) - self.padding
            masked = {"attention_mask": self.mask[:, : self.columns], "position_ids": positions.clamp(min=0)}
        outputs = self.model(input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **masked)
        return outputs.logits[:, -1]


def generate(
    model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams, eos_token_id: int
) -> list[list[int]]:
    """Continue all prompts at once; memory grows with their number, so batch a long list.

    Args:
        model: a causal language model in evaluation mode.
        prompts: lists of token ids, of any lengths.
        params: how to sample; one seed serves the whole batch.
        eos_token_id: ends an answer; not part of it.

    Returns:
        The new tokens of each prompt: at most `max_new_tokens`, and prompt and answer together at most the model's
        context. A prompt that fills the context gets an empty answer (upstream G3).

    Raises:
        ValueError: an empty prompt, or a model in training mode.
    """
    budgets = [new_token_budget(model, prompt, params) for prompt in prompts]
    rows = [row for row, budget in enumerate(budgets) if budget > 0]
    answers = [[] for _ in prompts]
    if not rows:
        return answers
    decoder = Decoder(model, [prompts[row] for row in rows], params, max(budgets))
    limits = torch.tensor([budgets[row] for row in rows], device=model.device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    look_every = 1 if model.device.type == "cpu" else 16  # asking an accelerator makes the host wait for it
    steps = []
    for count in range(1, max(budgets) + 1):
        tokens = decoder.step()
        steps.append(tokens)
        done |= (tokens == eos_token_id) | (limits <= count)
        if count % look_every == 0 and done.all():
            break
    for row, tokens in zip(rows, torch.stack(steps, dim=1).tolist(), strict=True):
        tokens = tokens[: budgets[row]]
        answers[row] = tokens[: tokens.index(eos_token_id)] if eos_token_id in tokens else tokens
    return answers


class TokenStream:
    """The new tokens of one prompt, each as soon as it is known: an iterator of ints.

    `finish_reason` is None while more may come, then "stop" (end-of-sequence token) or "length" (`max_new_tokens` or
    the context is used up).
    """

    def __init__(self, model: PreTrainedModel, prompt: list[int], params: SamplingParams, eos_token_id: int):
        self.eos_token_id = eos_token_id
        self.remaining = new_token_budget(model, prompt, params)
        self.finish_reason: str | None = None if self.remaining else "length"
        self._decoder = Decoder(model, [prompt], params, self.remaining)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.finish_reason is not None:
            raise StopIteration
        token = self._decoder.step().item()
        self.remaining -= 1
        if token == self.eos_token_id:
            self.finish_reason = "stop"
            raise StopIteration
        if self.remaining == 0:
            self.finish_reason = "length"
        return token


def stream(model: PreTrainedModel, prompt: list[int], params: SamplingParams, eos_token_id: int) -> TokenStream:
    """`generate` for one prompt, token by token; the same tokens for the same seed, and the same errors."""
    return TokenStream(model, prompt, params, eos_token_id)


class TextStream:
    """Token ids in, text out, piece by piece, for a byte-level tokenizer.

    A Chinese character or an emoji may be spread over several tokens. Only whole characters come out, and all pieces
    together are exactly `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._pending: list[int] = []  # tokens since the text last ended with a whole character
        self._emitted = 0  # characters of theirs that are out already

    def push(self, token: int) -> str:
        """Take one token; return the text that it completes, often '' in the middle of a character."""
        self._pending.append(token)
        text = self._decode()
        whole = text.rstrip("\ufffd")  # how bytes that are no character, or not yet, are decoded
        piece = whole[self._emitted :]
        self._emitted = len(whole)
        if len(whole) == len(text):
            self._pending, self._emitted = [], 0
        return piece

    def finish(self) -> str:
        """What is left: '' or the replacement characters of a character that was never completed."""
        piece = self._decode()[self._emitted :]
        self._pending, self._emitted = [], 0
        return piece

    def _decode(self) -> str:
        return self.tokenizer.decode(self._pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)
