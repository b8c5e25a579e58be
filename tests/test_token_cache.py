"""The token cache holds exactly what the chat format says, is found again, and is never half-written or stale."""

import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

from dataset import token_cache, tokenizing
from dataset.readers import DataError
from dataset.token_cache import open_token_cache
from model.chat_format import ChatFormat
from model.loading import load_tokenizer

TEXTS = ["今天天气很好。", "The quick brown fox", "二氧化碳在空气中", "x = 1 + 2"]


def quiet(_: str) -> None:
    pass


def text_rows(count: int) -> list[dict]:
    return [{"text": f"{i}: {TEXTS[i % 4]}"} for i in range(count)]


def chat_row(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def age(path: Path) -> None:
    """Let the file be ten seconds old: time stamps of fresher files are not trusted."""
    os.utime(path, ns=(time.time_ns() - 10**10,) * 2)


def documents(cache) -> list[list[int]]:
    return [cache.tokens[a:b].tolist() for a, b in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)]


def build_count(monkeypatch) -> list:
    built = []
    original = token_cache._build
    monkeypatch.setattr(token_cache, "_build", lambda *args: (built.append(args[1]), original(*args)))
    return built


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2**20])
def test_text_round_trip_in_any_chunking(write_jsonl, tmp_path, chat_format, monkeypatch, chunk_bytes):
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", chunk_bytes)
    rows = text_rows(50)
    cache = open_token_cache(write_jsonl(rows), "text", chat_format, tmp_path / "cache", log=quiet)
    assert documents(cache) == chat_format.encode_texts([row["text"] for row in rows])
    assert cache.spans is None and cache.span_offsets is None
    assert cache.tokens.dtype == np.uint16


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_conversations_keep_their_spans(write_jsonl, tmp_path, chat_format, monkeypatch, chunk_bytes):
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", chunk_bytes)
    rows = [chat_row("你好", "你好！"), chat_row("1+1?", "2", "再加1?", "3"), chat_row("a", "b")]
    cache = open_token_cache(write_jsonl(rows), "chat", chat_format, tmp_path / "cache", log=quiet)
    expected = chat_format.encode_conversations([row["conversations"] for row in rows])
    assert documents(cache) == [ids for ids, _ in expected]
    for i, (_, spans) in enumerate(expected):
        found = cache.spans[cache.span_offsets[i] : cache.span_offsets[i + 1]] - cache.offsets[i]
        assert found.tolist() == [list(span) for span in spans]
    start, end = cache.spans[0]
    assert chat_format.encode_texts(["你好！"])[0][1:] == cache.tokens[start:end].tolist()


def test_pairs_alternate_chosen_and_rejected(write_jsonl, tmp_path, chat_format):
    turns = [chat_row("问", answer)["conversations"] for answer in ("好", "坏", "对", "错")]
    rows = [{"chosen": turns[0], "rejected": turns[1]}, {"chosen": turns[2], "rejected": turns[3]}]
    cache = open_token_cache(write_jsonl(rows), "preference", chat_format, tmp_path / "cache", log=quiet)
    assert documents(cache) == [ids for ids, _ in chat_format.encode_conversations(turns)]


def test_answers_that_a_pair_shares_are_not_supervised(write_jsonl, tmp_path, chat_format):
    """They cancel out of DPO's sum of log-probabilities, but counted in the mean over an answer's tokens."""
    turns = [
        *(("一", "同", "二", "好的"), ("一", "同", "二", "坏")),  # the first answer is shared
        *(("一", "同", "二", "好"), ("一", "异", "二", "好")),  # they part before the second, equal answer
        *(("一", "同"), ("一", "同", "二", "多")),  # nothing but shared answers: the last one stays
    ]
    talks = [chat_row(*turn)["conversations"] for turn in turns]
    rows = [{"chosen": a, "rejected": b} for a, b in zip(talks[::2], talks[1::2], strict=True)]
    cache = open_token_cache(write_jsonl(rows), "preference", chat_format, tmp_path / "cache", log=quiet)
    assert np.diff(cache.span_offsets).tolist() == [1, 1, 2, 2, 1, 2]
    every_span = [spans for _, spans in chat_format.encode_conversations(talks)]
    for i, last in ((0, every_span[0][-1]), (1, every_span[1][-1]), (4, every_span[4][-1])):
        assert (cache.spans[cache.span_offsets[i]] - cache.offsets[i]).tolist() == list(last)


