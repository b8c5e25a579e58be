"""The readers accept what is right, and say file, line and reason for what is not."""

import bz2
import gzip
import json
import lzma
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset import readers
from dataset.formats import foreign_file
from dataset.readers import DataError, ReadReport, read_records
from dataset.token_cache import open_token_cache
from dataset.tokenizing import encoded_chunks
from model.chat_format import ROLES

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


def test_null_content_beside_tool_calls_or_thoughts_reads_as_empty(write_jsonl):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {}}]}
    thought = {"role": "assistant", "content": None, "reasoning_content": "想"}
    assert [row[1]["content"] for row in read(write_jsonl([chat(USER, call), chat(USER, thought)]), "chat")] == ["", ""]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',  # byte order mark
        b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n',  # two files joined
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
    ("text", b'{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
    ("text", b'{"text": "a", "n": ' + b"7" * 5000 + b"}", "not JSON: .*digits"),
    ("chat", b'{"text": "a"}', '"conversations" is missing'),
    ("chat", b'{"conversations": []}', '"conversations" is empty'),
    ("chat", b'{"conversations": "a"}', "JSON string, it must be an array"),
    ("chat", b'{"conversations": ["a"]}', "message 1 .* JSON string"),
    ("chat", b'{"conversations": [{"role": "bot", "content": "a"}]}', "role 'bot'"),
    ("chat", b'{"conversations": [{"content": "a"}]}', "role None"),
    ("chat", b'{"conversations": [{"role": "user", "content": "a"}]}', "ends with a message of user"),
    ("chat", b'{"conversations": [{"role": "assistant", "content": ""}]}', "neither content nor tool_calls"),
    ("chat", b'{"conversations": [{"role": "assistant", "content": null}]}', '"content" is a JSON null'),
    ("preference", b'{"chosen": [{"role": "assistant", "content": "a"}]}', '"rejected" is missing'),
    ("preference", b'{"chosen": [{"role": "assistant", "content": "a"}], "rejected": []}', '"rejected" is empty'),
]


@pytest.mark.parametrize(("kind", "line", "reason"), BAD_LINES)
def test_bad_line_is_named_or_skipped(write_jsonl, kind, line, reason):
    """Upstream D9: one corrupt line stopped everything with a bare traceback."""
    good = {
        "text": {"text": "a"},
        "chat": chat(USER, ANSWER),
        "preference": {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "不"}]},
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
    assert message.count(f"pretrain_hq.jsonl --local-dir {tmp_path}`") == 2
    sample = readers.SAMPLE_DIR / "pretrain.jsonl"
    assert sample.exists() and f"--data_path {sample}" in message


def test_no_download_is_offered_for_a_file_that_minimind_never_had(tmp_path):
    with pytest.raises(FileNotFoundError, match="my.jsonl not found. Check the path") as error:
        read(tmp_path / "my.jsonl")
    assert "modelscope" not in str(error.value) and f"{readers.SAMPLE_DIR / 'pretrain.jsonl'}" in str(error.value)


def test_a_symbolic_link_that_leads_nowhere_or_in_a_circle_is_told(tmp_path, chat_format):
    """`Path.resolve` raised a RuntimeError."""
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    (tmp_path / "lost.jsonl").symlink_to("gone.jsonl")
    for name in ("a.jsonl", "lost.jsonl"):
        with pytest.raises(FileNotFoundError, match="symbolic link"):
            open_token_cache(tmp_path / name, "text", chat_format, tmp_path / "cache")


# Other formats


