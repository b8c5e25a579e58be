"""What the value of a flag may be, and a parser that tells all that is wrong at once, before any work.

The types here never raise: in the place of a bad value they return a `Problem`. `BriefParser` collects these from all
flags, adds what the checks between flags find, and leaves with one message and exit code 2.
"""

import argparse
import contextlib
import difflib
import errno
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

FORBIDDEN_IN_NAMES = set('/\\:*?"<>|')  # by some file system; the first two lead out of the directory
LONGEST_NAME = 100  # bytes; file systems allow 255, and suffixes are added
LONGEST_SHOWN = 200  # characters of a path
REMEDIES = {
    errno.EACCES: "get the permission (ls -ld shows who has it) or pass another place",
    errno.ENAMETOOLONG: "a name may have 255 bytes and a path some 4,000, so pass a shorter one",
    errno.ENOSPC: "make room there or pass another place",
    errno.EMFILE: "too many files are open: raise the limit with ulimit -n",
}
INTERVAL = 10**9  # the most steps any interval or limit may count


class Problem(str):
    """What is wrong with a value: `value: what it must be`."""


def problem(text: str, limit: str) -> Problem:
    shown = text if text.strip() and text.isprintable() else repr(text)
    return Problem(f"{shown if len(shown) <= 60 else shown[:60] + '...'}: {limit}")


def whole(least: int, most: int) -> Callable[[str], int | Problem]:
    """The type of a whole number with its limits, both allowed."""

    def parse(text: str) -> int | Problem:
        try:
            value = int(text)
        except ValueError:
            return problem(text, f"must be a whole number from {least} to {most}")
        return value if least <= value <= most else problem(text, f"must be a whole number from {least} to {most}")

    return parse


def real(least: float, most: float, *, or_zero: bool = False, below: bool = False) -> Callable[[str], float | Problem]:
    """The type of a real number with its limits; nan is outside of all limits.

    Args:
        or_zero: 0 is allowed too, and means off.
        below: `most` itself is not allowed.
    """
    limits = f"must be {'0 or ' if or_zero else ''}a number from {least:g} to {'below ' if below else ''}{most:g}"

    def parse(text: str) -> float | Problem:
        try:
            value = float(text)
        except ValueError:
            return problem(text, limits)
        inside = least <= value <= most and not (below and value == most)
        return value if inside or (or_zero and value == 0) else problem(text, limits)

    return parse


def non_empty(value: str) -> str | Problem:
    """The type of a path, or of a name that is only looked up: anything but nothing, and what no file can be called."""
    if "\0" in value:
        return problem(value, "must not hold a NUL character")
    return value if value.strip() else problem(value, "must not be empty")


def file_name(value: str) -> str | Problem:
    """The type of a name that a file is named after: it must not lead out of the directory it is written to."""
    usable = value.strip() and value.isprintable() and not value.startswith(".")
    if usable and not FORBIDDEN_IN_NAMES & set(value) and len(value.encode()) <= LONGEST_NAME:
        return value
    forbidden = " ".join(sorted(FORBIDDEN_IN_NAMES))
    return problem(
        value,
        f"must be a plain name of at most {LONGEST_NAME} bytes, without {forbidden} and no dot in front; "
        "--out_dir says which directory it is written to",
    )


def one_of_these(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...] | Problem]:
    """The type of a list of words, separated by commas: a tuple of one or more of `allowed`."""

    def parse(text: str) -> tuple[str, ...] | Problem:
        words = tuple(word.strip() for word in text.split(","))
        return words if set(words) <= set(allowed) else problem(text, f"must be one or more of {','.join(allowed)}")

    return parse


def parse_bool(text: str) -> bool | Problem:
    """``True/False/1/0/yes/no`` in any case, and the empty string as False.

    ``type=bool`` would read ``--use_moe False`` as True: every non-empty string is true in Python.
    """
    value = text.strip().lower()
    if value in ("true", "1", "yes", "y", "on"):
        return True
    if value in ("false", "0", "no", "n", "off", ""):
        return False
    return problem(text, "is not a yes or a no: write True, False, 1 or 0")


def parse_resume(text: str) -> bool | str | Problem:
    """What ``parse_bool`` accepts, or ``auto``."""
    return "auto" if text.strip().lower() == "auto" else parse_bool(text)


def add_bool_flag(parser, *names: str, default: bool | None, help: str) -> None:
    """Add a boolean flag that accepts ``--flag``, ``--flag True``, ``--flag False`` and ``--flag 0/1``."""
    parser.add_argument(*names, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", help=help)


class BriefParser(argparse.ArgumentParser):
    """An ArgumentParser that tells every problem at once, not buried under the usage of some forty flags.

    Args:
        check: called with the parsed flags, returns what is wrong between them; a value that is bad by itself has been
            replaced by its default by then. More are added with `add_check`.
    """

    def __init__(self, *args, check: Callable[[argparse.Namespace], list[str]] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._checks = [check] if check else []
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.I)  # argparse's takes -1e30 for a flag

    def add_check(self, check: Callable[[argparse.Namespace], list[str]]) -> None:
        self._checks.append(check)

    def parse_args(self, args=None, namespace=None):
        parsed, left_over = self.parse_known_args(args, namespace)
        problems = self._unknown(left_over)
        for name, value in vars(parsed).items():
            wrong = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, Problem)]
            if wrong:
                problems += [f"--{name} {part}" for part in wrong]
                setattr(parsed, name, self.get_default(name))
        for check in self._checks:
            problems += check(parsed)
        if problems:
            self.error("\n  ".join(["these flags cannot be used:", *problems]))
        return parsed

    def _unknown(self, words: list[str]) -> list[str]:
        """What is wrong with words that argparse could not place: unknown flags, with the known one they resemble."""
        known = [name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
        problems = []
        for i, word in enumerate(words):
            if word.startswith("--"):
                flag = word.partition("=")[0]
                nearest = difflib.get_close_matches(flag, known, n=1)
                problems.append(f"{flag}: there is no such flag" + (f"; did you mean {nearest[0]}?" if nearest else ""))
            elif i == 0 or not words[i - 1].startswith("--"):  # else: the value of the unknown flag before it
                problems.append(f"{word}: belongs to no flag")
        return problems

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n`python {sys.argv[0]} --help` explains every flag.\n")


def is_installed(package: str) -> bool:
    """True if a package can be imported. A mere folder of that name, like the logs in ./wandb, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Show a user's mistake (missing file, bad value, bad data) as one message and exit code 2, no stack trace."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {plain_message(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def plain_message(error: Exception) -> str:
    """What an error says to a user: of the operating system's own, which file, what is wrong and what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.filename is None:  # the text is ours, or the disk's while a file is written
        return f"{error.strerror}: {REMEDIES[error.errno]}" if error.errno in REMEDIES else error.strerror
    name = str(error.filename)
    shown = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."
    remedy = REMEDIES.get(error.errno, "look at that place, or pass another one")
    return f"{shown}: {error.strerror}; {remedy}"
