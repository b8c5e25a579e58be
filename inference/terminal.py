"""Lines that somebody types: with an editor that knows double-width characters and history, or plainly from a pipe."""

import sys

from prompt_toolkit import PromptSession


class LineReader:
    """Asks for lines. On a terminal the arrow keys move and recall earlier lines, and a pasted text stays one line.

    The terminal's own editing (what `input` has without readline, and readline with some locales) takes one column for
    every character, so that backspace leaves halves of Chinese ones behind; prompt_toolkit counts columns as the
    terminal does, on Linux, macOS and Windows.
    """

    def __init__(self):
        terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self._editor = PromptSession() if terminal else None

    def ask(self, question: str) -> str | None:
        """The next line; None at its end: Ctrl-D, Ctrl-C, the end of a pipe, or no input at all.

        Raises:
            ValueError: the bytes of a pipe are no text in the input's encoding.
        """
        if sys.stdin is None or sys.stdout is None:  # closed by whoever started the program: nobody is there
            return None
        try:
            return self._editor.prompt(question) if self._editor else input(question)
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the input is not text in {sys.stdin.encoding}: {error.reason} at byte {error.start}; convert it, or "
                "set PYTHONIOENCODING to its encoding (PYTHONIOENCODING=gbk)"
            ) from error
