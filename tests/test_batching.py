"""Every supervised token is predicted exactly once, whatever shares its batch; the plan is pure, whole and tight."""

import gc
import threading
import time
from itertools import count
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.batching import PAD_MULTIPLE, Pairs, Sequences, plan_batches, prefetch
from dataset.token_cache import TokenCache, open_token_cache


def make_cache(documents: list[list[tuple[int, int]] | None], lengths: list[int], kind: str = "chat") -> TokenCache:
    """A cache in memory: token p of all is p + 1, spans relative to their document."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    spans = [np.array(s, np.int64).reshape(-1, 2) + o for s, o in zip(documents, offsets[:-1], strict=True)]
    is_text = kind == "text"
    return TokenCache(
        path=None,
        kind=kind,
        meta={},
        tokens=np.arange(1, offsets[-1] + 1, dtype=np.uint16),
        offsets=offsets,
        spans=None if is_text else np.concatenate(spans),
        span_offsets=None if is_text else np.concatenate([[0], np.cumsum([len(s) for s in spans])]),
    )


def text_cache(lengths: list[int]) -> TokenCache:
    return make_cache([[] for _ in lengths], lengths, "text")


def predictions(batch: dict) -> list[tuple[int, int]]:
    """(input token, target) of every supervised position; tokens are unique in these caches."""
    inputs = batch["input_ids"].flatten()[batch["positions"]]
    return list(zip(inputs.tolist(), batch["targets"].tolist(), strict=True))


@st.composite
def conversations(draw) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Spans and lengths of some documents: header, answer, header, answer, ..., tail."""
    documents, lengths = [], []
    for _ in range(draw(st.integers(1, 8))):
        spans, position = [], 0
        for _ in range(draw(st.integers(0, 3))):
            start = position + draw(st.integers(1, 5))
            position = start + draw(st.integers(1, 6))
            spans.append((start, position))
        documents.append(spans)
        lengths.append(position + draw(st.integers(0, 2)) or 1)
    return documents, lengths


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(2, 20))
def test_every_token_of_a_text_is_predicted_exactly_once(lengths, max_seq_len):
    cache = text_cache(lengths)
    sequences = Sequences.from_cache(cache, max_seq_len)
    batch_pairs = [p for i in range(len(sequences)) for p in predictions(sequences.collate(np.array([i])))]
    first_tokens = set((cache.offsets[:-1] + 1).tolist())
    every = set(range(1, sum(lengths) + 1)) - first_tokens
    assert sorted(target for _, target in batch_pairs) == sorted(every)
    assert all(target == token + 1 for token, target in batch_pairs)
    assert (sequences.lengths < max_seq_len).all()
    assert sequences.dropped == lengths.count(1)
    assert sequences.weights.sum() == len(every)


@given(conversations(), st.integers(2, 25))
def test_a_cut_conversation_keeps_whole_answers_or_is_dropped(documents, max_seq_len):
    """Upstream D6: a cut answer lost its end and was learned all the same."""
    spans, lengths = documents
    cache = make_cache(spans, lengths)
    sequences = Sequences.from_cache(cache, max_seq_len)
    expected = {}
    for i, document in enumerate(spans):
        kept = [span for span in document if span[1] <= max_seq_len]
        if kept:
            expected[i] = kept
    assert sequences.documents.tolist() == list(expected)
    assert sequences.dropped == len(lengths) - len(expected)
    for row, (i, kept) in enumerate(expected.items()):
        batch = sequences.collate(np.array([row]))
        tokens = [int(cache.offsets[i]) + p for start, end in kept for p in range(start, end)]
        assert predictions(batch) == [(t, t + 1) for t in tokens]
        assert batch["lengths"].tolist() == [kept[-1][1] - 1]  # ends with the last answer
        assert sequences.weights[row] == len(tokens)


@given(conversations(), st.integers(2, 25), st.randoms())
def test_targets_do_not_depend_on_who_shares_the_batch(documents, max_seq_len, random):
    sequences = Sequences.from_cache(make_cache(*documents), max_seq_len)
    if len(sequences) == 0:
        return
    alone = [predictions(sequences.collate(np.array([i]))) for i in range(len(sequences))]
    ids = list(range(len(sequences)))
    random.shuffle(ids)
    batch = sequences.collate(np.array(ids))
    assert predictions(batch) == [pair for i in ids for pair in alone[i]]
    width = batch["input_ids"].shape[1]
    real = torch.arange(width) < batch["lengths"][:, None]
    assert (batch["input_ids"][~real] == 0).all() and (batch["input_ids"][real] > 0).all()
    assert width - int(batch["lengths"].max()) < PAD_MULTIPLE
    assert real.flatten()[batch["positions"]].all()


