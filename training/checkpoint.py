"""The state that a run needs to continue exactly: written whole or not at all, read without executing anything in it.

Weights for people (``out/pretrain_512.pth``) and states for continuing (``out/checkpoints/pretrain_512/``) are
different files: a state also holds the optimizer, the place in the data plan and every rank's random generators.
"""

import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.tensor_files import UnreadableFile, atomic_save, nonfinite, read_torch_file
from model.LMConfig import LMConfig, config_fields
from model.model_flags import MODEL_FLAGS

FORMAT = "minimind training state 2"
PARTS = {"format", "model", "optimizer", "scaler", "progress", "random", "identity", "run_name", "tracker_id"}
KEPT_STATES = 2

# A continued run equals the unbroken one bit for bit if all flags are equal. These may change nevertheless:
HARMLESS = {
    "data_path", "cache_dir", "on_bad_line", "num_workers", "out_dir", "log_interval", "save_interval", "save_minutes",
    "eval_interval", "tracker", "use_wandb", "wandb_project", "wandb_run_name",
}  # fmt: skip
ROUNDING = {
    "device", "dtype", "threads", "use_compile", "accumulation_steps", "deepspeed", "computed in", "processes",
}  # fmt: skip


class CheckpointError(ValueError):
    """A state that cannot continue this run; the message says why and what to do."""


class DifferentRunError(ValueError):
    """A whole state, but of a run with other flags, data or weights."""


@dataclass
class Progress:
    """Where a run stands; with weights, optimizer and random states, all it needs to continue."""

    step: int = 0  # optimizer updates made, skipped ones included
    epoch: int = 0
    next_batch: int = 0  # first micro-batch of this epoch's plan that was not trained on
    tokens: int = 0  # real input tokens trained on
    skipped: int = 0  # steps dropped for a non-finite gradient
    bad_streak: int = 0  # how many of them in a row, now
    spikes: int = 0  # times that the loss rose far above the ones before and stayed (training/watch.py)


def random_state(device: torch.device) -> dict:
    """The state of every random generator of this process, in types that ``weights_only`` loading accepts."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Put every random generator of this process back to a saved state."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])


def to_cpu(value, copies: dict | None = None):
    """A copy of a nested state with all tensors on the CPU: training may go on while the copy is written.

    A tensor that occurs several times (tied weights; weights for people and for the state) is copied once.
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {key: to_cpu(item, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item, copies) for item in value)
    return value


def state_path(directory: Path, progress: dict) -> Path:
    """``epoch_0001_batch_000001234.pt``, the place in the data.

    It is counted in micro-batches, not in steps, because a step is larger with more processes.
    """
    return directory / f"epoch_{progress['epoch']:04d}_batch_{progress['next_batch']:09d}.pt"


def list_states(directory: Path) -> list[Path]:
    """The complete states of a run, newest first; unfinished temporary files have other names."""

    def place(path: Path) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", path.name)))  # as numbers: epoch 10000 has more digits than the name

    return sorted(directory.glob("epoch_[0-9]*_batch_[0-9]*.pt"), key=place, reverse=True)


def write_state(directory: Path, state: dict) -> None:
    """Write a state atomically, then delete all but the newest ``KEPT_STATES``. Raises OSError on a full disk."""
    directory.mkdir(parents=True, exist_ok=True)
    atomic_save({"format": FORMAT, **state}, state_path(directory, state["progress"]))
    for path in list_states(directory)[KEPT_STATES:]:
        path.unlink(missing_ok=True)


def read_state(path: Path) -> dict:
    """A state that is whole. Raises CheckpointError with the reason for anything else.

    Nothing in the file is executed, and every byte of it is checked.
    """
    try:
        state = read_torch_file(path)
    except (OSError, UnreadableFile) as error:
        raise CheckpointError(f"it {error}" if isinstance(error, UnreadableFile) else str(error)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format", "no format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"not a state of this version ({found!r} found, {FORMAT!r} expected)")
    if missing := PARTS - state.keys():
        raise CheckpointError(f"incomplete, without {', '.join(sorted(missing))}")
    if problem := nonfinite({"model": state["model"], "optimizer": state["optimizer"]}):
        raise CheckpointError(f"it {problem}")
    if not isinstance(state["identity"], dict):
        raise CheckpointError("it does not say of which run it is")
    return state


