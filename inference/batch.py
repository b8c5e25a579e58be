"""Continuous batching: texts join a batch and leave it at every step, each with a length and settings of its own.

One step of `Batch` reads pieces of new prompts, and then makes one token for every row whose prompt has been read.
No thread, no queue and no text here: those are in engine.py. Shapes: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inference.requests import Continuation, Request, problems_of
from inference.sampling import RowSampler
from model.cache import KVCache, Window, in_blocks
from model.model_lora import Adapter, load_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_CHUNK = 512  # prompt tokens per forward: a long prompt keeps the other rows waiting no longer than that


class Batch:
    """Rows of a key/value cache that are continued together.

    Running texts lie in rows 0, 1, 2, ... without gaps, so that a forward pass reads one piece of the cache; the rows
    behind are free, but keep what they hold: a request that begins with the same tokens, such as the next turn of a
    dialogue, need not read them again.

    Args:
        model: a causal language model in evaluation mode.
        max_rows: texts that run at once.
        context: most tokens of a row, prompt and answer; the model's own by default.
        eos_token_ids: for requests that name none.
        prefill_chunk: prompt tokens per forward, and roughly per step.
        reuse_prefixes: look for rows that hold the beginning of a new prompt.
        exact: give every request, bit for bit, the numbers that it gets alone. The CPU's matrix product adds up in
            another order for 1 row, for 2 to 15 and for more, so a row's logits differ in the last bits with how many
            run beside it. Here every step computes all `max_rows` rows, and no prefix is reused (a token read in a
            piece of other length has other last bits, too). Dense models in float32 with up to 48 rows only.

    Raises:
        ValueError: a model in training mode, where dropout would make every answer different; one whose cache is of
            another kind (see `model.cache.cache_shape`); or one that cannot be `exact`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int = 32,
        context: int | None = None,
        *,
        eos_token_ids: tuple[int, ...] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = True,
        exact: bool = False,
    ):
        if model.training:
            raise ValueError("the model is in training mode, where dropout is active: call model.eval() first")
        if exact and (model.dtype != torch.float32 or getattr(model.config, "use_moe", False) or max_rows > 48):
            raise ValueError("exact batches are of dense models in float32, with at most 48 rows: pass exact=False")
        longest = model.config.max_position_embeddings
        self.model, self.max_rows, self.context = model, max_rows, min(context or longest, longest)
        self.eos_token_ids, self.prefill_chunk = eos_token_ids, prefill_chunk
        self.reuse_prefixes, self.exact = reuse_prefixes and not exact, exact
        self.adapted: dict[str, nn.Module] = {}  # the model with an adapter, by the adapter's name
        self.running: list[Continuation] = []  # number i is in row i

        # Of each row, on the host: the tokens of prompt and answer, of which the cache holds the first
        # `cache.lengths[row]`; the model that read them; when it became free (the oldest is overwritten first).
        self.texts: list[list[int]] = [[] for _ in range(max_rows)]
        self.readers: list[nn.Module] = [model] * max_rows
        self.freed_at = [0] * max_rows
        self.clock = 0
        # And on the device: the cache, the settings, the token that is read next, and its position.
        self.device = model.device
        self.cache = KVCache(model.config, max_rows, in_blocks(1), self.device, model.dtype)
        self.sampler = RowSampler(max_rows, model.config.vocab_size, self.device)
        self.next_tokens = torch.zeros(max_rows, 1, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(max_rows, 1, dtype=torch.int64, device=self.device)

    # Adapters

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Know a LoRA adapter by a name, in the place of one that had it. Raises ValueError if it does not fit."""
        # New modules around the very same weights: another copy of the model costs nothing but Python objects.
        weights = {id(parameter): parameter for parameter in self.model.parameters()}
        model = copy.deepcopy(self.model, weights)
        load_lora(model, adapter)
        self.adapted[name] = model.eval()

    # Joining and leaving

    def check(self, request: Request) -> None:
        """Raises ValueError with everything that makes a request impossible."""
        if problems := problems_of(request, self.model.config.vocab_size, self.context, list(self.adapted)):
            raise ValueError("; ".join(problems))

    @torch.inference_mode()
    def add(self, request: Request) -> Continuation:
        """Let a request join; a row must be free. Raises ValueError as `check` does."""
        self.check(request)
        model = self.model if request.adapter is None else self.adapted[request.adapter]
        row = len(self.running)
        n_reused = self._take_row(request, model)
        budget = min(request.params.max_new_tokens, self.context - len(request.prompt))
        self.cache.reserve(len(request.prompt))
        self.sampler.begin(row, request.params, request.prompt, budget)
        self.texts[row], self.readers[row] = list(request.prompt), model
        self.next_tokens[row] = request.prompt[-1]
        self.positions[row] = len(request.prompt) - 1
        self.running.append(Continuation(request, model, budget, row, n_reused))
        return self.running[-1]

    def _take_row(self, request: Request, model: nn.Module) -> int:
        """Prepare the first free row; returns how many tokens of the prompt it holds already."""
        first_free = len(self.running)
        oldest = min(range(first_free, self.max_rows), key=lambda row: self.freed_at[row])
        held = [0] * self.max_rows
        if self.reuse_prefixes and not request.prompt_logprobs:
            for row in range(self.max_rows):
                if self.readers[row] is model:
                    # The prompt's last token is read again in any case: its logits are not kept.
                    known = self.texts[row][: self.cache.lengths[row]]
                    held[row] = common_prefix(known, request.prompt[:-1])
        best = max(range(self.max_rows), key=lambda row: held[row])
        # A free row is taken over if most of it is of use: this is how a dialogue goes on. If only the beginning is
        # (a system message that all dialogues share), it stays for whoever may come back, and the beginning is copied.
        if best >= first_free and 2 * held[best] >= self.cache.lengths[best]:
            chosen = best
        else:
            chosen = oldest
            if held[best] and chosen != best:
                self.cache.copy(best, chosen, held[best])
        self._swap(chosen, first_free)
        self.cache.lengths[first_free] = held[best]
        return held[best]

    @torch.inference_mode()
    def remove(self, continuation: Continuation) -> None:
        """Let a request leave; its row is free at once, and the last running one moves into the gap."""
        row, last = continuation.row, len(self.running) - 1
        if continuation.error is not None:
            self.cache.clear(row)  # it may hold NaN
        self._swap(row, last)
        self.running.pop()
        self.positions[last] = 0  # a place that is there, for rows computed without need
        self.clock += 1
        self.freed_at[last] = self.clock

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        self.cache.swap(a, b)
        self.sampler.swap(a, b)
        for table in (self.next_tokens, self.positions):
            table[[a, b]] = table[[b, a]]
        for facts in (self.texts, self.readers, self.freed_at):
            facts[a], facts[b] = facts[b], facts[a]
        if max(a, b) < len(self.running):
            self.running[a], self.running[b] = self.running[b], self.running[a]
            self.running[a].row, self.running[b].row = a, b

    # One step

    @torch.inference_mode()
    def step(self) -> list[Continuation]:
        """Read about `prefill_chunk` tokens of prompts, then make a token for every row that is ready.

        Returns:
            The continuations that have a new token or are over; those that are over have left.
        """
        self._read_prompts()
        self.cache.reserve(max((len(text) for text in self.texts[: len(self.running)]), default=0))
        advanced = [continuation for continuation in self.running if continuation.error is not None]
        for model, rows in self._ready().items():
            group = [self.running[row] for row in rows]
            advanced += group
            try:
                self._make_tokens(model, rows)
            except Exception as error:  # whatever it is, these are over and the others go on
                for continuation in group:
                    continuation.error = error
        for continuation in advanced:
            if continuation.is_over:
                self.remove(continuation)
        return advanced

    def _read_prompts(self) -> None:
        """Read prompts but for their last tokens, which are read with the other rows' last tokens."""
        left = self.prefill_chunk
        while left > 0 and (rows := self._next_to_read()):
            longest = max(min(self._unread(row), self.prefill_chunk) for row in rows)
            try:
                self._read(rows, longest)
            except Exception as error:
                for row in rows:
                    self.running[row].error = error
            left -= len(rows) * longest

    def _unread(self, row: int) -> int:
        """How many tokens of its prompt a row has not read, without the last."""
        return len(self.running[row].request.prompt) - 1 - self.cache.lengths[row]

    def _next_to_read(self) -> list[int]:
        """Rows of the same model whose next pieces fit into one forward, padded to the longest of them."""
        rows, longest = [], 0
        for row, continuation in enumerate(self.running):
            if continuation.error is not None or self._unread(row) <= 0:
                continue
            if rows and continuation.model is not self.running[rows[0]].model:
                continue
            longest = max(longest, min(self._unread(row), self.prefill_chunk))
            # Exact: one by one, so that nothing depends on who else comes.
            if rows and (self.exact or longest * (len(rows) + 1) > self.prefill_chunk):
                break
            rows.append(row)
        return rows

    def _read(self, rows: list[int], longest: int) -> None:
        """Read the next pieces of some prompts, at most `longest` tokens each.

        Shorter pieces are filled up with zeros. What those leave behind a row's end is never looked at: the mask ends
        at each row's own position, and the row's next token is written over it.
        """
        group = [self.running[row] for row in rows]
        starts = [self.cache.lengths[row] for row in rows]
        pieces = [c.request.prompt[:-1][start : start + longest] for c, start in zip(group, starts, strict=True)]
        self.cache.reserve(max(starts) + longest)
        input_ids = torch.tensor([piece + [0] * (longest - len(piece)) for piece in pieces], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(longest, device=self.device)
        window = Window(self.cache, self._index(rows), positions, in_blocks(max(starts) + longest))
        wanted = any(c.request.prompt_logprobs for c in group)
        logits = self._forward(group[0].model, input_ids, window, logits_to_keep=0 if wanted else 1)
        for i, (continuation, start, piece) in enumerate(zip(group, starts, pieces, strict=True)):
            end = start + len(piece)
            self.cache.lengths[continuation.row] = end
            if continuation.request.prompt_logprobs:
                following = torch.tensor(continuation.request.prompt[start + 1 : end + 1], device=self.device)
                top = continuation.request.top_logprobs or 0
                logprobs, tops = log_probabilities(logits[i, : len(piece)], following, top)
                continuation.prompt_logprobs += logprobs
                continuation.prompt_top_logprobs += tops

    def _ready(self) -> dict[nn.Module, list[int]]:
        """The rows that have read all but their last token, by model: one forward for each adapter in use."""
        groups: dict[nn.Module, list[int]] = {}
        for row, continuation in enumerate(self.running):
            if continuation.error is None and self.cache.lengths[row] == len(self.texts[row]) - 1:
                groups.setdefault(continuation.model, []).append(row)
        return groups

    def _make_tokens(self, model: nn.Module, rows: list[int]) -> None:
        """Read the last token of some rows, sample the next, and note them."""
        logits, tokens = self._next_tokens(model, rows)
        # Nothing before made the host wait; now it must know the tokens, to see who is finished.
        is_finite = logits.amax(dim=-1).isfinite()  # the largest of numbers with a NaN among them is NaN
        chosen = torch.where(is_finite, tokens, -1).tolist()
        group = [self.running[row] for row in rows]
        wanted = [c.request.top_logprobs for c in group if c.request.top_logprobs is not None]
        logprobs, tops = [None] * len(rows), [None] * len(rows)
        if wanted:
            logprobs, tops = log_probabilities(logits, tokens, max(wanted))
        for continuation, token, logprob, top in zip(group, chosen, logprobs, tops, strict=True):
            self._append(continuation, token, logprob, top)

    def _next_tokens(self, model: nn.Module, rows: list[int]) -> tuple[Tensor, Tensor]:
        """The logits (B, V) after the last tokens of some rows, and the tokens (B,) sampled from them."""
        length = max(self.cache.lengths[row] for row in rows) + 1
        computed = self._index(range(self.max_rows) if self.exact else rows)
        window = Window(self.cache, computed, self.positions[computed], in_blocks(length))
        logits = self._forward(model, self.next_tokens[computed], window, logits_to_keep=1)[:, -1]
        if self.exact:
            logits = logits[rows]
        index = self._index(rows)
        tokens = self.sampler.sample(self._constrain(logits, rows), rows, index)
        self.next_tokens[index] = tokens[:, None]
        self.positions[index] += 1
        return logits, tokens

    def _append(self, continuation: Continuation, token: int, logprob: float | None, top: dict | None) -> None:
        """Note a new token, and whether it was the last."""
        row, request = continuation.row, continuation.request
        self.cache.lengths[row] += 1
        self.texts[row].append(token)
        if continuation.error is not None:  # its hook failed
            return
        if token < 0:
            continuation.error = FloatingPointError("the model's logits are not finite: its weights are damaged")
            return
        if token in (self.eos_token_ids if request.eos_token_ids is None else request.eos_token_ids):
            continuation.finish_reason = "stop"
            return
        continuation.tokens.append(token)
        if request.top_logprobs is not None:
            continuation.logprobs.append(logprob)
            continuation.top_logprobs.append(dict(list(top.items())[: request.top_logprobs]))
        if len(continuation.tokens) == continuation.budget:
            continuation.finish_reason = "length"

    def _constrain(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Rule out what the requests' hooks do not allow: (B, V) -> (B, V)."""
        forbidden = None
        for i, row in enumerate(rows):
            continuation = self.running[row]
            if continuation.request.allowed_tokens is None:
                continue
            try:
                allowed = continuation.request.allowed_tokens(continuation.tokens)
                if allowed is not None and not allowed.any():
                    raise ValueError("allowed_tokens allows no token")
                if allowed is not None:
                    forbidden = torch.zeros_like(logits, dtype=torch.bool) if forbidden is None else forbidden
                    forbidden[i] = ~allowed.to(logits.device)
            except Exception as error:  # of somebody's hook: only this request is over
                continuation.error = error
        return logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)

    def _forward(self, model: nn.Module, input_ids: Tensor, window: Window, logits_to_keep: int) -> Tensor:
        """(B, T) token ids -> logits (B, logits_to_keep or T, V)."""
        return model(
            input_ids,
            position_ids=window.positions,
            attention_mask=window.mask,
            past_key_values=window,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits

    def _index(self, rows: list[int] | range) -> slice | Tensor:
        """Rows as a slice, which makes views, if there are no gaps between them."""
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.device)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> tuple[list[float], list[dict[int, float]]]:
    """log softmax (N, V) at the tokens (N,), and {token: log-probability} of the `top` likeliest, largest first."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
    if top == 0:
        return chosen, [{} for _ in chosen]
    values, ids = logprobs.topk(top, dim=-1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return chosen, [dict(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