def test_mask_of_a_two_turn_chat(write_jsonl, tmp_path, chat_format):
    """Upstream A6: the mask was off by one, it left out the first answer token and added one after the end."""
    turns = [("user", "你好"), ("assistant", "你好！"), ("user", "再见"), ("assistant", "再见，祝你愉快。")]
    row = {"conversations": [{"role": role, "content": content} for role, content in turns]}
    cache = open_token_cache(write_jsonl([row]), "chat", chat_format, tmp_path / "cache", log=lambda _: None)
    batch = Sequences.from_cache(cache, 512).collate(np.array([0]))
    expected = [token for ids in chat_format.encode_texts(["你好！", "再见，祝你愉快。"]) for token in ids[1:]]
    assert batch["targets"].tolist() == expected
    inputs = batch["input_ids"][0]
    header = [chat_format.encode_conversations([row["conversations"][:2]])[0][0]]
    first_answer = int(cache.spans[0, 0])
    assert inputs[: first_answer + 1].tolist() == header[0][: first_answer + 1]
    assert batch["positions"][0] == first_answer - 1  # the newline behind "assistant" predicts the first answer token
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=200),
    st.integers(304, 2000),
    st.integers(0, 2**32),
    st.integers(0, 50),
)
def test_plan_is_pure_complete_and_within_budget(lengths, budget, seed, epoch):
    lengths = np.array(lengths)
    plan = plan_batches(lengths, budget, seed, epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    for ids in plan:
        assert len(ids) * -(-lengths[ids].max() // PAD_MULTIPLE) * PAD_MULTIPLE <= budget
    again = plan_batches(lengths.copy(), budget, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    assert len(plan_batches(lengths, budget, seed + 1, epoch + 1)) == len(plan)  # the schedule needs to know it


def test_epochs_and_seeds_differ_in_order_and_in_company():
    lengths = np.random.default_rng(0).integers(20, 120, 2000)

    def company(seed, epoch):
        return {frozenset(ids.tolist()) for ids in plan_batches(lengths, 2048, seed, epoch)}

    assert len(company(0, 0) & company(0, 1)) <= 1
    assert len(company(0, 0) & company(1, 0)) <= 1
    longest = [int(lengths[ids].max()) for ids in plan_batches(lengths, 2048, 0, 0)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3  # not from long to short


def test_padding_and_fill_on_realistic_lengths():
    """Upstream D4: every row was padded to max_seq_len, about half of the positions were wasted."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.4, 0.6, 50_000), 8, 511).astype(int)
    budget = 16384
    plan = plan_batches(lengths, budget, 0, 0)
    positions = [len(ids) * -(-lengths[ids].max() // PAD_MULTIPLE) * PAD_MULTIPLE for ids in plan]
    assert 1 - lengths.sum() / sum(positions) < 0.03
    assert sorted(positions)[1] > 0.95 * budget  # all but the tail
    assert 1 - lengths.mean() / 512 > 0.3  # what padding to 512 would have wasted


def test_continuing_is_slicing_the_plan():
    sequences = Sequences.from_cache(text_cache([7, 30, 12, 55, 8, 9]), 20)
    plan = plan_batches(sequences.lengths, 64, 3, 1)
    straight = [sequences.collate(ids) for ids in plan]
    resumed = [sequences.collate(ids) for ids in plan_batches(sequences.lengths, 64, 3, 1)[2:]]
    for a, b in zip(straight[2:], resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_budget_below_the_longest_sequence():
    with pytest.raises(ValueError, match="may hold 100 tokens.*takes 208.*at least 208"):
        plan_batches(np.array([5, 205]), 100, 0, 0)
    assert plan_batches(np.array([], np.int64), 100, 0, 0) == []


def test_max_seq_len_too_small():
    with pytest.raises(ValueError, match="max_seq_len is 1"):
        Sequences.from_cache(text_cache([5]), 1)


@given(st.lists(st.integers(2, 60), min_size=2, max_size=30), st.floats(0, 0.9), st.integers(0, 99))
def test_split_is_by_document_and_deterministic(lengths, share, seed):
    sequences = Sequences.from_cache(text_cache(lengths), 10)
    train, heldout = sequences.split(share, seed)
    assert not set(train.documents) & set(heldout.documents)
    assert set(train.documents) | set(heldout.documents) == set(range(len(lengths)))
    assert len(train) + len(heldout) == len(sequences) and len(train) > 0
    if share > 0:
        expected = min(max(1, round(share * len(lengths))), len(lengths) - 1)
        assert len(set(heldout.documents)) == expected
    again = Sequences.from_cache(text_cache(lengths), 10).split(share, seed)[1]
    assert np.array_equal(again.starts, heldout.starts)
    i = len(heldout) - 1
    if i >= 0:
        original = int(np.flatnonzero(sequences.starts == heldout.starts[i])[0])
        assert predictions(heldout.collate(np.array([i]))) == predictions(sequences.collate(np.array([original])))


def test_split_refuses_to_hold_out_everything():
    with pytest.raises(ValueError, match="held-out share is 1.0"):
        Sequences.from_cache(text_cache([5, 5]), 10).split(1.0, 0)


PAIR_SPANS = [[(3, 6)], [(3, 9)], [(3, 5), (8, 10)], [(3, 5), (8, 30)], [(2, 4)], [(2, 20)]]


def pair_cache() -> TokenCache:
    return make_cache(PAIR_SPANS, [spans[-1][1] + 1 for spans in PAIR_SPANS], "preference")


def test_pairs_are_two_rows_each_chosen_first():
    cache = pair_cache()
    pairs = Pairs.from_cache(cache, 20)  # the rejected answer of pair 1 ends at 30
    assert (len(pairs), pairs.dropped, pairs.pairs.tolist()) == (2, 1, [0, 2])
    assert pairs.lengths.tolist() == [2 * 8, 2 * 24]
    assert pairs.weights.tolist() == [3 + 6, 2 + 18]
    batch = pairs.collate(np.array([1, 0]))
    assert batch["input_ids"].shape == (4, 24)
    assert batch["lengths"].tolist() == [3, 5, 19, 8]
    assert batch["pairs"].tolist() == [2, 0]
    starts = [int(cache.offsets[document]) + 1 for document in (4, 0, 5, 1)]
    assert batch["input_ids"][:, 0].tolist() == starts
    first_targets = [start + PAIR_SPANS[document][0][0] for start, document in zip(starts, (4, 0, 5, 1), strict=True)]
    assert set(first_targets) <= set(batch["targets"].tolist())


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=40), st.integers(0, 9))
def test_pairs_stay_within_the_budget(ends, seed):
    ends = [end for pair in ends for end in pair]
    pairs = Pairs.from_cache(make_cache([[(1, end)] for end in ends], [end + 1 for end in ends], "preference"), 64)
    plan = plan_batches(pairs.lengths, 128, seed, 0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(pairs)))
    assert all(pairs.collate(ids)["input_ids"].numel() <= 128 for ids in plan)


def test_pairs_split_keeps_pairs_together():
    train, heldout = Pairs.from_cache(pair_cache(), 64).split(0.34, 0)
    assert sorted([*train.pairs, *heldout.pairs]) == [0, 1, 2] and len(heldout) == 1
    assert heldout.rows.documents.tolist() == [2 * heldout.pairs[0], 2 * heldout.pairs[0] + 1]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until_no_thread() -> None:
    deadline = time.monotonic() + 60
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_prefetch_gives_every_batch_in_order(depth):
    assert list(prefetch(lambda x: 2 * x, range(20), depth)) == [2 * x for x in range(20)]
    assert list(prefetch(lambda x: x, [], depth)) == []
    wait_until_no_thread()


def test_prefetch_raises_what_make_batch_raised_in_its_place():
    def make(x):
        if x == 3:
            raise KeyError("broken")
        return x

    batches = prefetch(make, range(10), 2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    wait_until_no_thread()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_leaving_early_ends_the_thread(depth):
    for batch in prefetch(lambda x: x, count(), depth):
        if batch == 3:
            break
    del batch
    gc.collect()
    wait_until_no_thread()

    with prefetch(lambda x: x, count(), depth) as batches:
        next(batches)
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_measures_waiting_and_works_ahead():
    made = [threading.Event() for _ in range(4)]

    def make(x):
        made[x].set()
        return x

    with patch("dataset.batching.perf_counter", side_effect=[10.0, 12.5, 20.0, 20.0]):  # before and after each wait
        batches = prefetch(make, range(4), 1)
        next(batches)
        assert batches.wait_seconds == 2.5
        assert made[1].wait(timeout=60), "the next one is made though nobody asks for it yet"
        next(batches)
        assert batches.wait_seconds == 2.5
    batches.close()


def test_prefetch_depth():
    with pytest.raises(ValueError, match="depth is 0"):
        prefetch(lambda x: x, [], 0)


@settings(max_examples=5)
@given(st.integers(0, 3))
def test_prefetched_batches_are_the_same(seed):
    sequences = Sequences.from_cache(text_cache(list(range(2, 60))), 20)
    plan = plan_batches(sequences.lengths, 64, seed, 0)
    for batch, ids in zip(prefetch(sequences.collate, plan, 2), plan, strict=True):
        direct = sequences.collate(ids)
        assert all(torch.equal(batch[name], direct[name]) for name in direct)
