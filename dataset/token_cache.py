"""Tokenise a jsonl file once and keep the ids on disk, memory-mapped: epochs, restarts and ranks share one copy.

A cache is a directory `{cache_dir}/{stem of the file}-{key}/`:

tokens.bin         uint16 (total,)     all documents one after the other
offsets.bin        int64 (N + 1,)      document i is tokens[offsets[i]:offsets[i + 1]]
spans.bin          int64 (M, 2)        supervised tokens [start, end), absolute positions; not for kind "text"
span_offsets.bin   int64 (N + 1,)      document i has spans[span_offsets[i]:span_offsets[i + 1]]; not for kind "text"
meta.json          what it was made from, counts, length statistics, the bad-line report, the arrays' checksums

The key is a hash of the file's content, the tokenizer with its template, the kind and the format's version, so a cache
is never stale. It is written under a temporary name and renamed when complete: a directory with the final name is
whole. What a disk did to it later is noticed by the checksums at the next start (0.1 seconds for 100 million tokens).
Memory while building does not depend on the size of the file.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from common.files import crc32, sync_directory, whole_file
from dataset.readers import DataError, ReadReport, require_file
from dataset.tokenizing import Log, encoded_chunks
from model.chat_format import ChatFormat

FORMAT_VERSION = 3
ARRAYS = {"tokens": np.uint16, "offsets": np.int64, "spans": np.int64, "span_offsets": np.int64}
NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
MAX_VOCAB_SIZE = 2**16
ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class TokenCache:
    """Memory-mapped tokens of one file; the arrays are described at the top of this module.

    For kind "text" everything is supervised and `spans` and `span_offsets` are None. For kind "preference" document
    2i is the chosen conversation of pair i and 2i + 1 the rejected one; answers that both share are not supervised.
    """

    path: Path
    kind: str
    meta: dict
    tokens: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray | None
    span_offsets: np.ndarray | None

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def fixed_padding(self, max_seq_len: int) -> float:
        """Share of padding if every document were cut or padded to max_seq_len tokens, as upstream does (D4)."""
        return 1.0 - float(np.minimum(np.diff(self.offsets), max_seq_len).mean()) / max_seq_len


def open_token_cache(
    path: str | Path,
    kind: str,
    chat_format: ChatFormat,
    cache_dir: str | Path,
    on_bad_line: str = "stop",
    log: Log = print,
) -> TokenCache:
    """Open the token cache of a jsonl file, building it first where there is none.

    When size and time stamps of the file are those of the last run, its content is not read again (only the cache's,
    for its checksums); otherwise it is hashed. With several ranks let rank 0 call first and the others after a barrier;
    processes that build the same cache at the same time do not disturb each other, the first to finish wins.
    Raises FileNotFoundError, DataError (see `dataset.readers`), OSError with the needed space when the disk is full.
    """
    require_file(path, kind)
    path, cache_dir = Path(os.path.realpath(path)), Path(cache_dir)
    if (vocab_size := len(chat_format.token_bytes())) > MAX_VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {vocab_size} entries; token ids are kept in 16 bits, so at most 65536")
    fingerprint = chat_format.fingerprint()
    stamp = _stamp(path)
    directory = _find_by_stamp(cache_dir, path.stem, kind, fingerprint, stamp)
    if directory is None or _read_whole_meta(directory) is None:
        started_ns = time.time_ns()
        content = _sha256(path)
        key = hashlib.sha256(f"{FORMAT_VERSION}\0{kind}\0{fingerprint}\0{content}".encode()).hexdigest()[:16]
        directory = cache_dir / f"{path.stem}-{key}"
        # A file changed less than two seconds before it was read can change again without a new time stamp.
        trusted_stamp = stamp if started_ns - stamp["mtime_ns"] > 2 * 10**9 else None
        if (meta := _read_whole_meta(directory)) is None:
            if directory.exists():
                log(f"数据缓存: {directory} 已损坏, 重新生成")
            source = {"path": str(path), "sha256": content, "stamp": trusted_stamp}
            identity = {"version": FORMAT_VERSION, "kind": kind, "fingerprint": fingerprint, "source": source}
            _build(path, directory, identity, chat_format, on_bad_line, log)
            if _stamp(path) != stamp:
                shutil.rmtree(directory, ignore_errors=True)
                raise DataError(f"{path} was changed while it was read; start again when it is complete")
        elif trusted_stamp is not None:
            meta["source"]["stamp"] = trusted_stamp
            with suppress(OSError):  # a cache of somebody else's: it is hashed again next time
                _write_meta(directory, meta)
    cache = _open(directory)
    _remove_old_formats(cache, log)
    bad = cache.meta["bad_lines"]
    if bad and on_bad_line == "stop":
        raise DataError(
            f"{path}: {cache.meta['read_report']}. Repair or download the file again, "
            f"or pass --on_bad_line skip to leave such lines out"
        )
    log(_summary(cache))
    return cache


def _summary(cache: TokenCache) -> str:
    lengths = cache.meta["lengths"]
    line = (
        f"数据缓存: {cache.path.name} 文档 {len(cache)}, token {len(cache.tokens)}, 平均长度 {lengths['mean']:.1f} "
        f"(中位 {lengths['p50']}, 95% {lengths['p95']}, 最长 {lengths['max']})"
    )
    return line + (f"\n数据缓存: {cache.meta['read_report']}" if cache.meta["remarkable"] else "")


# Finding and opening


def _stamp(path: Path) -> dict:
    """What changes when a file changes; ctime too, since mtime survives `cp -p` and `touch -r`."""
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def _find_by_stamp(cache_dir: Path, stem: str, kind: str, fingerprint: str, stamp: dict) -> Path | None:
    if not cache_dir.is_dir():
        return None
    for directory in cache_dir.iterdir():
        if directory.name.startswith(f"{stem}-") and (meta := _read_meta(directory)) is not None:
            if (meta["kind"], meta["fingerprint"], meta["source"]["stamp"]) == (kind, fingerprint, stamp):
                return directory
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_meta(directory: Path) -> dict | None:
    """The meta data of a cache; None where there is none, or its files do not have the sizes it says."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        whole = meta["version"] == FORMAT_VERSION and all(
            (directory / f"{name}.bin").stat().st_size == size for name, size in meta["file_bytes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if whole else None


def _read_whole_meta(directory: Path) -> dict | None:
    """The meta data of a cache whose files also have the checksums it says; else None. Reads all of them."""
    meta = _read_meta(directory)
    try:
        whole = meta is not None and meta["checksums"] == _checksums(directory, meta["file_bytes"])
    except (OSError, KeyError):
        return None
    return meta if whole else None


def _checksums(directory: Path, names: Iterable[str]) -> dict[str, int]:
    """CRC-32 of each array's file."""
    return {name: crc32(directory / f"{name}.bin") for name in names}


def _write_meta(directory: Path, meta: dict) -> None:
    with whole_file(directory / "meta.json") as file:
        file.write(json.dumps(meta, ensure_ascii=False, indent=1).encode())


def _open(directory: Path) -> TokenCache:
    meta = _read_meta(directory)
    if meta is None:
        raise DataError(f"{directory} disappeared or was damaged while it was opened; start again")
    arrays = dict.fromkeys(ARRAYS)
    for name in meta["file_bytes"]:
        # A plain view: indexing np.memmap itself costs several times as much.
        arrays[name] = np.asarray(np.memmap(directory / f"{name}.bin", ARRAYS[name], mode="r"))
    if arrays["spans"] is not None:
        arrays["spans"] = arrays["spans"].reshape(-1, 2)
    return TokenCache(path=directory, kind=meta["kind"], meta=meta, **arrays)


# Building


def _build(path: Path, directory: Path, identity: dict, chat_format: ChatFormat, on_bad_line: str, log: Log) -> None:
    """Write the cache under a temporary name and rename it to `directory`."""
    temporary = _temporary_name(directory)
    report = ReadReport(path, on_bad_line)
    started = time.perf_counter()
    try:
        temporary.mkdir(parents=True)
        _remove_abandoned(directory.parent)
        file_bytes = _write_arrays(temporary, report, identity["kind"], chat_format, log)
        lengths = _length_statistics(np.diff(np.fromfile(temporary / "offsets.bin", np.int64)))
        counts = {
            "rows": report.rows,
            "bad_lines": report.bad_lines,
            "remarkable": report.is_remarkable,
            "read_report": str(report),
            "lengths": lengths,
        }
        files = {"file_bytes": file_bytes, "checksums": _checksums(temporary, file_bytes)}
        _write_meta(temporary, {**identity, **counts, **files})
        _rename(temporary, directory)
    except OSError as error:
        if error.errno in NO_PERMISSION:
            raise OSError(
                error.errno, f"cannot write to {directory.parent}: {error.strerror}. Point --cache_dir elsewhere"
            ) from error
        if error.errno not in NO_SPACE:
            raise
        written = sum(file.stat().st_size for file in temporary.glob("*.bin"))
        total = path.stat().st_size
        needed = written * total / report.bytes if report.bytes else total
        raise OSError(
            error.errno,
            f"no room for the token cache of {path} in {directory.parent}: about {needed / 1e6:,.1f} MB are needed, "
            f"{shutil.disk_usage(directory.parent).free / 1e6:,.1f} MB are free ({error.strerror}). "
            f"Free some space, or point --cache_dir to another disk",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.perf_counter() - started
    log(f"数据缓存: 已生成 {directory}, {report.bytes / 1e6:.1f} MB, {report.bytes / 1e6 / seconds:.1f} MB/s")


def _write_arrays(directory: Path, report: ReadReport, kind: str, chat_format: ChatFormat, log: Log) -> dict[str, int]:
    """Stream the file through the tokenizer into the array files; returns their sizes in bytes."""
    names = ["tokens", "offsets"] if kind == "text" else list(ARRAYS)
    total_tokens = total_spans = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((directory / f"{name}.bin").open("wb")) for name in names}
        for name in names:
            if name.endswith("offsets"):
                files[name].write(np.zeros(1, np.int64).tobytes())
        for documents in encoded_chunks(report, kind, chat_format, log):
            lengths = np.fromiter((len(ids) for ids, _ in documents), np.int64, len(documents))
            offsets = total_tokens + np.cumsum(lengths)
            tokens = np.fromiter(chain.from_iterable(ids for ids, _ in documents), np.uint16, int(lengths.sum()))
            files["tokens"].write(tokens.tobytes())
            files["offsets"].write(offsets.tobytes())
            if kind != "text":
                counts = np.fromiter((len(spans) for _, spans in documents), np.int64, len(documents))
                flat = chain.from_iterable(chain.from_iterable(spans) for _, spans in documents)
                spans = np.fromiter(flat, np.int64, 2 * int(counts.sum())).reshape(-1, 2)
                spans += np.repeat(offsets - lengths, counts)[:, None]
                files["spans"].write(spans.tobytes())
                files["span_offsets"].write((total_spans + np.cumsum(counts)).tobytes())
                total_spans += len(spans)
            total_tokens = int(offsets[-1])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in files.items()}


