"""Which documents share a batch, and what the batch looks like: right-padded rows of nearly equal length.

With causal attention a token never sees what stands to its right, so right-padded rows need no mask, and documents in
rows of their own never see each other. A batch is described by a list of ids; `plan_batches` is a pure function of
(lengths, budget, seed, epoch), hence "the plan and the next position in it" is all there is to say about progress.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from dataset.token_cache import TokenCache

PAD_MULTIPLE = 8  # padded lengths are multiples of it: few different shapes, aligned rows

Batch = dict[str, torch.Tensor]


def _ceil_divide(a: np.ndarray | int, b: int) -> np.ndarray | int:
    """a / b rounded up, in integers: 7 / 3 -> 3. Python's // rounds down, so of the negative, up."""
    return -(-a // b)


def _round_up(lengths: np.ndarray | int) -> np.ndarray | int:
    """To a multiple of PAD_MULTIPLE: 9 -> 16, 16 -> 16."""
    return _ceil_divide(lengths, PAD_MULTIPLE) * PAD_MULTIPLE


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] numbers), then the same from starts[1], ... as one array.

    starts 10 50, counts 3 2 -> 10 11 12 50 51. One long arange, 0 1 2 3 4, to which every range adds its start less the
    numbers before it: 10 - 0 three times, 50 - 3 twice.
    """
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


@dataclass(frozen=True)
class Sequences:
    """N token sequences of a cache, each to be one row of a batch.

    tokens        (total,) uint16  the cache's
    documents     (N,) document of the cache each sequence comes from; a long text gives several sequences
    starts        (N,) first token
    lengths       (N,) input positions: one less than tokens, since the last token is only predicted
    weights       (N,) supervised tokens
    spans         (M, 2) supervised tokens [start, end), absolute; sequence i has span_counts[i] of them from
    first_spans   (N,) on
    dropped       documents left out because no whole supervised span fits into max_seq_len tokens
    """

    tokens: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    spans: np.ndarray
    first_spans: np.ndarray
    span_counts: np.ndarray
    dropped: int

    @classmethod
    def from_cache(cls, cache: TokenCache, max_seq_len: int) -> "Sequences":
        """Cut the documents of a cache to at most max_seq_len tokens.

        Text becomes pieces that overlap by one token, so every token but the first of a document is predicted exactly
        once. A conversation keeps the supervised spans that fit as a whole and ends with the last of them; it is
        dropped and counted when none fits. So no answer is learned without its end (upstream D6).
        """
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len is {max_seq_len}; a sequence needs at least 2 tokens")
        if cache.kind == "text":
            return cls._from_texts(cache, max_seq_len)
        return cls._from_conversations(cache, max_seq_len)

    @classmethod
    def _from_texts(cls, cache: TokenCache, max_seq_len: int) -> "Sequences":
        """Cut texts into pieces.

        At max_seq_len 4, the 9 tokens 100 to 108 of a document become three pieces that read 3, 3 and 2 tokens and
        predict one further on, so that 8 tokens are predicted, each once:

            tokens 100 101 102 103          starts 100, lengths 3, span [101, 104)
            tokens 103 104 105 106          starts 103, lengths 3, span [104, 107)
            tokens 106 107 108              starts 106, lengths 2, span [107, 109)
        """
        stride = max_seq_len - 1
        predicted = np.diff(cache.offsets) - 1  # of each document; nothing predicts its first token
        pieces = _ceil_divide(predicted, stride)
        documents = np.repeat(np.arange(len(cache)), pieces)  # pieces 3, 1 -> 0 0 0 1
        # The number of each piece within its document is 0 1 2 0; `stride` tokens lie between their starts.
        starts = cache.offsets[documents] + stride * _ranges(np.zeros_like(pieces), pieces)
        lengths = np.minimum(stride, cache.offsets[documents + 1] - 1 - starts)
        return cls(
            tokens=cache.tokens,
            documents=documents,
            starts=starts,
            lengths=lengths,
            weights=lengths,
            spans=np.stack([starts + 1, starts + 1 + lengths], axis=1),
            first_spans=np.arange(len(starts)),
            span_counts=np.ones_like(starts),
            dropped=int((pieces == 0).sum()),
        )

    @classmethod
    def _from_conversations(cls, cache: TokenCache, max_seq_len: int) -> "Sequences":
        """Keep the answers that fit.

        At max_seq_len 30, a conversation that begins at token 100 and whose answers are [108, 112), [120, 125) and
        [130, 138) keeps the first two: the third would end 38 tokens after the beginning. It is read up to token 123
        (lengths 24), since 124, its last, is only predicted, and has 4 + 5 supervised tokens (weights 9).
        """
        document_of_span = np.repeat(np.arange(len(cache)), np.diff(cache.span_offsets))
        fits = cache.spans[:, 1] - cache.offsets[document_of_span] <= max_seq_len
        span_counts = np.bincount(document_of_span[fits], minlength=len(cache))
        documents = np.flatnonzero(span_counts)  # those that keep something
        starts = cache.offsets[documents]
        first_spans = cache.span_offsets[documents]
        span_counts = span_counts[documents]
        # Supervised tokens before each span of the cache: spans of 4, 5 and 8 -> 0 4 9 17.
        supervised_before = np.concatenate([[0], np.cumsum(cache.spans[:, 1] - cache.spans[:, 0])])
        return cls(
            tokens=cache.tokens,
            documents=documents,
            starts=starts,
            lengths=cache.spans[first_spans + span_counts - 1, 1] - starts - 1,
            weights=supervised_before[first_spans + span_counts] - supervised_before[first_spans],
            spans=cache.spans,
            first_spans=first_spans,
            span_counts=span_counts,
            dropped=len(cache) - len(documents),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, ids: np.ndarray) -> "Sequences":
        """The sequences with these ids, in this order, numbered anew from 0."""
        per_sequence = ("documents", "starts", "lengths", "weights", "first_spans", "span_counts")
        return replace(self, **{name: getattr(self, name)[ids] for name in per_sequence})

    def split(self, heldout_share: float, seed: int) -> tuple["Sequences", "Sequences"]:
        """(train, heldout) by document, so no piece of a held-out text is trained on. Depends on nothing but `seed`.

        At least one document is held out unless the share is 0.
        """
        heldout = _heldout(self.documents, heldout_share, seed)
        return self.take(np.flatnonzero(~heldout)), self.take(np.flatnonzero(heldout))

    def collate(self, ids: np.ndarray) -> Batch:
        """The batch of these sequences, int64 tensors; rows are right-padded with token 0.

        input_ids (B, T), lengths (B,) real positions of each row, positions (N,) flat indices b * T + t of the
        supervised positions, targets (N,) the token that follows there. Padding is never a target.

        Sequences that start at tokens 100 and 300 of the cache, of lengths 11 and 4, with the spans [109, 112) and
        [302, 305): T is 11 rounded up, 16. Row 0 reads tokens 100 to 110 and row 1 300 to 303. Targets are tokens 109
        110 111 302 303 304, and each is predicted one position before it, in its row: positions 8 9 10 and, after the
        16 of row 0, 17 18 19.
        """
        starts = self.starts[ids]
        lengths = self.lengths[ids]
        width = int(_round_up(lengths.max()))
        columns = np.arange(width)
        real = columns < lengths[:, None]  # (B, T)
        token_at = starts[:, None] + columns  # (B, T) where each position's token lies in the cache
        token_at = np.minimum(token_at, len(self.tokens) - 1)  # padding of the last sequence would read beyond it
        spans = self.spans[_ranges(self.first_spans[ids], self.span_counts[ids])]
        target_at = _ranges(spans[:, 0], spans[:, 1] - spans[:, 0])  # (N,) where each target lies in the cache
        shift = np.arange(len(starts)) * width - starts - 1  # from the cache to the batch: -101 and 16 - 301
        shift = np.repeat(shift, self.weights[ids])  # (N,) for each target that of its row
        batch = {
            "input_ids": np.multiply(self.tokens[token_at], real, dtype=np.int64),
            "lengths": lengths,
            "positions": target_at + shift,
            "targets": self.tokens[target_at].astype(np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}


@dataclass(frozen=True)
class Pairs:
    """P preference pairs; a unit of a batch is a pair, two rows, both padded to the longest row of the batch.

    rows      (2P,) sequences, row 2i the chosen and row 2i + 1 the rejected conversation of pair i
    pairs     (P,) number of the pair in the file's good lines
    lengths   (P,) padded positions the pair takes up at least: what `plan_batches` adds up
    dropped   pairs left out because one of the conversations does not fit whole into max_seq_len tokens
    """

    rows: Sequences
    dropped: int

    @classmethod
    def from_cache(cls, cache: TokenCache, max_seq_len: int) -> "Pairs":
        """A pair is kept only if both conversations keep every answer: half an answer is no preference.

        The cache holds chosen and rejected conversations in turn: documents 6 and 7 are pair 3.
        """
        rows = Sequences.from_cache(cache, max_seq_len)
        whole = np.diff(cache.span_offsets)[rows.documents] == rows.span_counts
        pair_of_row = rows.documents // 2
        complete = np.bincount(pair_of_row[whole], minlength=len(cache) // 2) == 2
        return cls(rows.take(np.flatnonzero(complete[pair_of_row])), dropped=int((~complete).sum()))

    def __len__(self) -> int:
        return len(self.rows) // 2

    @property
    def pairs(self) -> np.ndarray:
        return self.rows.documents[::2] // 2

    @property
    def lengths(self) -> np.ndarray:
        return 2 * _round_up(self.rows.lengths.reshape(-1, 2).max(axis=1))

    @property
    def weights(self) -> np.ndarray:
        """(P,) supervised tokens of both conversations."""
        return self.rows.weights.reshape(-1, 2).sum(axis=1)

    def take(self, ids: np.ndarray) -> "Pairs":
        return replace(self, rows=self.rows.take(np.stack([2 * ids, 2 * ids + 1], axis=1).ravel()))

    def split(self, heldout_share: float, seed: int) -> tuple["Pairs", "Pairs"]:
        """(train, heldout) by pair; see `Sequences.split`."""
        heldout = _heldout(self.pairs, heldout_share, seed)
        return self.take(np.flatnonzero(~heldout)), self.take(np.flatnonzero(heldout))

    def collate(self, ids: np.ndarray) -> Batch:
        """As `Sequences.collate` with 2P rows: first all chosen, then all rejected; and `pairs` (P,)."""
        batch = self.rows.collate(np.concatenate([2 * ids, 2 * ids + 1]))
        return {**batch, "pairs": torch.from_numpy(self.pairs[ids])}


def _heldout(documents: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(N,) bool: which entries belong to a held-out document."""
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share is {share}; it must be at least 0 and less than 1")
    distinct = np.flatnonzero(np.bincount(documents))  # numbers of the documents that there are
    count = 0
    if share > 0 and len(distinct):
        count = max(1, round(share * len(distinct)))
        count = min(count, len(distinct) - 1)  # something must be left to train on
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(distinct)[:count]
    is_chosen = np.zeros(distinct.max(initial=-1) + 1, bool)
    is_chosen[chosen] = True
    return is_chosen[documents]


