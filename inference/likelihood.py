"""How likely is a text after another one? Multiple-choice benchmarks ask a language model nothing else.

A question with options is answered without generating anything: each option is put behind the question, and the one
with the greatest log-likelihood

    log p(option | question) = sum over its tokens t of log p(token_t | question, tokens before t)

is the model's choice (GPT-3, Brown et al. 2020, section 2.4).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of the continuation whose likelihood is asked for; neither is empty."""


@dataclass(frozen=True)
class Scored:
    """One continuation: `log_likelihood` in nats, and whether greedy decoding would have written just that."""

    log_likelihood: float
    is_greedy: bool


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int = 32
) -> Iterator[tuple[int, Scored]]:
    """Score every pair, longest first; yields (index in `pairs`, result).

    Pairs that need the same forward pass share it. After a question with four letters to choose from, the input is
    the question each time, as the last token of a continuation is never read, only predicted:

        context 5 6 7, continuation A:     input 5 6 7     targets A
        context 5 6 7, continuation B:     input 5 6 7     targets B          the same row
        context 5 6 7, continuation 8 9:   input 5 6 7 8   targets 8 9        another row

    Args:
        model: a causal language model in evaluation mode.
        pairs: where context and continuation together are longer than the model's context, the left end is cut off.
        batch_size: rows of one forward pass, of similar length.

    Raises:
        ValueError: a context or a continuation is empty, or a continuation alone is longer than the model's context.
    """
    limit = model.config.max_position_embeddings
    pairs_of_row = defaultdict(list)
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {index}: context and continuation must both hold a token")
        if len(continuation) > limit:
            raise ValueError(f"pair {index}: {len(continuation)} tokens do not fit into the model's context of {limit}")
        row = [*context, *continuation][-limit - 1 : -1]
        pairs_of_row[tuple(row)].append(index)
    # By length, so that neighbours need little padding; the longest first, so that what is too large fails at once.
    rows = sorted(pairs_of_row, key=len, reverse=True)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        wanted = [(i, index) for i, row in enumerate(batch) for index in pairs_of_row[row]]
        targets = [pairs[index][1] for _, index in wanted]
        scores = _score_batch(model, batch, [i for i, _ in wanted], targets)
        for (_, index), scored in zip(wanted, scores, strict=True):
            yield index, scored


def _score_batch(
    model: PreTrainedModel, batch: list[tuple[int, ...]], rows: list[int], targets: list[Sequence[int]]
) -> list[Scored]:
    """One forward pass over `batch`. `targets[k]` are the tokens predicted at the last positions of row `rows[k]`."""
    width = max(map(len, batch))
    # Padded on the right, where causal attention never looks: no mask is needed.
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=model.device)  # (B, T)
    starts = [len(batch[row]) - len(target) for row, target in zip(rows, targets, strict=True)]
    first = min(starts)  # logits of earlier positions are not needed: V of them a position are most of the work
    logits = model(input_ids, use_cache=False, logits_to_keep=width - first).logits  # (B, T - first, V)

    row_of, position_of, token_of = [], [], []  # of each of the N target tokens of the batch
    for row, start, target in zip(rows, starts, targets, strict=True):
        row_of += [row] * len(target)
        position_of += range(start - first, start - first + len(target))
        token_of += target
    chosen = logits[_index(row_of, logits), _index(position_of, logits)].float()  # (N, V)
    tokens = _index(token_of, logits)  # (N,)
    log_probs = chosen.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
    greedy = (chosen.argmax(-1) == tokens).tolist()

    scored, end = [], 0
    for target in targets:
        begin, end = end, end + len(target)
        scored.append(Scored(sum(log_probs[begin:end]), all(greedy[begin:end])))
    return scored


def _index(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)
