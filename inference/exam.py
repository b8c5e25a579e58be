"""Questions with options in a jsonl file of one's own: read, check, and say what is wrong with a line.

One JSON object a line, packed with xz or gzip or not:

    {"question": "...", "A": "...", "B": "...", "C": "...", "D": "...", "answer": "B", "subject": "...", "split": "dev"}
    {"question": "...", "choices": ["...", "...", "...", "..."], "answer": 1, "subject": "..."}

`answer` is a letter, or a number that counts from 0; `subject`, `category` and `split` are optional. Rows whose split
is "dev" or "train" are the examples for --num_fewshot, all others are asked.
"""

from __future__ import annotations

import gzip
import lzma
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.jsonl import json_type, parse_object, shown, strip_line

EXAMPLE_SPLITS = ("dev", "train")
PACKED = {b"\xfd7zXZ\x00": lzma.open, b"\x1f\x8b": gzip.open}
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class ExamQuestion:
    """A question, its options, and which of them is right (counted from 0)."""

    question: str
    options: tuple[str, ...]
    key: int
    subject: str = ""
    category: str = ""
    is_example: bool = False


def read_exam(path: str | Path) -> list[ExamQuestion]:
    """All questions of a file, examples included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be unpacked, a line is no question (file, line number, reason), or nothing is asked.
    """
    path, questions, number = Path(path), [], 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            try:
                if line := strip_line(line):
                    questions.append(parse_question(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged after line {number} ({error}): copy or download it again") from error
    if all(question.is_example for question in questions):
        raise ValueError(
            f'{path} asks nothing: it needs lines such as {{"question": "...", "A": "...", "B": "...", "answer": "A"}} '
            f'whose "split" is not {" or ".join(EXAMPLE_SPLITS)}'
        )
    return questions


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file, _unpacked(file) as unpacked:
        yield from unpacked


def _unpacked(file: BinaryIO) -> BinaryIO:
    start = file.read(6)
    file.seek(0)
    for magic, open_packed in PACKED.items():
        if start.startswith(magic):
            return open_packed(file)
    return file


def parse_question(line: bytes) -> ExamQuestion:
    """A line of a file of questions; ValueError says what is wrong with it."""
    row = parse_object(line)
    question = row.get("question", row.get("Question"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"'question' must be a text that is not empty, it is {_described(question)}")
    options = _options(row)
    answer = row.get("answer", row.get("Answer"))
    key = _key(answer, len(options))
    texts = {name: row.get(name, "") for name in ("subject", "category", "split")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name!r} must be a text, it is {_described(value)}")
    return ExamQuestion(
        question, options, key, texts["subject"], texts["category"], is_example=texts["split"] in EXAMPLE_SPLITS
    )


def _options(row: dict) -> tuple[str, ...]:
    """The options, from `choices` or from A, B, C...; ValueError unless there are 2 to 26 texts, none empty."""
    options = row.get("choices")
    if options is None:
        last = max((LETTERS.index(key) for key in row if key in LETTERS and len(key) == 1), default=-1)
        options = [row.get(letter) for letter in LETTERS[: last + 1]]  # None where a letter is left out
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a question needs 2 to 26 options, as 'A', 'B', ... or as a list 'choices': {shown(options)}")
    for letter, option in zip(LETTERS[: len(options)], options, strict=True):
        if not isinstance(option, str) or not option.strip():
            raise ValueError(f"option {letter} must be a text that is not empty, it is {_described(option)}")
    return tuple(options)


def _key(answer: object, count: int) -> int:
    """Which option is right, counted from 0."""
    letters = LETTERS[:count]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        return letters.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
        return answer
    allowed = f"a letter from A to {letters[-1]} or a number from 0 to {count - 1}"
    raise ValueError(f"'answer' must be {allowed}, it is {_described(answer)}")


def _described(value: object) -> str:
    return "missing" if value is None else f"the {json_type(value)} {shown(value)}"
