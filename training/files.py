"""Where a run writes: the names of its files, that they can be written, and that no other run writes them too."""

import contextlib
import errno
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from model.loading import weights_path

LOCK_WAIT = 30  # seconds for which a run that is just being killed may still hold its files
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # some network file systems
PROBE_BYTES = 2**20


@dataclass(frozen=True)
class RunFiles:
    """The places that one run writes to.

    weights: for people, {out_dir}/{name}.pth; states: the folder of those to resume from; logs: the folder of the log.
    """

    weights: Path
    states: Path
    logs: Path


def run_files(args, config) -> RunFiles:
    """The files of the run that ``--out_dir``, ``--save_weight`` and the size of the model name."""
    out_dir, weights = Path(args.out_dir), weights_path(args.out_dir, args.save_weight, config)
    name = weights.relative_to(out_dir).with_suffix("")
    return RunFiles(weights, out_dir / "checkpoints" / name, out_dir / "logs")


def check_writable(files: RunFiles) -> None:
    """Raises OSError, with the remedy, where the run could not write: found now instead of at the first save."""
    if files.weights.is_dir():
        raise OSError(f"{files.weights} is a folder, but the weights are to be written there: pass another --out_dir")
    for folder in (files.weights.parent, files.states.parent, files.states, files.logs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(PROBE_BYTES))
        except OSError as error:
            raise OSError(
                f"cannot write into {folder}: {error.strerror}. Make room or get write permission there, or pass "
                "another --out_dir"
            ) from error


@contextlib.contextmanager
def locked(files: RunFiles, log=print) -> Iterator[None]:
    """Nobody else writes these files inside the block. The operating system unlocks them however the process ends.

    Raises: ValueError, naming the process that holds them, when it does not end within ``LOCK_WAIT`` seconds.
    """
    lock = FileLock(files.states.with_name(files.states.name + ".lock"))
    holder = files.states.with_name(files.states.name + ".holder")  # Windows lets nobody read a locked file
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"{files.weights} belongs to {_read(holder)}; waiting up to {LOCK_WAIT} s for its end")
            lock.acquire(timeout=LOCK_WAIT)
    except Timeout as error:
        raise ValueError(
            f"another run writes {files.weights}: {_read(holder)}. Wait for its end or stop it; or pass another "
            "--out_dir or --save_weight"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS_HERE:
            raise
        log(f"files cannot be locked in {files.states.parent}: make sure that no other run writes {files.weights}")
        yield
        return
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, started {started}: {command}", "utf-8")
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read(holder: Path) -> str:
    try:
        return holder.read_text("utf-8", errors="replace") or "an unnamed process"
    except OSError:
        return "an unnamed process"  # it took the lock a moment ago