def _length_statistics(lengths: np.ndarray) -> dict:
    """Mean, percentiles and a histogram of document lengths in tokens, (N,) -> plain numbers for JSON."""
    p50, p90, p95, p99 = np.percentile(lengths, (50, 90, 95, 99)).round().astype(int).tolist()
    edges = [0, *(2**i for i in range(5, 15)), 2**62]
    counts = np.histogram(lengths, edges)[0].tolist()
    histogram = {f"<{edge}" if edge < 2**62 else "longer": n for edge, n in zip(edges[1:], counts, strict=True)}
    mean, longest = float(lengths.mean()), int(lengths.max())
    return {"mean": mean, "p50": p50, "p90": p90, "p95": p95, "p99": p99, "max": longest, "histogram": histogram}


def _temporary_name(directory: Path) -> Path:
    """Beside `directory`, and telling which process of which machine made it."""
    host = socket.gethostname().replace(".", "-")
    return directory.parent / f".{directory.name}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"


def _rename(temporary: Path, directory: Path) -> None:
    """Make `temporary` the cache, unless another process was faster; a damaged cache makes way."""
    while _read_whole_meta(directory) is None:
        try:
            os.rename(temporary, directory)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            damaged = _temporary_name(directory)
            with suppress(FileNotFoundError):  # another process made way for its own
                os.rename(directory, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
    sync_directory(directory.parent)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what killed builds left behind: their process is gone, or nothing was written for a day."""
    for directory in cache_dir.iterdir():
        if made_by := re.fullmatch(r"\..+\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.tmp", directory.name):
            with suppress(FileNotFoundError):  # just renamed by a process that is done
                newest = max(file.stat().st_mtime for file in [directory, *directory.iterdir()])
                if _process_is_gone(made_by[1], int(made_by[2])) or time.time() - newest > ABANDONED_SECONDS:
                    shutil.rmtree(directory, ignore_errors=True)


def _remove_old_formats(cache: TokenCache, log: Log) -> None:
    """Remove caches of the same content that an earlier version of this program wrote, which nothing reads any more.

    Only directories with exactly the files of a cache, whose meta data name this content and a lower version.
    """
    for directory in cache.path.parent.glob("*-" + "[0-9a-f]" * 16):
        try:
            meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
            is_old = type(meta["version"]) is int and meta["version"] < FORMAT_VERSION
            is_same = (meta["kind"], meta["source"]["sha256"]) == (cache.kind, cache.meta["source"]["sha256"])
            files = list(directory.iterdir())
            size = sum(file.stat().st_size for file in files)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not ours, or somebody else's on its way
        if is_old and is_same and {file.name for file in files} <= {"meta.json", *(f"{name}.bin" for name in ARRAYS)}:
            shutil.rmtree(directory, ignore_errors=True)
            log(f"数据缓存: 已删除旧格式的 {directory}, {size / 1e6:.1f} MB")


def _process_is_gone(host: str, pid: int) -> bool:
    if host != socket.gethostname().replace(".", "-") or os.name != "posix":
        return False  # cannot tell; on Windows os.kill(pid, 0) would even send a Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
