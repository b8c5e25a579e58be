"""Constrained decoding: before every token, which ones keep the answer a piece of JSON, or a call of a tool.

The library llguidance turns a schema into an automaton and says which tokens it allows; the engine rules out the rest
(`Request.allowed_tokens`). So even a model that knows no JSON writes nothing else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from inference.server.errors import ApiError
from inference.server.protocol import Function

ANY_OBJECT = {"type": "object"}
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""No spaces but these: a small model could go on indenting for ever."""

Allowed = Callable[[list[int]], Tensor | None]


class Constraints:
    """Makes the hooks for `Request.allowed_tokens`.

    Args:
        tokenizer: must be one of the library tokenizers, as all of transformers' fast ones are.
        vocab_size: of the model, whose logits are masked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @functools.cached_property
    def _library(self):
        try:
            import llguidance
            import llguidance.hf  # optional, see requirements-optional.txt
        except ImportError as error:
            raise ApiError(
                400,
                "this server cannot force JSON or a tool: response_format, and a tool_choice other than none and auto, "
                'need `pip install "llguidance>=1.7,<2"` where it runs',
                code="unsupported",
            ) from error
        return llguidance

    @functools.cached_property
    def _tokens(self):
        return self._library.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocab_size)

    def json(self, schema: dict | None, n: int) -> list[Allowed]:
        """Hooks for n answers that are JSON of a schema, or any JSON object. Raises ApiError for an unusable schema."""
        grammar = self._library.LLMatcher.grammar_from_json_schema(_styled(schema or ANY_OBJECT))
        return self._hooks(grammar, n, "response_format")

    def call(self, tools: list[Function], n: int) -> list[Allowed]:
        """Hooks for n answers that are one call of one of the tools. Raises ApiError for unusable parameters."""
        # A tag is a token of its own, or ordinary text with a tokenizer that does not know it.
        added = self._tokenizer.get_added_vocab()
        begin, end = (f"<[{added[tag]}]>" if tag in added else f'"{tag}"' for tag in ("<tool_call>", "</tool_call>"))
        names = [f"call_{i}" for i in range(len(tools))]
        lines = [f'start: {begin} "\\n" ({" | ".join(names)}) "\\n" {end}']
        for i, tool in enumerate(tools):
            opening = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
            lines.append(f'call_{i}: {opening} arguments_{i} "}}"')
            lines.append(f"arguments_{i}: %json {_styled(tool.parameters or ANY_OBJECT)}")
        grammar = self._library.LLMatcher.grammar_from_lark("\n".join(lines))
        return self._hooks(grammar, n, "tools")

    def _hooks(self, grammar: str, n: int, param: str) -> list[Allowed]:
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0)
        if problem := matcher.get_error():
            raise ApiError(400, f"this schema cannot be used: {problem[:500]}", param=param, code="invalid_schema")
        return [Hook(matcher.deep_copy(), self._vocab_size, param) for _ in range(n)]


class Hook:
    """Which tokens may come next: called with the tokens so far, before every token of one answer."""

    def __init__(self, matcher, vocab_size: int, param: str):
        self._matcher, self._vocab_size, self._param = matcher, vocab_size, param
        self._read = 0

    def __call__(self, token_ids: list[int]) -> Tensor:
        """(V,) bool."""
        self._matcher.consume_tokens(token_ids[self._read :])
        self._read = len(token_ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)  # token i: bit i % 8 of byte i // 8
        if problem := self._matcher.get_error():
            message = f"the answer cannot be forced into this schema: {problem.splitlines()[0][:300]}"
            raise ApiError(400, message, param=self._param, code="invalid_schema")
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        return torch.from_numpy(allowed.astype(bool))


def _styled(schema: dict) -> str:
    return json.dumps({**schema, "x-guidance": STYLE})
