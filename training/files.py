"""Where a run writes: the names of its files, that they can be written, and that no other run writes them too."""

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
