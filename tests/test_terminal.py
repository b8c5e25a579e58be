"""inference/terminal.py: the editor counts columns, not characters; a pipe is read plainly."""

import io
import threading

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from inference.terminal import LineReader

LEFT, UP, BACKSPACE, HOME, DELETE = "\x1b[D", "\x1b[A", "\x7f", "\x1b[H", "\x1b[3~"


class Terminal(io.StringIO):
    """A standard stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def type_keys(monkeypatch):
    """Lines that the editor returns for keys typed into it."""

    def typed(keys: str, later: str = "") -> list[str | None]:
        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr("sys.stdout", Terminal())
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            lines = LineReader()
            typed_lines = [lines.ask("👶: ") for _ in range(max(1, keys.count("\r")))]
            if later:  # the editor fetches its history when it begins to ask
                threading.Timer(0.3, pipe.send_text, [later]).start()
                typed_lines.append(lines.ask("👶: "))
            return typed_lines

    return typed


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (f"你好吗{BACKSPACE}\r", "你好"),
        (f"你好{LEFT}{BACKSPACE}我\r", "我好"),
        (f"天气{HOME}今天\r", "今天天气"),
        (f"今天👶天气{HOME}{DELETE}\r", "天👶天气"),
        ("\x1b[200~第一行\n第二行\x1b[201~\r", "第一行\n第二行"),  # pasted: one question, not two
    ],
)
def test_chinese_is_edited_character_by_character(type_keys, keys, line):
    assert type_keys(keys) == [line]


def test_the_arrow_keys_bring_earlier_lines_back(type_keys):
    assert type_keys("你好\r再见\r", f"{UP}{UP}！\r") == ["你好", "再见", "你好！"]


def test_ctrl_d_and_ctrl_c_end_the_lines(type_keys):
    assert type_keys("\x04") == [None] and type_keys("你\x03") == [None]


def test_a_pipe_is_read_plainly(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    lines = LineReader()
    assert (lines.ask("👶: "), lines.ask("👶: ")) == ("你好", None)
    assert capsys.readouterr().out.count("👶: ") == 2
    monkeypatch.setattr("sys.stdin", None)
    assert LineReader().ask("👶: ") is None