ROWS = b'{"text": "a"}\n{"text": "b"}\n'
CHINESE = '{"text": "今天天气很好，我们去公园。"}\n' * 3
FOREIGN = [
    (gzip.compress(ROWS), "compressed with gzip: unpack it with `gzip -dc"),
    (lzma.compress(ROWS), "compressed with xz: unpack it with `xz -dc"),
    (bz2.compress(ROWS), "compressed with bzip2"),
    (b"\x28\xb5\x2f\xfd....", "compressed with Zstandard"),
    (b"PK\x03\x04....", "zip archive .*python -m zipfile -e"),
    (b"PAR1....", "Parquet table: `python -c .*read_parquet"),
    (b"SQLite format 3\0....", "SQLite database: .*read_sql"),
    (b"a.jsonl".ljust(257, b"\0") + b"ustar", "tar archive"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (CHINESE.encode("utf-16"), "text in utf-16, not in UTF-8: `python -c"),
    (CHINESE.encode("utf-16-le"), "text in utf-16-le"),
    (CHINESE.encode("utf-16-be"), "text in utf-16-be"),
    (CHINESE.encode("utf-32"), "text in utf-32"),
    (CHINESE.encode("gbk"), "text in gb18030"),
    (ROWS.replace(b"\n", b"\r"), "text with the line ends of old Macs"),
    (b'[{"text": "a"},\n {"text": "b"}]', "one JSON array"),
    (b'\xef\xbb\xbf[\n  {\n    "text": "a"\n  }\n]', "one JSON array"),
    (b'{\n  "text": "a"\n}\n', "spread over several lines.*`jq -c"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"instruction,output\nhello,world\n", "table with commas .CSV.: .*read_csv"),
    (b"question\tanswer\n1+1\t2\n", "table with tabs"),
    ("从前有座山，山里有座庙。\n庙里有个老和尚。\n".encode() * 3, "plain text, not JSON"),
]


@pytest.mark.parametrize(("content", "words"), FOREIGN, ids=[words[:20] for _, words in FOREIGN])
def test_a_file_in_another_format_is_named_with_the_command_that_helps(tmp_path, content, words):
    """UTF-16, gzip and Parquet were called damaged downloads."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    for on_bad_line in ("stop", "skip"):
        with pytest.raises(DataError, match=f"(?s)data.jsonl is .*{words}") as error:
            read(path, on_bad_line=on_bad_line)
        assert "download" not in str(error.value) or "web page" in words


@pytest.mark.parametrize("name", ["data.jsonl", "数据 'a\" $b `c.jsonl"])
def test_the_commands_that_are_named_work(name, tmp_path):
    """As they are pasted into a shell: gzip -dk refuses any file that does not end in .gz."""
    path, run = tmp_path / name, 0
    for content, words in FOREIGN:
        path.write_bytes(content)
        _, _, command = foreign_file(path).partition("`")
        command = command.rpartition("`")[0]
        is_runnable = ".new.jsonl" in command and "pandas" not in command and shutil.which(command.split()[0])
        if not is_runnable or content.endswith(b"...."):  # nothing but the first bytes of such a file
            continue
        python = f"{shlex.quote(sys.executable)} -c"
        subprocess.run(command.replace("python -c", python, 1), shell=True, check=True, cwd=tmp_path)
        assert len(read(path.with_suffix(".new.jsonl"))) >= 1, words
        path.with_suffix(".new.jsonl").unlink()
        run += 1
    assert run >= 8


FOREIGN_ROWS = [
    ("chat", {"instruction": "加", "input": "1+1", "output": "2"}, "Alpaca"),
    ("chat", {"messages": [USER, ANSWER]}, "messages"),
    ("chat", {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}, "ShareGPT"),
    ("chat", {"question": "1+1", "answer": "2"}, "question and answer"),
    ("preference", {"prompt": "1+1", "chosen": "2", "rejected": "3"}, "prompt and chosen text"),
]


@pytest.mark.parametrize(("kind", "row", "name"), FOREIGN_ROWS)
def test_a_row_in_another_format_is_named_and_the_conversion_shown_works(write_jsonl, tmp_path, kind, row, name):
    path = write_jsonl([row] * 3)
    with pytest.raises(DataError, match=f"a row in the format .*{name}") as error:
        read(path, kind)
    with pytest.raises(DataError, match="import json"):  # all lines are bad
        read(path, kind, "skip")
    code = re.search(r"    import json\n.*\n.*", str(error.value))[0]
    code = textwrap.dedent(code).replace("IN.jsonl", str(path)).replace("OUT.jsonl", str(tmp_path / "out.jsonl"))
    exec(code, {})
    assert len(read(tmp_path / "out.jsonl", kind)) == 3


def test_a_file_of_another_stage_names_the_script_that_reads_it(write_jsonl):
    for row, kind, script in (
        ({"text": "a"}, "chat", "train_pretrain.py"),
        (chat(USER, ANSWER), "text", "train_full_sft.py"),
        ({"chosen": [], "rejected": []}, "chat", "train_dpo.py"),
    ):
        with pytest.raises(DataError, match=script):
            read(write_jsonl([row]), kind)


# Rows of no use


def test_equal_and_unlike_pairs_are_told(write_jsonl):
    """The gradient of an equal pair is zero: left out. Different questions: kept and told."""
    other, question = {**ANSWER, "content": "不"}, {**USER, "content": "在吗"}
    good = {"chosen": [USER, ANSWER], "rejected": [USER, other]}
    equal = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    unlike = {"chosen": [USER, ANSWER], "rejected": [question, other]}
    path = write_jsonl([good, equal, equal, unlike])
    report = ReadReport(path)
    assert len(list(read_records(path, "preference", "stop", report))) == 2
    assert (report.useless, report.two_prompts, report.bad) == ({"equal pair": 2}, 1, {})
    assert "2 x equal pair" in str(report) and "1 pairs ask different questions" in str(report)
    with pytest.raises(DataError, match="no usable row .*1 x equal pair"):
        read(write_jsonl([equal]), "preference")


# Any row at all


KEYS = ["text", "conversations", "chosen", "rejected", "role", "content", "tools", "tool_calls", "reasoning_content",
        "function", "name", "arguments", "messages", "instruction", "output", "from", "value"]  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["", " ", "你好", "</s>", *ROLES]),
    st.text(max_size=5), st.sampled_from(["[]", "[{}]", "[" * 5000, '[{"function": "f"}]', "9" * 5000]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "bot", None, []]), "content": LEAVES},
    optional={key: VALUES for key in ("tools", "tool_calls", "reasoning_content")},
)
MESSAGES = st.lists(MESSAGE, max_size=3).map(lambda messages: [*messages, ANSWER]) | VALUES
ROW = st.fixed_dictionaries({}, optional={"text": LEAVES, "conversations": MESSAGES, "chosen": MESSAGES,
                                          "rejected": MESSAGES, "messages": MESSAGES}) | VALUES  # fmt: skip


@settings(max_examples=150)
@given(row=ROW, kind=st.sampled_from(list(readers.VALIDATORS)), on_bad_line=st.sampled_from(["stop", "skip"]))
@example({"conversations": [USER, {**ANSWER, "tool_calls": [{"function": "f"}]}]}, "chat", "skip")
@example({"conversations": [{"role": "system", "content": "", "tools": "[" * 10**5}, USER, ANSWER]}, "chat", "skip")
@example({"conversations": [USER, {**ANSWER, "content": "", "tool_calls": "[]"}]}, "chat", "skip")
@example({"conversations": [{**ANSWER, "tool_calls": '[{"name": "\\ud800", "arguments": {}}]'}]}, "chat", "skip")
def test_no_row_ends_in_a_traceback(tmp_path_factory, chat_format, row, kind, on_bad_line):
    """Whatever the row, each good one around it is read; or DataError says what is wrong."""
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    good = {"text": "好", "conversations": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [ANSWER]}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*[good] * 9, row, good]), encoding="utf-8")
    report = ReadReport(path, on_bad_line)
    try:
        documents = sum((list(chunk) for chunk in encoded_chunks(report, kind, chat_format, print)), [])
    except DataError as error:
        assert on_bad_line == "stop" and "data.jsonl:10: " in str(error)
    else:
        assert len(documents) == report.rows * (2 if kind == "preference" else 1)
        assert report.rows + report.bad_lines + sum(report.useless.values()) == 11 and report.rows >= 10


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


@pytest.mark.parametrize("name", ["README.md", "README_en.md"])
def test_every_example_of_the_readme_reads(write_jsonl, name):
    lines = re.findall(r"`(\{.*?\})`[ ,]", (readers.SAMPLE_DIR.parent / name).read_text(encoding="utf-8"))
    kinds = {"text": "text", "conversations": "chat", "chosen": "preference"}
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert len(read(write_jsonl([row]), kinds[next(iter(row))])) == 1
    assert {next(iter(row)) for row in rows} == set(kinds)
