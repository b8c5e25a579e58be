"""Files that are whole or not there, and files that one process holds for itself."""

import contextlib
import errno
import glob
import os
import shlex
import shutil
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

LOCK_WAIT = 30  # seconds for which a run that is just being killed may still hold its files
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # some network file systems


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block ends: a crash or a full disk leaves the old one.

    Nobody ever reads half of it. Until the end it is named `.{name}.{something}.tmp`.

    Raises:
        OSError: the disk is full or not writable; as after any error in the block, the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes left behind, under temporary names, when they were writing `path` or into it.

    A directory stays while the process lives that makes it. Files of a run go: its lock (`locked`) keeps others out.
    """
    for leftover in [*path.glob(".*.tmp"), *path.parent.glob(f".{glob.escape(path.name)}.*.tmp")]:
        if leftover.is_dir() and not leftover.is_symlink():
            if not _writer_lives(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _writer_lives(temporary: Path) -> bool:
    """Whether another process, whose number the name ends with as in `.m.4711.tmp`, still runs on this machine."""
    number = temporary.name.split(".")[-2]
    if not number.isdecimal() or int(number) == os.getpid() or os.name != "posix":
        return False  # on Windows nobody can remove what another process holds open
    try:
        os.kill(int(number), 0)  # signal 0 is never sent: it asks whether it could be
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def is_special(path: str | Path) -> bool:
    """Whether a pipe, a socket or a device lies there: who opens one may wait forever, or read without end."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def sync_directory(directory: Path) -> None:
    """Bring to disk what was renamed inside a directory; without this a power cut could undo it. Not on Windows."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """CRC-32 of a file, at 1 to 3 GB a second."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


@contextlib.contextmanager
def locked(place: Path, what: Path, remedy: str, log=print) -> Iterator[None]:
    """Nobody else holds this lock inside the block. The operating system unlocks it however the process ends.

    Args:
        place: the lock is `{place}.lock`, and `{place}.holder` beside it names the process that has it.
        what: what the lock protects, for messages.
        remedy: what to do instead of waiting, for the error message.

    Raises:
        ValueError: another process, which is named, does not let go of it within `LOCK_WAIT` seconds.
    """
    lock = FileLock(place.with_name(place.name + ".lock"))
    holder = place.with_name(place.name + ".holder")  # Windows lets nobody read a locked file
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"{what} belongs to {_read(holder)}; waiting up to {LOCK_WAIT} s for its end")
            lock.acquire(timeout=LOCK_WAIT)
    except Timeout as error:
        raise ValueError(
            f"another run writes {what}: {_read(holder)}. Wait for its end or stop it; {remedy}"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS_HERE:
            raise
        log(f"files cannot be locked in {place.parent}: make sure that no other run writes {what}")
        yield
        return
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {os.getpid()} on {socket.gethostname()}, started {started}: {command}"
    holder.write_text(text, "utf-8", errors="backslashreplace")  # a name in another encoding than UTF-8
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk may have gone, or be read-only by now: what is left harms nobody
            holder.unlink()
        lock.release()


def _read(holder: Path) -> str:
    try:
        return holder.read_text("utf-8", errors="replace") or "an unnamed process"
    except OSError:
        return "an unnamed process"  # it took the lock a moment ago