def at_least_longest(tokens_per_batch: int, lengths: np.ndarray) -> int:
    """`tokens_per_batch`, or what the longest sequence takes with its padding, if that is more."""
    return max(tokens_per_batch, int(lengths.max()) + 15)  # padding adds 7 at most; 15 keeps plans as they were


def tokens_per_batch(batch_size: int, lengths: np.ndarray) -> int:
    """Positions in a micro-batch: `batch_size` rows of mean length, and at least one of the longest."""
    return at_least_longest(round(batch_size * float(lengths.mean())), lengths)


def plan_batches(lengths: np.ndarray, tokens_per_batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, in random order: arrays of ids that index `lengths` (N,).

    Every id occurs once. A batch's size times its longest length, rounded up to a multiple of 8, is at most
    tokens_per_batch. Which ids of similar length meet is random in each epoch; the number of batches never changes.
    Pure: same arguments, same plan, on every rank and after every restart. ValueError if a sequence exceeds the budget.

    Lengths 5 12 7 16 9 with a budget of 32 are padded to 8 16 8 16 16. Longest first, two of 16 fill a batch; the one
    that is left opens the next, where two of 16 would fit, so an 8 joins it; the other 8 is alone: 2 + 2 + 1.
    """
    padded = _round_up(np.asarray(lengths))
    if len(padded) == 0:
        return []
    if padded.max() > tokens_per_batch:
        raise ValueError(
            f"a batch may hold {tokens_per_batch} tokens, but the longest sequence takes {padded.max()}: "
            f"raise the tokens per batch to at least {padded.max()}, or lower --max_seq_len"
        )
    rng = np.random.Generator(np.random.Philox([seed, epoch]))
    shuffled = rng.permutation(len(padded))
    rank = (padded.max() - padded[shuffled]) // PAD_MULTIPLE  # 0 for the longest
    if rank.max() < 2**16:
        rank = rank.astype(np.uint16)  # numpy sorts 16-bit integers by radix, in linear time
    order = shuffled[np.argsort(rank, kind="stable")]  # longest first, equal ones as shuffled
    batches = []
    start = 0
    while start < len(order):
        longest = padded[order[start]]
        end = start + int(tokens_per_batch // longest)
        batches.append(order[start:end])
        start = end
    return [batches[i] for i in rng.permutation(len(batches))]  # else an epoch would go from long to short


class Prefetcher:
    """Iterator over `make_batch(entry) for entry in plan`, see `prefetch`. wait_seconds: time spent waiting so far."""

    def __init__(self, make_batch: Callable[[np.ndarray], Batch], plan: Sequence[np.ndarray], depth: int):
        if depth < 1:
            raise ValueError(f"depth is {depth}; prefetching needs at least 1 batch")
        self.wait_seconds = 0.0
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # The thread must not hold a reference to self, or an abandoned iterator would never be garbage.
        arguments = (make_batch, plan, self._ready, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name="prefetch", daemon=True)
        self._thread.start()
        weakref.finalize(self, _release, self._ready, self._stop)

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        started = perf_counter()
        batch, error = self._ready.get()
        self.wait_seconds += perf_counter() - started
        if batch is None:
            self.close()
            raise StopIteration if error is None else error
        return batch

    def close(self) -> None:
        """Stop the thread and wait for the batch it is making."""
        _release(self._ready, self._stop)
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _produce(make_batch: Callable, plan: Sequence, ready: queue.Queue, stop: threading.Event) -> None:
    """Put (batch, None) for each entry, then (None, None), or (None, error) where make_batch fails."""
    last = (None, None)
    try:
        for entry in plan:
            batch = make_batch(entry)
            if stop.is_set():
                return
            ready.put((batch, None))
    except Exception as error:  # raised again by __next__, in the thread that can act on it
        last = (None, error)
    if not stop.is_set():
        ready.put(last)


def _release(ready: queue.Queue, stop: threading.Event) -> None:
    """Let the producer end: it puts at most one more entry after `stop` is set, so an emptied queue never blocks it."""
    stop.set()
    with suppress(queue.Empty):
        while True:
            ready.get_nowait()


def prefetch(make_batch: Callable[[np.ndarray], Batch], plan: Sequence[np.ndarray], depth: int = 4) -> Prefetcher:
    """Iterate over the batches of a plan, made up to `depth` ahead by a background thread.

    An exception in make_batch is raised where its batch would have been returned. Leaving early is fine: the thread
    ends with `close()`, at the end of a `with` block, or when the iterator is garbage.
    """
    return Prefetcher(make_batch, plan, depth)
