"""One JSON object a line, as all our data has it: reading a line, and every way in which one is broken, in words."""

import json

UTF8_BOM = b"\xef\xbb\xbf"


class Malformed(ValueError):
    """Data has another form than it should. `category`: what it is counted under, in a word or two."""

    def __init__(self, category: str, detail: str):
        super().__init__(detail)
        self.category = category


def strip_line(line: bytes) -> bytes:
    """A line without what carries no meaning around it: white space, and the marks that files begin with."""
    return line.removeprefix(UTF8_BOM).strip(b" \t\r\n")  # joined files have marks inside


def parse_object(line: bytes) -> dict:
    """The JSON object of one line. Raises Malformed."""
    if b"\0" in line:
        raise Malformed(
            "NUL byte",
            "the line holds NUL bytes: the file is no UTF-8 text, or damaged (an interrupted download or copy?)",
        )
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except Malformed:
        raise
    except UnicodeDecodeError as error:
        raise Malformed("not UTF-8", f"not UTF-8 at byte {error.start} of the line; save it as UTF-8") from None
    except RecursionError:
        raise Malformed("not JSON", "not JSON: its brackets are nested too deeply") from None
    except ValueError as error:  # no JSON, or an integer of 5,000 digits
        raise Malformed("not JSON", f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Malformed("wrong type", f"the line is a JSON {json_type(row)}, it must be an object")
    # JSON can spell half of a surrogate pair (\ud83d), which no tokenizer can encode; only such lines need the check.
    if b"\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise Malformed("lone surrogate", "a \\uD8xx escape is only half of a character") from None
        except RecursionError:
            raise Malformed("not JSON", "not JSON: its brackets are nested too deeply") from None
    return row


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises Malformed where a key occurs twice: Python would silently take the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Malformed("key twice", f"the key {shown(twice)} occurs twice in one object")
    return row


def json_type(value: object) -> str:
    """What JSON calls the type of a parsed value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
