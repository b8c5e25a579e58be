"""Where a run writes: the names of its files, that they can be written, and that no other run writes them too."""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from model.loading import weights_path

PROBE_BYTES = 2**20


@dataclass(frozen=True)
class RunFiles:
    """The places that one run writes to.

    weights: for people, {out_dir}/{name}.pth; states: the folder of those to resume from; logs: the folder of the log.
    """

    weights: Path
    states: Path
    logs: Path

    def folders(self) -> list[Path]:
        """Where files are written, each folder after those in it."""
        out_dir = self.logs.parent
        around = [folder for folder in self.states.parents if out_dir in folder.parents]  # out/checkpoints
        return [self.states, *around, self.logs, self.weights.parent, out_dir]


def run_files(args, config) -> RunFiles:
    """The files of the run that ``--out_dir``, ``--save_weight`` and the size of the model name."""
    out_dir, weights = Path(args.out_dir), weights_path(args.out_dir, args.save_weight, config)
    name = weights.relative_to(out_dir).with_suffix("")
    return RunFiles(weights, out_dir / "checkpoints" / name, out_dir / "logs")


def check_writable(files: RunFiles) -> None:
    """Raises OSError, with the remedy, where the run could not write: found now instead of at the first save."""
    if files.weights.is_dir():
        raise OSError(f"{files.weights} is a folder, but the weights are to be written there: pass another --out_dir")
    for folder in reversed(files.folders()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(PROBE_BYTES))
        except OSError as error:
            raise OSError(
                f"cannot write into {folder}: {error.strerror}. Make room or get write permission there, or pass "
                "another --out_dir"
            ) from error


def remove_unused(files: RunFiles, made: list[Path]) -> None:
    """Take back the folders that were made for a run which then wrote nothing: it was refused, or interrupted.

    Args:
        made: of `files.folders()`, in that order.
    """
    lock = files.states.with_name(files.states.name + ".lock")
    with contextlib.suppress(OSError):  # nobody can write there
        if files.states in made and not any(files.states.glob("*")):
            lock.unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):  # it holds something, or is gone
            folder.rmdir()