def test_second_start_reads_nothing(write_jsonl, tmp_path, chat_format, monkeypatch):
    path = write_jsonl(text_rows(20))
    age(path)
    first = open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    monkeypatch.setattr(token_cache, "_sha256", None)
    monkeypatch.setattr(token_cache, "_build", None)
    second = open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    assert second.path == first.path


def test_same_content_elsewhere_is_found_and_its_stamp_remembered(write_jsonl, tmp_path, chat_format, monkeypatch):
    built = build_count(monkeypatch)
    path = write_jsonl(text_rows(20))
    open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    age(path)  # touched, not changed
    open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    assert len(built) == 1
    monkeypatch.setattr(token_cache, "_sha256", None)
    open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)


def test_changed_content_of_same_size_and_time_is_noticed(write_jsonl, tmp_path, chat_format):
    path = write_jsonl([{"text": "aaaa"}])
    age(path)
    mtime = path.stat().st_mtime_ns
    open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    path.write_text('{"text": "bbbb"}\n')
    os.utime(path, ns=(mtime, mtime))
    cache = open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    assert documents(cache) == chat_format.encode_texts(["bbbb"])


def test_file_rewritten_within_a_tick_of_the_clock_is_noticed(write_jsonl, tmp_path, chat_format, monkeypatch):
    stamp = token_cache._stamp(write_jsonl([{"text": "aaaa"}]))
    monkeypatch.setattr(token_cache, "_stamp", lambda path: stamp)
    for letter in "ab":
        path = write_jsonl([{"text": letter * 4}])
        cache = open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
        assert documents(cache) == chat_format.encode_texts([letter * 4])


def test_other_tokenizer_or_kind_makes_another_cache(write_jsonl, tmp_path, chat_format):
    path = write_jsonl([{"text": "a", **chat_row("b", "c")}])
    tokenizer = load_tokenizer()
    tokenizer.add_tokens([AddedToken("新词")])
    other = ChatFormat(tokenizer)
    opened = [
        open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet),
        open_token_cache(path, "text", other, tmp_path / "cache", log=quiet),
        open_token_cache(path, "chat", chat_format, tmp_path / "cache", log=quiet),
    ]
    assert len({cache.path for cache in opened}) == 3


@pytest.mark.parametrize("damage", ["shorten", "remove", "meta", "flip"])
def test_damaged_cache_is_rebuilt(write_jsonl, tmp_path, chat_format, damage):
    path = write_jsonl(text_rows(20))
    age(path)
    cache = open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    expected = documents(cache)
    if damage == "shorten":
        os.truncate(cache.path / "tokens.bin", 10)
    elif damage == "remove":
        (cache.path / "offsets.bin").unlink()
    elif damage == "flip":  # of equal size
        content = bytearray((cache.path / "tokens.bin").read_bytes())
        content[77] ^= 4
        (cache.path / "tokens.bin").write_bytes(content)
    else:
        (cache.path / "meta.json").write_text('{"version"')
    messages = []
    cache = open_token_cache(path, "text", chat_format, tmp_path / "cache", log=messages.append)
    assert documents(cache) == expected
    assert any("已损坏" in message for message in messages)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [cache.path.name]


class ByteFormat:
    """Stands in for ChatFormat in forked processes, where the tokenizer's thread pool would not work."""

    def __init__(self, gate: Event | None = None):
        self.gate = gate  # encoding waits until it is set

    def fingerprint(self) -> str:
        return "bytes"

    def token_bytes(self) -> np.ndarray:
        return np.ones(256, np.int64)

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        if self.gate is not None:
            self.gate.wait()
        return [list(text.encode()) for text in texts]


def start_build(path: Path, cache_dir: Path, gate: Event | None = None, limit: int | None = None):
    """(process that builds the cache of `path`, connection over which it sends its error message)."""

    def build():
        tokenizing.CHUNK_BYTES = 1000
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            open_token_cache(path, "text", ByteFormat(gate), cache_dir, log=quiet)
        except OSError as error:
            sender.send(str(error))

    resource = pytest.importorskip("resource")  # no fork and no limits on Windows
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=build)
    process.start()
    return process, receiver


