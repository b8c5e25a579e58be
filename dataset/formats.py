"""What a data file or a row is when it is not in a format of ours, and how to make it one of ours.

Most files that cannot be read are not damaged: they are compressed, in another encoding, or another project's format.
"""

import re
import shlex
from pathlib import Path

HEAD_BYTES = 4096

# Commands for the shell, where {path}, {folder} and {out} are quoted words; Python finds the files in sys.argv.
UNPACK = [
    # From stdin: gzip, bzip2, xz and zstd refuse a file whose name does not end as theirs do.
    (b"\x1f\x8b", "is compressed with gzip", "gzip -dc < {path} > {out}"),
    (b"BZh", "is compressed with bzip2", "bzip2 -dc < {path} > {out}"),
    (b"\xfd7zXZ\0", "is compressed with xz", "xz -dc < {path} > {out}"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard", "zstd -dc < {path} > {out}"),
    (b"PK\x03\x04", "is a zip archive (or an Excel file)", "python -m zipfile -e {path} {folder}"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "7z x {path}"),
    (b"Rar!", "is a rar archive", "unrar x {path}"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the data", "git lfs pull"),
]
TABLES = [
    (b"PAR1", "is a Parquet table", "import pandas; pandas.read_parquet(sys.argv[1])"),
    (b"ARROW1", "is an Arrow table", "import pandas; pandas.read_feather(sys.argv[1])"),
    (b"SQLite format 3\0", "is an SQLite database",
     "import pandas, sqlite3; pandas.read_sql('select * from TABLE', sqlite3.connect(sys.argv[1]))"),
]  # fmt: skip
TO_JSONL = ".to_json(sys.argv[2], orient='records', lines=True, force_ascii=False)"
RECODE = "open(sys.argv[2], 'w', encoding='utf-8').write(open(sys.argv[1], encoding='{encoding}').read())"
SPLIT_ARRAY = (
    "import json; open(sys.argv[2], 'w', encoding='utf-8').writelines(json.dumps(row, ensure_ascii=False) + "
    "'\\n' for row in json.load(open(sys.argv[1], encoding='utf-8-sig')))"
)
WRAP_LINES = (
    "import json; open(sys.argv[2], 'w', encoding='utf-8').writelines(json.dumps(dict(text=line.strip()), "
    "ensure_ascii=False) + '\\n' for line in open(sys.argv[1], encoding='utf-8-sig') if line.strip())"
)


def foreign_file(path: Path) -> str | None:
    """What a file is that is not jsonl in UTF-8, and the command that makes it so; None where nothing speaks for that.

    Reads the first 4 KiB only.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    words = {"path": path, "folder": path.parent, "out": path.with_suffix(".new.jsonl")}
    names = {name: shlex.quote(str(word)) for name, word in words.items()}
    for magic, what, command in UNPACK:
        if head.startswith(magic):
            return f"{what}: unpack it with `{command.format(**names)}`"
    if head[257:262] == b"ustar":
        return f"is a tar archive: unpack it with `tar xf {names['path']}`"
    for magic, what, code in TABLES:
        if head.startswith(magic):
            return f"{what}: {_python(code + TO_JSONL, names)} (pip install pandas pyarrow) writes jsonl"
    if encoding := _other_encoding(head):
        return (
            f"is text in {encoding}, not in UTF-8: {_python(RECODE.format(encoding=encoding), names)} writes it again"
        )
    return _other_text(head, names)


def _python(code: str, names: dict[str, str]) -> str:
    """The shell command for a line of Python without double quotes, which finds the two files in sys.argv."""
    return f'`python -c "import sys; {code}" {names["path"]} {names["out"]}`'


def _other_encoding(head: bytes) -> str | None:
    """The name of the encoding, where the bytes are text in another one than UTF-8."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if re.match(rb"[{\[]\0", head):
        return "utf-16-le"
    if re.match(rb"\0[{\[]", head):
        return "utf-16-be"
    text = head.decode("utf-8", "replace")
    foreign = [char for char in text if ord(char) > 127]
    if foreign.count("\ufffd") > len(foreign) / 3:  # one damaged byte is another matter
        for cut in (0, 1, 2, 3):  # the end of the head may cut a character in two
            try:
                chinese = head[: len(head) - cut].decode("gb18030")
            except UnicodeDecodeError:
                continue
            return "gb18030" if len(re.findall("[\u4e00-\u9fff]", chinese)) >= 4 else None
    return None


def _other_text(head: bytes, names: dict) -> str | None:
    """The same for text that is no jsonl: one JSON value over the whole file, tables, web pages, plain text."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\[\s*(\{|$)", start):
        return f"is one JSON array, not a row on each line: {_python(SPLIT_ARRAY, names)} writes the rows"
    if re.match(rb'\{[ \t]*\r?\n\s*"[^"\n]*"\s*:', start):
        return (
            "is JSON spread over several lines, not a row on each line: "
            + "`jq -c . {path} > {out}` joins them".format(**names)
        )
    if b"\n" not in head and re.search(rb"\}[ \t]*\r\s*\{", head):
        code = RECODE.format(encoding="utf-8-sig")  # which reads all kinds of line ends and writes today's
        return f"is text with the line ends of old Macs, CR alone: {_python(code, names)} writes it again"
    if re.match(rb"<(!doctype|html|\?xml)", start, re.I):
        return "is a web page or XML (an error or login page instead of the file?): open it to see, and download again"
    lines = start.splitlines()
    if not lines or b"\0" in head or any(line.lstrip().startswith(b"{") for line in lines):
        return None
    for separator, what, code in ((b"\t", "tabs", ", sep='\\t'"), (b",", "commas (CSV)", "")):
        if len(lines) > 1 and lines[0].count(separator) and all(separator in line for line in lines[:2]):
            code = f"import pandas; pandas.read_csv(sys.argv[1]{code})" + TO_JSONL
            return f"is a table with {what}: {_python(code, names)} (pip install pandas) writes jsonl"
    if b"[" in start[:1] or len(start) < 40:
        return None
    return f"is plain text, not JSON: {_python(WRAP_LINES, names)} makes each line a text for pretraining"


CHAT_ROW = '{"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
NEEDED = {
    "text": '{"text": "..."}',
    "chat": CHAT_ROW,
    "preference": '{"chosen": [messages], "rejected": [messages]}, each a list like ' + CHAT_ROW[18:-1],
}
_TURNS = '[{{"role": "user", "content": {}}}, {{"role": "assistant", "content": {}}}]'
_ROLES = '{"human": "user", "gpt": "assistant"}'
CONVERSIONS = {
    # name: (keys that a row has, kind it can be made, the row of ours as a Python expression)
    "Alpaca": ({"instruction", "output"}, "chat", '{"conversations": '
               + _TURNS.format('(row["instruction"] + "\\n" + row.get("input", "")).strip()', 'row["output"]') + "}"),
    "messages (OpenAI)": ({"messages"}, "chat", '{"conversations": row["messages"]}'),
    "ShareGPT": ({"conversations"}, "chat", '{"conversations": [{"role": ' + _ROLES
                 + '.get(m["from"], m["from"]), "content": m["value"]} for m in row["conversations"]]}'),
    "prompt and chosen text": ({"prompt", "chosen", "rejected"}, "preference", "{name: "
                               + _TURNS.format('row["prompt"]', "row[name]") + ' for name in ("chosen", "rejected")}'),
    **{f"{a} and {b}": ({a, b}, "chat", '{"conversations": ' + _TURNS.format(f'row["{a}"]', f'row["{b}"]') + "}")
       for a, b in (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))},
}  # fmt: skip
STAGE_OF = {
    "text": ("text", "pretraining: train_pretrain.py reads it"),
    "conversations": ("chat", "fine-tuning: train_full_sft.py reads it"),
    "chosen": ("preference", "DPO: train_dpo.py reads it"),
}


def foreign_row(row: dict, kind: str) -> tuple[str, str] | None:
    """The name of the format of a row that is not of our `kind`, and what to do; None for an unknown one.

    Called only for rows that do not fit, so a row of ours is never taken for something else.
    """
    for name, (keys, makes, expression) in CONVERSIONS.items():
        if keys <= row.keys() and makes == kind and (name != "ShareGPT" or _is_sharegpt(row)):
            return f"a row in the format {name}", (
                f"This stage needs {NEEDED[kind]}. Three lines of Python convert such a file:\n"
                "    import json\n"
                '    rows = [json.loads(line) for line in open("IN.jsonl", encoding="utf-8")]\n'
                '    open("OUT.jsonl", "w", encoding="utf-8").writelines('
                f'json.dumps({expression}, ensure_ascii=False) + "\\n" for row in rows)'
            )
    for key, (other, stage) in STAGE_OF.items():
        if key in row and other != kind:
            return f"a row for {stage.partition(':')[0]}", f"It is for {stage}; this stage needs {NEEDED[kind]}"
    return None


def _is_sharegpt(row: dict) -> bool:
    messages = row["conversations"]
    return isinstance(messages, list) and any(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in messages)
