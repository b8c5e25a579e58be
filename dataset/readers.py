"""Read the three jsonl formats of MiniMind line by line, and say exactly what is wrong with a line that does not fit.

kind          one line of the file                                                         one record
"text"        {"text": "..."}                                                              str
"chat"        {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}   list of messages
"preference"  {"chosen": [messages], "rejected": [messages]}                               (chosen, rejected)

A message is a dict with `role` (system, user, assistant or tool) and `content`; `tools`, `tool_calls` and
`reasoning_content` are passed through. Nothing is kept in memory but the line at hand, so file size does not matter.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.jsonl import Malformed, json_type, parse_object, shown, strip_line
from dataset.formats import foreign_file, foreign_row
from model.chat_format import Message, check_messages

MAX_LINE_BYTES = 8 * 2**20  # one line is tokenised in one piece, which takes some 110x its size in memory
MAX_BAD_SHARE = 0.10
EXAMPLES_KEPT = 5
SAMPLE_DIR = Path(__file__).resolve().parent / "sample"
# What MiniMind's data set has or had; dataset/README.md says which file is for what.
MINIMIND_FILES = {
    f"{name}.jsonl"
    for name in (
        *("pretrain_t2t_mini", "pretrain_t2t", "sft_t2t_mini", "sft_t2t", "dpo", "rlaif", "agent_rl", "agent_rl_math"),
        *("pretrain_hq", "sft_mini_512", "sft_512", "sft_1024", "sft_2048", "r1_mix_1024"),
        *("lora_identity", "lora_medical", "tokenizer_train"),
    )
}
SAMPLE_OF_KIND = {"text": "pretrain.jsonl", "chat": "sft.jsonl", "preference": "dpo.jsonl"}

Record = str | list[Message] | tuple[list[Message], list[Message]]


class DataError(ValueError):
    """The data file cannot be used as it is. The message names file, line, what is wrong and what to do."""


class BadLine(Malformed):
    """One line does not fit. `remedy` is what to do, where that is known."""

    def __init__(self, category: str, detail: str, remedy: str | None = None):
        super().__init__(category, detail)
        self.remedy = remedy


class UselessLine(BadLine):
    """A line in good form from which nothing can be learned: it is left out and counted, and never stops a run."""


@dataclass
class ReadReport:
    """What a reader has seen so far; the reader updates it while it runs.

    lines: physical lines, blank ones included. rows: good records. bytes: of the file. bad: count by category.
    useless: the same for lines that are left out. two_prompts: pairs whose conversations ask different questions.
    """

    path: Path
    on_bad_line: str = "stop"
    lines: int = 0
    rows: int = 0
    bytes: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    useless: dict[str, int] = field(default_factory=dict)
    two_prompts: int = 0
    remedy: str | None = None
    examples: list[str] = field(default_factory=list)

    @property
    def bad_lines(self) -> int:
        return sum(self.bad.values())

    @property
    def is_remarkable(self) -> bool:
        """Whether `str(report)` says more than a number of rows."""
        return bool(self.bad or self.useless or self.two_prompts)

    def reject(self, line_number: int, error: BadLine) -> None:
        """Count a line. Raises DataError at once for a bad one, unless `on_bad_line` is "skip"."""
        if isinstance(error, UselessLine):
            self.useless[error.category] = self.useless.get(error.category, 0) + 1
            return
        if self.on_bad_line != "skip":
            remedy = f"{error.remedy}\nOr" if error.remedy else "Repair or download the file again, or"
            raise DataError(
                f"{self.path}:{line_number}: {error}. {remedy} pass --on_bad_line skip to leave such lines out"
            )
        self.remedy = self.remedy or error.remedy
        self.bad[error.category] = self.bad.get(error.category, 0) + 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"line {line_number}: {error}")
        if self.bad_lines % 1000 == 0:  # a wrong file of 10 GB should not take an hour to be found out
            self._check_share()

    def finish(self) -> None:
        """Raise DataError when the file as a whole is unusable: no row, or more than 10 % bad lines."""
        if self.rows == 0:
            seen = f" ({self})" if self.bad or self.useless else ""
            what = "is empty" if self.bytes == 0 else "has no usable row" + seen
            raise DataError(f"{self.path} {what}. {self.remedy or how_to_get(self.path)}")
        self._check_share()

    def _check_share(self) -> None:
        share = self.bad_lines / (self.bad_lines + self.rows)
        if share > MAX_BAD_SHARE:
            raise DataError(
                f"{self.path}: {share:.1%} of the lines are bad, the limit is {MAX_BAD_SHARE:.0%} ({self}). "
                + (self.remedy or "Is it the right file for this stage? Repair it or download it again")
            )

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.bad_lines} bad lines"
        if self.bad:
            text += f": {_counts(self.bad)}; first: {'; '.join(self.examples)}"
        if self.useless:
            text += f"; left out, since nothing can be learned from them: {_counts(self.useless)}"
        if self.two_prompts:
            text += (
                f"; {self.two_prompts} pairs ask different questions: they are kept, but DPO compares answers to one "
                "question, so look at them"
            )
        return text


def _counts(by_category: dict[str, int]) -> str:
    return ", ".join(f"{count} x {category}" for category, count in sorted(by_category.items()))


def how_to_get(path: Path, kind: str | None = None) -> str:
    """How to download the file if it is one of MiniMind's, and which committed sample to try instead."""
    sample = SAMPLE_DIR / path.name
    if not sample.exists() and kind is not None:
        sample = SAMPLE_DIR / SAMPLE_OF_KIND[kind]
    hint = f"try the sample that is here: --data_path {sample}" if sample.exists() else f"or try a sample: {SAMPLE_DIR}"
    if path.name not in MINIMIND_FILES:
        return f"Check the path: MiniMind's data set has no {path.name} (dataset/README.md lists its files); {hint}"
    file_and_folder = f"{path.name} --local-dir {shlex.quote(str(path.parent))}"
    return (
        "To download MiniMind's data: "
        f"`modelscope download --repo-type dataset gongjy/minimind_dataset {file_and_folder}` or "
        "`HF_ENDPOINT=https://hf-mirror.com hf download --type dataset jingyaogong/minimind_dataset "
        f"{file_and_folder}` (dataset/README.md lists the files); {hint}"
    )


