"""The state that a run needs to continue exactly: written whole or not at all, read without executing anything in it.

Weights for people (``out/pretrain_512.pth``) and the state for continuing (``out/checkpoints/``) are different files:
the state also holds the optimizer, the step, the place in the data plan and every rank's random generators.
"""

import pickle
import random
import re
import shlex
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from model.loading import atomic_save, save_weights, weights_path

FORMAT = 1
KEPT_STATES = 2
DAMAGED = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


class CheckpointError(ValueError):
    """A state that cannot continue this run; the message says why and what to do."""


@dataclass
class Progress:
    """Where a run stands; with weights, optimizer and random states, all it needs to continue."""

    step: int = 0  # optimizer updates made, skipped ones included
    epoch: int = 0
    next_batch: int = 0  # first micro-batch of this epoch's plan that was not trained on
    tokens: int = 0  # real input tokens trained on
    skipped: int = 0  # steps dropped for a non-finite gradient
    bad_streak: int = 0  # how many of them in a row, now

    def count(self, numbers: dict[str, float]) -> None:
        """Take in the numbers of one step."""
        self.tokens += int(numbers["tokens"])
        self.skipped += int(numbers["skipped"])
        self.bad_streak = self.bad_streak + 1 if numbers["skipped"] else 0


def random_state(device: torch.device) -> dict:
    """The state of every random generator of this process, in types that ``weights_only`` loading accepts."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Put every random generator of this process back to a saved state."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def to_cpu(value):
    """A copy of a nested state with all tensors on the CPU: training may go on while the copy is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return value


class Writer:
    """Writes files in one background thread, so that the loop waits for the copy to memory but not for the disk."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: list[Future] = []

    def submit(self, function, *args) -> None:
        """Queue ``function(*args)``; first wait for what is queued already, so that at most one copy is alive."""
        self.wait()
        self._pending.append(self._thread.submit(function, *args))

    def wait(self) -> None:
        """Wait for the queued write; raises what it raised."""
        while self._pending:
            self._pending.pop().result()

    def close(self) -> None:
        """Finish the last write and end the thread."""
        self.wait()
        self._thread.shutdown()


def state_path(directory: Path, step: int) -> Path:
    """``{directory}/step_00000123.pt``: sorted by name is sorted by step."""
    return directory / f"step_{step:08d}.pt"


def list_states(directory: Path) -> list[Path]:
    """The complete states of a run, newest first."""
    return sorted((p for p in directory.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", p.name)), reverse=True)


def write_state(directory: Path, state: dict) -> None:
    """Write a state atomically, then delete all but the newest ``KEPT_STATES``. Raises OSError on a full disk."""
    directory.mkdir(parents=True, exist_ok=True)
    atomic_save({"format": FORMAT, **state}, state_path(directory, state["progress"]["step"]))
    for path in list_states(directory)[KEPT_STATES:]:
        path.unlink(missing_ok=True)


def read_newest_state(directory: Path, log=print) -> dict | None:
    """The newest whole state, or None if there is none; a damaged one is reported and the one before is tried."""
    for path in list_states(directory):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}, this version reads {FORMAT}")
            return state
        except DAMAGED as error:
            log(f"{path}: cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}); trying the one before")
    return None


class Saver:
    """Saves one run's weights and states, and finds the state to continue from.

    ``identity`` is what must be equal for a continuation to be exact: model, data, and how data is cut into batches.
    """

    def __init__(self, run, args, model, optimizer, scaler, progress: Progress, weights, data_fingerprint: str):
        self.run, self.args, self.model, self.optimizer, self.scaler = run, args, model, optimizer, scaler
        self.progress, self.weights = progress, weights
        self.weights_path = weights_path(args.out_dir, args.save_weight, model.config)
        self.directory = self.weights_path.parent / "checkpoints" / self.weights_path.stem
        self.run_name = f"{self.weights_path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.identity = {
            **{name: getattr(model.config, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe")},
            "data": data_fingerprint,
            **{name: getattr(args, name) for name in ("batch_size", "max_seq_len", "heldout_share", "seed", "epochs")},
        }
        self._writer = Writer()
        self._last_save = time.monotonic()

    @property
    def resume_command(self) -> str:
        """The command line of this run, with --resume."""
        words = [word for word in sys.argv if word != "--resume"]
        return shlex.join(["python", *words, "--resume"])

    def is_time(self) -> bool:
        """True on the main process when ``--save_minutes`` have passed since the last save."""
        waited = (time.monotonic() - self._last_save) / 60
        return self.run.is_main and self.args.save_minutes > 0 and waited >= self.args.save_minutes

    def save(self) -> None:
        """Copy everything now, write it in the background: weights, then state. All ranks must call it."""
        random_states = self.run.gather(random_state(self.run.device))
        if self.run.is_main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": asdict(self.progress),
                "random": random_states,
                "identity": self.identity,
                "run_name": self.run_name,
            }
            self._writer.submit(self._write, to_cpu(self.weights(self.model)), to_cpu(state))
        self._last_save = time.monotonic()

    def _write(self, weights: dict, state: dict) -> None:
        save_weights(weights, self.weights_path)
        write_state(self.directory, state)

    def resume(self) -> None:
        """Continue from the newest usable state. Raises CheckpointError when there is none, or it is another run's."""
        state = read_newest_state(self.directory, self.run.log)
        if state is None:
            raise CheckpointError(f"{self.directory}: no state to continue from; start without --resume")
        check_same_run(state["identity"], self.identity, self.directory)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        self.run_name = state["run_name"]
        if self.run.rank < len(state["random"]):
            set_random_state(state["random"][self.run.rank], self.run.device)
        self.run.log(f"continuing {self.directory} after step {self.progress.step}")

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._writer.close()


def check_same_run(saved: dict, current: dict, directory: Path) -> None:
    """Refuse to continue a run whose data, model or plan differ from the saved ones. Raises CheckpointError."""
    different = [
        f"{name}: {saved.get(name)!r} then, {current[name]!r} now"
        for name in current
        if saved.get(name) != current[name]
    ]
    if different:
        raise CheckpointError(
            f"{directory} belongs to a different run; continuing it would not be exact:\n  "
            + "\n  ".join(different)
            + "\nUse the flags of that run, or start anew without --resume."
        )