def wait_until_writing(process, cache_dir: Path) -> None:
    while not list(cache_dir.glob(".*.tmp/tokens.bin")):
        assert process.is_alive()
        time.sleep(0.01)


def test_killed_build_leaves_nothing_that_is_used(write_jsonl, tmp_path):
    path, cache_dir = write_jsonl(text_rows(2000)), tmp_path / "cache"
    process, _ = start_build(path, cache_dir, multiprocessing.Event())
    wait_until_writing(process, cache_dir)
    process.kill()
    process.join()
    (leftover,) = cache_dir.iterdir()
    assert leftover.name.endswith(".tmp")

    cache = open_token_cache(path, "text", ByteFormat(), cache_dir, log=quiet)
    assert len(cache) == 2000
    assert list(cache_dir.iterdir()) == [cache.path]


def test_a_build_that_still_runs_is_left_alone(write_jsonl, tmp_path):
    path, cache_dir = write_jsonl(text_rows(200)), tmp_path / "cache"
    gate = multiprocessing.Event()
    process, _ = start_build(path, cache_dir, gate)
    wait_until_writing(process, cache_dir)
    cache = open_token_cache(path, "text", ByteFormat(), cache_dir, log=quiet)
    assert process.is_alive() and len(list(cache_dir.iterdir())) == 2
    gate.set()
    process.join()
    assert process.exitcode == 0
    assert list(cache_dir.iterdir()) == [cache.path]
    assert len(cache) == 200