def require_file(path: str | Path, kind: str) -> None:
    """Raises FileNotFoundError or DataError with the remedy unless `path` is a non-empty file that may be jsonl."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a symbolic link to {os.readlink(path)}, which leads nowhere; link it anew")
    if not path.exists():
        raise FileNotFoundError(f"data file {path} not found. {how_to_get(path, kind)}")
    if not path.is_file():
        raise DataError(f"{path} is not a file; --data_path must name one .jsonl file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. {how_to_get(path, kind)}")
    if other := foreign_file(path):
        raise DataError(f"{path} {other}. Then pass the new file with --data_path")


def read_records(
    path: str | Path, kind: str, on_bad_line: str = "stop", report: ReadReport | None = None
) -> Iterator[Record]:
    """Yield the records of a jsonl file in order, validated.

    Accepted silently: UTF-8 byte order marks, CRLF, blank lines, a last line without newline.
    on_bad_line "stop" raises DataError at the first bad line; "skip" counts it in `report`. At the end of the file
    DataError is raised if nothing was usable or more than 10 % was bad. `report.lines` is the number of the line
    the latest record came from.
    """
    path = Path(path)
    if kind not in VALIDATORS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(VALIDATORS)}")
    if on_bad_line not in ("stop", "skip"):
        raise ValueError(f"on_bad_line is {on_bad_line!r}; it must be stop or skip")
    require_file(path, kind)
    if report is None:
        report = ReadReport(path, on_bad_line)
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            report.lines += 1
            report.bytes += len(line)
            complete = line.endswith(b"\n")
            if not complete and len(line) == MAX_LINE_BYTES and (excess := _skip_line(file)):
                report.bytes += excess
                detail = f"the line has {len(line) + excess:,} bytes, the limit is {MAX_LINE_BYTES:,}"
                report.reject(report.lines, BadLine("line too long", detail))
                continue
            if not (line := strip_line(line)):
                continue
            try:
                record = _record(_row(line, complete), kind)
            except BadLine as error:
                report.reject(report.lines, error)
                continue
            if kind == "preference" and _prompts(record[0]) != _prompts(record[1]):
                report.two_prompts += 1
            report.rows += 1
            yield record
    report.finish()


def _skip_line(file) -> int:
    """Read on to the end of the line; returns the bytes passed over."""
    passed = 0
    while part := file.readline(MAX_LINE_BYTES):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _row(line: bytes, complete: bool) -> dict:
    """The JSON object of one line. Raises BadLine."""
    try:
        return parse_object(line)
    except Malformed as error:
        if not complete and error.category in ("not JSON", "not UTF-8"):
            detail = "the last line breaks off, so the file looks truncated (an interrupted download?)"
            raise BadLine("truncated", detail) from None
        raise BadLine(error.category, str(error)) from None


def _record(row: dict, kind: str) -> Record:
    """What a row of ours holds. Raises BadLine, naming the format where the row is another project's or stage's."""
    try:
        return VALIDATORS[kind](row)
    except UselessLine:
        raise
    except Malformed as error:
        if (other := foreign_row(row, kind)) is None:
            raise BadLine(error.category, str(error)) from None
        name, remedy = other
        raise BadLine(name, f"{error}: this is {name}", remedy) from None


def _field(row: dict, key: str, expected: type) -> object:
    if key not in row:
        has = ", ".join(shown(name) for name in list(row)[:8]) or "no key"
        raise BadLine(f'no "{key}"', f'the key "{key}" is missing; the line has {has}')
    if not isinstance(row[key], expected):
        wanted = {str: "a string", list: "an array"}[expected]
        raise BadLine("wrong type", f'"{key}" is a JSON {json_type(row[key])}, it must be {wanted}')
    return row[key]


def _text(row: dict) -> str:
    """A text with something in it."""
    text = _field(row, "text", str)
    if not text.strip():
        raise BadLine("empty", '"text" is empty')
    return text


def _chat(row: dict) -> list[Message]:
    return _messages(row, "conversations")


def _preference(row: dict) -> tuple[list[Message], list[Message]]:
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if chosen == rejected:
        raise UselessLine("equal pair", "chosen and rejected are the same: their difference has no gradient")
    return chosen, rejected


def _prompts(messages: list[Message]) -> list[str]:
    """What is said to the assistant."""
    return [message["content"] for message in messages if message["role"] != "assistant"]


def _messages(row: dict, key: str) -> list[Message]:
    """A conversation that can be rendered, and ends with a non-empty answer."""
    messages = _field(row, key, list)
    check_messages(messages, f'"{key}"')
    for number, message in enumerate(messages, start=1):
        if message.get("content") is None:
            message["content"] = ""  # OpenAI's spelling of an answer that only calls tools, or only thinks
        has_more = message.get("tool_calls") or message.get("reasoning_content")
        if message["role"] == "assistant" and not message["content"].strip() and not has_more:
            raise BadLine(
                "empty answer",
                f'message {number} of "{key}" (assistant) has neither content nor tool_calls nor reasoning_content',
            )
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise BadLine("no answer", f'"{key}" ends with a message of {role}; the last one must be the assistant\'s')
    return messages


VALIDATORS = {"text": _text, "chat": _chat, "preference": _preference}
