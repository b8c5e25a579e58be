"""Printing that cannot end a run: the terminal may go away, the pipe may break, the disk may fill."""

import atexit
import contextlib
import os
import sys

CANNOT_PRINT = (OSError, ValueError)  # broken pipe, full disk, terminal gone; a closed stream is a ValueError


class LastingStream:
    """A text stream that drops what it cannot write; everything else is the stream's own (``isatty``, ``encoding``).

    After a full disk has room again, writing succeeds again.
    Args: stream: what ``sys.stdout`` is, None when the process was started without one.
    """

    def __init__(self, stream):
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # an encoding without 👶 prints ? instead
            with contextlib.suppress(*CANNOT_PRINT):
                stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        if self._stream is not None:
            with contextlib.suppress(*CANNOT_PRINT):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(*CANNOT_PRINT):
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def make_output_last() -> None:
    """Let nothing that is printed from now on raise, whoever prints: ``print``, tqdm, warnings, trackers."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), LastingStream):
            setattr(sys, name, LastingStream(getattr(sys, name)))
    atexit.unregister(_discard_what_is_left)
    atexit.register(_discard_what_is_left)


def _discard_what_is_left() -> None:
    """What a dead stream still buffers would fail once more when Python ends, and make the exit code 120."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def write_from_handler(text: str) -> None:
    """Write to stderr at once from a signal handler, which may have interrupted ``print`` in its middle."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(*CANNOT_PRINT):
            os.write(sys.__stderr__.fileno(), text.encode("ascii", errors="replace"))
