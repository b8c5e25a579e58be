"""The state that a run needs to continue exactly: written whole or not at all, read without executing anything in it.

Weights for people (``out/pretrain_512.pth``) and states for continuing (``out/checkpoints/pretrain_512/``) are
different files: a state also holds what the updater and the source of batches need to go on, each in its own words,
and every rank's random generators.
"""

import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common.tensor_files import UnreadableFile, atomic_save, nonfinite, read_torch_file
from model.LMConfig import LMConfig, config_fields
from model.model_flags import MODEL_FLAGS

FORMAT = "minimind training state 3"
PARTS = {"format", "updater", "source", "progress", "random", "identity", "run_name", "tracker_id"}
BEFORE = "minimind training state 2"  # what was written until November 2026; see `in_todays_form`
KEPT_STATES = 2

# A continued run equals the unbroken one bit for bit if all flags are equal. These may change nevertheless:
HARMLESS = {
    "data_path", "tokenizer_path", "cache_dir", "on_bad_line", "num_workers", "out_dir", "log_interval",
    "save_interval", "save_minutes", "eval_interval", "tracker", "use_wandb", "wandb_project", "wandb_run_name",
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
    """What a run has done so far."""

    step: int = 0  # optimizer updates made, skipped ones included
    tokens: int = 0  # real input tokens trained on
    skipped: int = 0  # steps dropped for a non-finite gradient
    bad_streak: int = 0  # how many of them in a row, now
    spikes: int = 0  # times that the loss rose far above the ones before and stayed (training/watch.py)
    heldout: dict = field(default_factory=dict)  # the last held-out figures, and the "step" they were measured after


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


def state_path(directory: Path, step: int) -> Path:
    """``step_000001234.pt``."""
    return directory / f"step_{step:09d}.pt"


def list_states(directory: Path) -> list[Path]:
    """The complete states of a run, newest first; unfinished temporary files have other names."""

    def age(path: Path) -> tuple:
        numbers = [int(digits) for digits in re.findall(r"\d+", path.name)]  # 10 comes after 9
        return path.name.startswith("step_"), numbers

    states = [*directory.glob("step_[0-9]*.pt"), *directory.glob("epoch_[0-9]*_batch_[0-9]*.pt")]  # BEFORE's names
    return sorted(states, key=age, reverse=True)


def write_state(directory: Path, state: dict) -> None:
    """Write a state atomically, then delete all but it and the ones before it, ``KEPT_STATES`` in all.

    A state of a later step is deleted too: it was damaged, or it counted in smaller steps, with fewer processes.
    Raises OSError on a full disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = state_path(directory, state["progress"]["step"])
    atomic_save({"format": FORMAT, **state}, path)
    states = list_states(directory)
    newest = states.index(path)
    for other in states[:newest] + states[newest + KEPT_STATES :]:
        other.unlink(missing_ok=True)


def read_state(path: Path) -> dict:
    """A state that is whole. Raises CheckpointError with the reason for anything else.

    Nothing in the file is executed, and every byte of it is checked.
    """
    try:
        state = read_torch_file(path)
    except (OSError, UnreadableFile) as error:
        raise CheckpointError(f"it {error}" if isinstance(error, UnreadableFile) else str(error)) from error
    if isinstance(state, dict) and state.get("format") == BEFORE:
        state = in_todays_form(state)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format", "no format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"not a state of this version ({found!r} found, {FORMAT!r} expected)")
    if missing := PARTS - state.keys():
        raise CheckpointError(f"incomplete, without {', '.join(sorted(missing))}")
    if problem := nonfinite({"updater": state["updater"]}):
        raise CheckpointError(f"it {problem}")
    if not isinstance(state["identity"], dict):
        raise CheckpointError("it does not say of which run it is")
    return state


def in_todays_form(state: dict) -> dict:
    """A state of format BEFORE: its only source was a plan of the data, its only optimizer AdamW."""
    try:
        progress = dict(state["progress"])
        place = {name: progress.pop(name) for name in ("epoch", "next_batch")}
        updater = {"kind": "AdamW", **{name: state[name] for name in ("model", "optimizer", "scaler")}}
        for entry in updater["optimizer"]["state"].values():
            entry["step"] = entry["step"].clone()  # --deepspeed once wrote one counter, shared by all parameters
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"its parts are not those of a state ({error})") from error
    return {**state, "format": FORMAT, "updater": updater, "source": place, "progress": progress}


def check_parts(state: dict, source: dict) -> None:
    """Raises CheckpointError unless the parts of a state that are the same for all runs are what they should be.

    Args: source: what the run's source of batches gives as its place now; the state's must have the same entries.
    """
    try:
        Progress(**state["progress"])
        is_random = all(isinstance(entry["torch"], torch.Tensor) for entry in state["random"])
        is_place = state["source"].keys() == source.keys()
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"its parts are not those of a state ({error})") from error
    if not is_random or not is_place:
        raise CheckpointError("its random generators or its place in the data are not those of a state")


def check_weights_and_optimizer(state: dict, shapes: dict[str, torch.Size], kind: str, groups: list[dict]) -> None:
    """Raises CheckpointError unless an updater's state fits a model with these tensors and such an optimizer.

    Args: kind: name of the optimizer's class; groups: its ``param_groups``, with parameters numbered.
    """
    try:
        found = {name: tensor.shape for name, tensor in state["model"].items()}
        found_kind = state["kind"]
        found_sizes = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"its parts are not those of a state ({error})") from error
    if wrong := [name for name in {**found, **shapes} if found.get(name) != shapes.get(name)]:
        raise CheckpointError(f"it holds another model: {wrong[0]} and {len(wrong) - 1} more tensors do not fit")
    sizes = [len(group["params"]) for group in groups]
    if (found_kind, found_sizes) != (kind, sizes):
        raise CheckpointError(
            f"its optimizer is {found_kind!r} with groups of {found_sizes} parameters, this run's {kind!r} of {sizes}"
        )


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
