"""The readers accept what is right, and say file, line and reason for what is not."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import readers
from dataset.readers import DataError, ReadReport, read_records

USER = {"role": "user", "content": "你好"}
ANSWER = {"role": "assistant", "content": "你好！"}


def chat(*messages) -> dict:
    return {"conversations": list(messages)}


def read(path, kind="text", on_bad_line="stop"):
    return list(read_records(path, kind, on_bad_line))


def test_records_of_each_kind(write_jsonl):
    assert read(write_jsonl([{"text": "一"}, {"text": "二"}])) == ["一", "二"]
    assert read(write_jsonl([chat(USER, ANSWER)]), "chat") == [[USER, ANSWER]]
    other = {**ANSWER, "content": "不好"}
    pairs = [{"chosen": [USER, ANSWER], "rejected": [USER, other]}]
    assert read(write_jsonl(pairs), "preference") == [([USER, ANSWER], [USER, other])]


def test_todays_upstream_fields_pass_through(write_jsonl):
    conversation = [
        {"role": "system", "content": "", "tools": '[{"name": "add"}]'},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "add", "arguments": {}}]'},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2", "reasoning_content": "加法"},
    ]
    assert read(write_jsonl([chat(*conversation)]), "chat") == [conversation]


def test_null_content_beside_tool_calls_reads_as_empty(write_jsonl):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {}}]}
    assert read(write_jsonl([chat(USER, call)]), "chat")[0][1]["content"] == ""


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',  # byte order mark
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'{"text": "a"}\n{"text": "b"}',  # no newline at the end
        b'\n{"text": "a"}\n\n  \n{"text": "b"}\n\n',
    ],
)
def test_harmless_variants_read_the_same(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert read(path) == ["a", "b"]


BAD_LINES = [
    ("text", b'{"text": "a"', "not JSON"),
    ("text", b'{"text": "a"} {"text": "b"}', "not JSON"),
    ("text", b"[" * 100_000, "not JSON"),
    ("text", b'["a"]', "JSON array, it must be an object"),
    ("text", b"null", "JSON null"),
    ("text", b'{"txt": "a"}', "\"text\" is missing; the line has 'txt'"),
    ("text", b'{"text": 7}', '"text" is a JSON number, it must be a string'),
    ("text", b'{"text": " "}', '"text" is empty'),
    ("text", b'{"text": "a\0"}', "NUL"),
    ("text", b"\0" * 4096, "NUL"),
    ("text", b'{"text": "\xff\xfe"}', "not UTF-8 at byte 10"),
    ("text", b'{"text": "\\ud83d"}', "half of a character"),
    ("chat", b'{"text": "a"}', '"conversations" is missing'),
    ("chat", b'{"conversations": []}', "has no message"),
    ("chat", b'{"conversations": "a"}', "JSON string, it must be an array"),
    ("chat", b'{"conversations": ["a"]}', "message 1 .* JSON string"),
    ("chat", b'{"conversations": [{"role": "bot", "content": "a"}]}', "role 'bot'"),
    ("chat", b'{"conversations": [{"content": "a"}]}', "role None"),
    ("chat", b'{"conversations": [{"role": "user", "content": "a"}]}', "ends with a message of user"),
    ("chat", b'{"conversations": [{"role": "assistant", "content": ""}]}', "neither content nor tool_calls"),
    ("chat", b'{"conversations": [{"role": "assistant", "content": null}]}', '"content" is a JSON null'),
    ("preference", b'{"chosen": [{"role": "assistant", "content": "a"}]}', '"rejected" is missing'),
    ("preference", b'{"chosen": [{"role": "assistant", "content": "a"}], "rejected": []}', '"rejected" has no message'),
]


@pytest.mark.parametrize(("kind", "line", "reason"), BAD_LINES)
def test_bad_line_is_named_or_skipped(write_jsonl, kind, line, reason):
    """Upstream D9: one corrupt line stopped everything with a bare traceback."""
    good = {
        "text": {"text": "a"},
        "chat": chat(USER, ANSWER),
        "preference": {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
    }[kind]
    path = write_jsonl([good, line, *[good] * 10])
    with pytest.raises(DataError, match=reason) as error:
        read(path, kind)
    assert f"{path}:2: " in str(error.value)
    assert "--on_bad_line skip" in str(error.value)

    report = ReadReport(path, "skip")
    assert len(list(read_records(path, kind, "skip", report))) == 11
    assert (report.rows, report.bad_lines) == (11, 1)
    assert report.examples[0].startswith("line 2: ")


def test_truncated_file_is_recognised(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"text": "一"}\n{"text": "二"}\n'.encode()[:-4])
    with pytest.raises(DataError, match="data.jsonl:2: .*truncated"):
        read(path)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1))
def test_any_text_survives(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("text") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read(path) == texts


def test_lines_up_to_the_limit_are_read_and_longer_ones_are_bad(write_jsonl, monkeypatch):
    assert read(write_jsonl([{"text": "长" * 2**19}])) == ["长" * 2**19]

    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    fits, too_long = {"text": "a" * 87}, {"text": "a" * 500}  # 100 bytes with the newline
    rows = [fits, *[{"text": "b"}] * 20, too_long, {"text": "c"}]
    report = ReadReport(Path("x"), "skip")
    texts = list(read_records(write_jsonl(rows), "text", "skip", report))
    assert texts == ["a" * 87, *["b"] * 20, "c"]
    assert report.bad == {"line too long": 1}
    assert "513 bytes" in report.examples[0]


def test_counts_by_reason_and_first_line_numbers(write_jsonl):
    rows = [{"text": "a"}] * 100 + [{"text": ""}, b"{", b"{", {"text": "b"}]
    report = ReadReport(Path("x"), "skip")
    list(read_records(write_jsonl(rows), "text", "skip", report))
    assert report.bad == {"empty": 1, "not JSON": 2}
    assert [example.split(":")[0] for example in report.examples] == ["line 101", "line 102", "line 103"]
    assert "101 rows, 3 bad lines: 1 x empty, 2 x not JSON" in str(report)


def test_more_than_a_tenth_bad_lines_stops_even_when_skipping(write_jsonl):
    with pytest.raises(DataError, match="16.7% of the lines are bad, the limit is 10%"):
        read(write_jsonl([{"text": "a"}] * 5 + [b"{"]), on_bad_line="skip")


def test_wrong_large_file_stops_early(write_jsonl):
    report = ReadReport(Path("x"), "skip")
    with pytest.raises(DataError, match="100.0% of the lines are bad"):
        list(read_records(write_jsonl([b"{"] * 5000), "text", "skip", report))
    assert report.lines == 1000


def test_missing_file_says_how_to_get_it_and_what_to_try(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read(tmp_path / "pretrain_hq.jsonl")
    message = str(error.value)
    assert "pretrain_hq.jsonl not found" in message
    assert "modelscope download" in message and "hf download" in message
    sample = readers.SAMPLE_DIR / "pretrain.jsonl"
    assert sample.exists() and f"--data_path {sample}" in message


def test_empty_file_directory_and_file_without_rows(tmp_path, write_jsonl):
    with pytest.raises(DataError, match="is empty"):
        read(write_jsonl([]))
    with pytest.raises(DataError, match="no usable row"):
        read(write_jsonl([b"", b"  "]))
    with pytest.raises(DataError, match="not a file"):
        read(tmp_path)


def test_unknown_options(write_jsonl):
    path = write_jsonl([{"text": "a"}])
    with pytest.raises(ValueError, match="kind is 'sft'"):
        read(path, "sft")
    with pytest.raises(ValueError, match="on_bad_line is 'ignore'"):
        read(path, "text", "ignore")


def test_every_example_of_the_readme_reads(write_jsonl):
    lines = re.findall(r"`(\{.*?\})`[ ,]", (readers.SAMPLE_DIR.parent / "README.md").read_text(encoding="utf-8"))
    kinds = {"text": "text", "conversations": "chat", "chosen": "preference"}
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert len(read(write_jsonl([row]), kinds[next(iter(row))])) == 1
    assert {next(iter(row)) for row in rows} == set(kinds)