def check_shapes(state: dict, shapes: dict[str, torch.Size]) -> None:
    """Raises CheckpointError unless the parts of a state fit a model with these tensors."""
    try:
        found = {name: tensor.shape for name, tensor in state["model"].items()}
        Progress(**state["progress"])
        moments = [set(entry) for entry in state["optimizer"]["state"].values()]
        is_sound = all(isinstance(entry["torch"], torch.Tensor) for entry in state["random"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"its parts are not those of a state ({error})") from error
    if wrong := [name for name in {**found, **shapes} if found.get(name) != shapes.get(name)]:
        raise CheckpointError(f"it holds another model: {wrong[0]} and {len(wrong) - 1} more tensors do not fit")
    if not is_sound or any(names != {"step", "exp_avg", "exp_avg_sq"} for names in moments):
        raise CheckpointError("its optimizer or random generators are not those of a state")


def read_newest_state(directory: Path, check, log=print) -> dict | None:
    """The newest whole state, or None; a bad one is reported and the one before is tried.

    Args: check: looks at a state, and raises CheckpointError if it is a bad one.
    """
    for path in list_states(directory):
        try:
            state = read_state(path)
            check(state)
            return state
        except CheckpointError as error:
            log(f"{path} is not used: {error}")
    return None


def set_aside(directory: Path) -> Path | None:
    """Rename the states of an earlier run to ``{directory}.previous``, in place of the ones set aside before."""
    if not list_states(directory):
        return None
    previous = directory.with_name(directory.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    directory.rename(previous)
    return previous


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files that killed processes left behind when they were writing ``path`` or into it."""
    for leftover in [*path.glob(".*.tmp"), *path.parent.glob(f".{path.name}.*.tmp")]:
        leftover.unlink(missing_ok=True)


def new_run_flags(flags: dict, weights: Path) -> str:
    """What makes a new run out of the one that saved ``weights``. Nothing can start from an adapter alone."""
    if "lora_name" in flags:
        return f"another --lora_name than {flags['lora_name']}, which keeps {weights}"
    return f"--from_weight {weights}, which starts from its weights"


def compare(saved: dict, current: dict, directory: Path, weights: Path) -> list[str]:
    """What differs between a state's run and this one, as lines to tell. Raises DifferentRunError if it is too much.

    Args: saved, current: flags, and what else decides about the result, as plain values.
    """
    saved, current = _one_level(saved), _one_level(current)
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    lines = {name: f"{name}: {saved.get(name)!r} then, {current.get(name)!r} now" for name in differing}
    refused = [lines[name] for name in differing if name not in HARMLESS | ROUNDING]
    if refused:
        raise DifferentRunError(
            f"{directory} belongs to a different run; continuing it with these flags would be neither run:\n  "
            + "\n  ".join(refused)
            + "\nUse that run's values; or, for a new run, leave --resume out and pass "
            f"{new_run_flags(current, weights)}."
        )
    told = [f"{lines[name]} (harmless)" for name in differing if name in HARMLESS]
    return told + [f"{lines[name]} (exact up to rounding from here on)" for name in differing if name in ROUNDING]


def _one_level(identity: dict) -> dict:
    """An identity with each field of its configuration under the name of the flag for it.

    Earlier versions had fewer flags, and other things than fields in the configuration: what is absent has its default.
    """
    fields = config_fields(LMConfig())
    fields |= {name: value for name, value in identity.get("config", {}).items() if name in fields}
    renamed = {flag.field: flag.name for flag in MODEL_FLAGS}
    flags = {name: value for name, value in identity.items() if name != "config"}
    return flags | {renamed.get(name, name): value for name, value in fields.items()}