def test_two_builders_at_once_in_threads(write_jsonl, tmp_path, chat_format):
    path, results = write_jsonl(text_rows(500)), []

    def build():
        results.append(documents(open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_full_disk_is_a_clear_error_and_leaves_nothing(write_jsonl, tmp_path):
    path, cache_dir = write_jsonl(text_rows(5000)), tmp_path / "cache"
    process, errors = start_build(path, cache_dir, limit=20_000)
    message = errors.recv()
    process.join()
    assert f"no room for the token cache of {path} in {cache_dir}" in message
    assert "MB are needed" in message and "--cache_dir" in message
    needed = float(re.search(r"about ([\d.]+) MB", message)[1])
    whole = open_token_cache(path, "text", ByteFormat(), cache_dir, log=quiet)
    assert needed == pytest.approx(sum(whole.meta["file_bytes"].values()) / 1e6, abs=0.1)
    assert list(cache_dir.iterdir()) == [whole.path]


def test_rows_with_nothing_to_learn_are_left_out_and_told(write_jsonl, tmp_path, chat_format):
    """They were told as rows that do not fit --max_seq_len, and a file of them as `cannot mmap an empty file`."""
    useless = chat_row("你好", "")
    useless["conversations"][1]["tool_calls"] = "[]"
    messages = []
    path = write_jsonl([chat_row("你好", "你好！"), useless, useless])
    cache = open_token_cache(path, "chat", chat_format, tmp_path / "cache", log=messages.append)
    assert len(cache) == cache.meta["rows"] == 1 and "2 x nothing to learn" in messages[-1]
    with pytest.raises(DataError, match="no usable row .*1 x nothing to learn"):
        open_token_cache(write_jsonl([useless]), "chat", chat_format, tmp_path / "cache", log=quiet)


def test_bad_lines_are_skipped_reported_and_remembered(write_jsonl, tmp_path, chat_format):
    path = write_jsonl([*text_rows(20), b"{"])
    with pytest.raises(DataError, match="data.jsonl:21: not JSON"):
        open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    assert list((tmp_path / "cache").iterdir()) == []
    for _ in range(2):
        messages = []
        cache = open_token_cache(path, "text", chat_format, tmp_path / "cache", "skip", messages.append)
        assert len(cache) == 20
        assert "line 21: not JSON" in messages[-1]
    with pytest.raises(DataError, match="line 21: not JSON.*--on_bad_line skip"):
        open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_what_the_chat_format_refuses_is_a_bad_line(write_jsonl, tmp_path, chat_format, monkeypatch, chunk_bytes):
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", chunk_bytes)
    refused = {"role": "assistant", "content": "", "tool_calls": "not JSON"}
    rows = [*[chat_row("a", "b")] * 15, {"conversations": [refused]}, chat_row("c", "d")]
    path = write_jsonl(rows)
    with pytest.raises(DataError, match="data.jsonl:16: .*tool_calls"):
        open_token_cache(path, "chat", chat_format, tmp_path / "cache", log=quiet)
    cache = open_token_cache(path, "chat", chat_format, tmp_path / "cache", "skip", quiet)
    assert (len(cache), cache.meta["rows"], cache.meta["bad_lines"]) == (16, 16, 1)


def test_file_changed_during_the_build(write_jsonl, tmp_path, chat_format, monkeypatch):
    path = write_jsonl(text_rows(20))
    original = tokenizing._encode

    def grow(*args):
        with path.open("a") as file:
            file.write('{"text": "late"}\n')
        return original(*args)

    monkeypatch.setattr(tokenizing, "_encode", grow)
    with pytest.raises(DataError, match="was changed while it was read"):
        open_token_cache(path, "text", chat_format, tmp_path / "cache", log=quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_vocabulary_that_does_not_fit_16_bits(write_jsonl, tmp_path):
    class Large:
        def token_bytes(self):
            return np.ones(2**16 + 1)

    with pytest.raises(ValueError, match="65537 entries.*at most 65536"):
        open_token_cache(write_jsonl(text_rows(1)), "text", Large(), tmp_path / "cache")


def test_cache_directory_that_cannot_be_written(write_jsonl, tmp_path, chat_format):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to .*file.*--cache_dir"):
        open_token_cache(write_jsonl(text_rows(1)), "text", chat_format, tmp_path / "file", log=quiet)


def test_unrelated_entries_of_the_cache_directory_are_left_alone(write_jsonl, tmp_path, chat_format):
    cache_dir = tmp_path / "cache"
    (cache_dir / ".mine.tmp").mkdir(parents=True)
    (cache_dir / "data-notes").mkdir()
    (cache_dir / "data-file").touch()
    open_token_cache(write_jsonl(text_rows(1)), "text", chat_format, cache_dir, log=quiet)
    assert {".mine.tmp", "data-notes", "data-file"} < {entry.name for entry in cache_dir.iterdir()}


def test_caches_of_the_same_content_in_older_formats_are_removed(write_jsonl, tmp_path, chat_format):
    """The format's number rose twice, and each time every data set was left behind once more, unread."""
    cache = open_token_cache(write_jsonl(text_rows(20)), "text", chat_format, tmp_path / "cache", log=quiet)

    def copy(key: str, **changes) -> Path:
        directory = cache.path.with_name(f"data-{key * 16}")
        shutil.copytree(cache.path, directory)
        meta = {**json.loads((directory / "meta.json").read_text()), **changes}
        (directory / "meta.json").write_text(json.dumps(meta))
        return directory

    old = copy("0", version=1)
    kept = [copy("1", version=99), copy("2", version=1, kind="chat"), copy("3", version="1"), copy("4", version=1)]
    kept += [copy("5", version=1, source={"sha256": "of other data"})]
    (kept[3] / "notes.txt").write_text("somebody's own")
    lines = []
    open_token_cache(tmp_path / "data.jsonl", "text", chat_format, tmp_path / "cache", log=lines.append)
    assert not old.exists() and cache.path.exists() and all(directory.exists() for directory in kept)
    assert sum("已删除旧格式" in line and str(old) in line for line in lines) == 1


def test_statistics(write_jsonl, tmp_path, chat_format):
    path = write_jsonl([{"text": "一" * n} for n in range(1, 41)])
    messages = []
    cache = open_token_cache(path, "text", chat_format, tmp_path / "cache", log=messages.append)
    lengths = np.array([len(ids) for ids in documents(cache)])
    assert cache.meta["lengths"]["mean"] == pytest.approx(lengths.mean())
    assert cache.meta["lengths"]["max"] == lengths.max()
    assert sum(cache.meta["lengths"]["histogram"].values()) == 40
    padded = [ids[:10] + [None] * (10 - len(ids)) for ids in documents(cache)]
    assert cache.fixed_padding(10) == pytest.approx(sum(row.count(None) for row in padded) / 400)
    assert messages[-1].startswith("数据缓存: ") and f"{lengths.mean():.1f}" in messages[-1]
    assert json.loads((cache.path / "meta.json").read_text())["source"]["path"] == str(path)
