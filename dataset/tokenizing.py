"""Turn the records of a jsonl file into token ids, chunk after chunk, on every core and in bounded memory."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from dataset.readers import BadLine, ReadReport, Record, UselessLine, read_records
from model.chat_format import ChatFormat

CHUNK_BYTES = 2**20  # of jsonl per tokeniser call: texts enough for every core, and 82 MB of memory (measured)
PROGRESS_SECONDS = 10

Log = Callable[[str], None]
Encoded = tuple[list[int], list[tuple[int, int]]]  # token ids, supervised spans [start, end)


def encoded_chunks(report: ReadReport, kind: str, chat_format: ChatFormat, log: Log) -> Iterator[list[Encoded]]:
    """Encoded documents of the file, chunk after chunk; the next chunk is read while one is in the tokenizer.

    Raises DataError as `read_records` does; a line that the chat format refuses is a bad line too.
    """
    total = report.path.stat().st_size
    started = last_log = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as tokenizer_thread:
        pending = None
        for chunk in chain(_chunks(report, kind), [None]):
            previous = pending
            pending = tokenizer_thread.submit(_encode_chunk, chunk, kind, chat_format) if chunk else None
            if previous is None:
                continue
            documents, refused = previous.result()
            for line_number, error in refused.items():
                report.rows -= 1
                report.reject(line_number, error)
            if documents:
                yield documents
            now = time.perf_counter()
            if now - last_log > PROGRESS_SECONDS:
                last_log = now
                speed = report.bytes / 1e6 / (now - started)
                log(f"数据缓存: {report.path.name} 分词 {report.bytes / total:.0%}, {speed:.1f} MB/s")
    report.finish()


def _chunks(report: ReadReport, kind: str) -> Iterator[list[tuple[int, Record]]]:
    """Records with their line numbers, about CHUNK_BYTES of the file at a time."""
    chunk, chunk_start = [], 0
    for record in read_records(report.path, kind, report.on_bad_line, report):
        chunk.append((report.lines, record))
        if report.bytes - chunk_start >= CHUNK_BYTES:
            yield chunk
            chunk, chunk_start = [], report.bytes
    if chunk:
        yield chunk


def _encode(records: list[Record], kind: str, chat_format: ChatFormat) -> list[Encoded]:
    """One document per text or conversation, two per pair. The tokenizer uses every core."""
    if kind == "text":
        return [(ids, []) for ids in chat_format.encode_texts(records)]
    if kind == "preference":
        # The chosen and the rejected conversation of each pair, one behind the other.
        encoded = chat_format.encode_conversations(list(chain.from_iterable(records)))
        documents = []
        for chosen, rejected in zip(encoded[0::2], encoded[1::2], strict=True):
            documents += _without_shared_answers(chosen, rejected)
        return documents
    return chat_format.encode_conversations(records)


def _without_shared_answers(chosen: Encoded, rejected: Encoded) -> tuple[Encoded, Encoded]:
    """Both, without the spans of the answers that they have in common before they part: nothing is preferred there.

    The last answer of each stays in any case.
    """
    ids, spans = chosen
    other_ids, other_spans = rejected
    shared = 0
    while shared < min(len(spans), len(other_spans)) - 1:
        end = spans[shared][1]
        if spans[shared] != other_spans[shared] or ids[:end] != other_ids[:end]:
            break
        shared += 1
    return (ids, spans[shared:]), (other_ids, other_spans[shared:])


def _encode_chunk(chunk: list[tuple[int, Record]], kind: str, chat_format: ChatFormat) -> tuple[list[Encoded], dict]:
    """The documents of a chunk, and {line number: why it gives none}."""
    encoded, refused = {}, {}  # by line number
    try:
        documents = _encode([record for _, record in chunk], kind, chat_format)
        per_row = len(documents) // len(chunk)
        for i, (line_number, _) in enumerate(chunk):
            encoded[line_number] = documents[i * per_row : (i + 1) * per_row]
    except ValueError:
        for line_number, record in chunk:
            try:
                encoded[line_number] = _encode([record], kind, chat_format)
            except ValueError as error:
                refused[line_number] = BadLine("refused by the chat format", str(error))
    kept = []
    for line_number, documents in encoded.items():
        if kind == "text" or all(spans for _, spans in documents):
            kept += documents
        else:
            refused[line_number] = UselessLine("nothing to learn", "no message of the assistant has any content")
    return kept, refused
