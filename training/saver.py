"""Saves one run in the background, and finds the state that it continues from."""

import os
import shlex
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from common.files import crc32, remove_leftovers
from common.tensor_files import named_tensors
from model.LMConfig import config_fields
from model.loading import save_weights
from model.record import describe_program, fingerprint, record_path, write_record
from model.vocabulary import is_shipped, keep_tokenizer

from .checkpoint import (
    CheckpointError,
    DifferentRunError,
    Progress,
    check_parts,
    compare,
    list_states,
    new_run_flags,
    random_state,
    read_newest_state,
    set_aside,
    set_random_state,
    to_cpu,
    write_state,
)
from .files import run_files
from .guard import WeightGuard

MAX_BAD_STEPS = 5
MAX_REFUSED = 2  # saves in a row: the first steps of a new model may be wild
# Flags that say how a process was started, or in other words what the configuration says; not what it computes.
NOT_THE_RUN = ("resume", "local_rank", "ddp", "model", "teacher_model", "remarks", "stage")


class Saver:
    """Weights and states of one run. The loop waits for the copy to memory, never for the disk.

    A save that fails (full disk) is told loudly and the run goes on: the files of the save before are still whole. So
    they are when the weights are broken and not saved; after two such saves in a row the run ends (``is_broken``).

    What is saved for continuing is asked for and handed back, not looked into: ``updater.state()`` and
    ``source.state()`` are any dicts of tensors and plain values.

    Args:
        updater: of the weights (training/updater.py).
        source: of the batches (training/source.py).
        weights: model -> the state dict saved for people.
        data_fingerprint: identifies the content of the training data.
        guard: says whether weights are broken.
        origin: what the record beside the weights says of where they come from (training/inputs.py).
        tokenizer: what the weights are trained with; another one than the shipped is kept beside them.
    """

    def __init__(
        self,
        run,
        args,
        config,
        updater,
        source,
        progress: Progress,
        guard: WeightGuard,
        *,
        data_fingerprint: str,
        weights=nn.Module.state_dict,
        origin: dict | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.run, self.args = run, args
        self.updater, self.source, self.progress = updater, source, progress
        self.guard, self.weights = guard, weights
        files = run_files(args, config)
        self.weights_path, self.directory = files.weights, files.states
        self.run_name = f"{files.weights.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.tracker_id: str | None = None
        self.error: Exception | None = None  # why the last save failed
        self.problem = ""  # why the last weights were refused
        self._refused = 0  # how many in a row
        self._saved_step: int | None = None  # of the state on disk, None while none is of this run
        self._weights_step: int | None = None  # the same for the weights
        self.config, self.origin = config, origin or {}
        self.own_tokenizer = None if tokenizer is None or is_shipped(tokenizer) else tokenizer
        self.program = describe_program() if run.is_main else {}
        self.identity = {
            **{name: value for name, value in plain_flags(args).items() if name not in NOT_THE_RUN},
            "config": config_fields(config),
            "data": data_fingerprint,
            "starting weights": starting_checksum(args.start_weights),
            "computed in": f"{run.dtype} on {run.device.type}",
            "processes": run.world_size,
        }
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future | None = None
        self._last_save = time.monotonic()

    def is_time(self) -> bool:
        """True on the main process when ``--save_minutes`` have passed since the last save."""
        waited = (time.monotonic() - self._last_save) / 60
        return self.run.is_main and self.args.save_minutes > 0 and waited >= self.args.save_minutes

    def save(self, final: bool = False) -> None:
        """Copy everything now, write it in the background: weights, then state. All ranks must call it.

        While the save before is still being written, this one is left out, unless it is the final one: then wait.
        """
        random_states = self.run.gather(random_state(self.run.device))
        model = self.updater.full_model()
        updater_state = self.updater.state()
        source_state = self.source.state()
        weights = self.weights(model)
        self._last_save = time.monotonic()
        self.problem = self.guard.problem(model)
        self._refused = self._refused + 1 if self.problem else 0
        if self.problem:
            self.run.log(f"!!! NOT SAVED at step {self.progress.step}: {self.problem}")
            return
        if not self.run.is_main:
            return
        if self._pending and (final or self._pending.done()):
            self._pending.result()
            self._pending = None
        if self._pending is None:
            state = {
                "updater": updater_state,
                "source": source_state,
                "progress": asdict(self.progress),
                "random": random_states,
                "identity": self.identity,
                "run_name": self.run_name,
                "tracker_id": self.tracker_id,
            }
            copy = to_cpu({"weights": weights, "state": state})
            self._pending = self._thread.submit(self._write, copy["weights"], copy["state"])

    @property
    def is_broken(self) -> bool:
        """True when the weights of ``MAX_REFUSED`` saves in a row were broken; the same on all ranks."""
        return self._refused >= MAX_REFUSED

    def kept(self) -> str:
        """What is on disk now, in a sentence."""
        if self._weights_step is None:
            whole = self.weights_path.exists() or list_states(self.directory)
            return f"The earlier run's {self.weights_path} is as it was." if whole else "Nothing was saved so far."
        weights = f"{self.weights_path} holds the weights after step {self._weights_step}"
        state = "no state" if self._saved_step is None else f"the state after step {self._saved_step}"
        return f"{weights}, {self.directory} {state}."

    def _remove_leftovers(self) -> None:
        """Delete what killed runs left half-written: weights, their record, states."""
        for place in (self.weights_path, record_path(self.weights_path), self.directory):
            remove_leftovers(place)

    def _write(self, weights: dict, state: dict) -> None:
        step = state["progress"]["step"]
        try:
            if self._saved_step is None:
                self._remove_leftovers()
            save_weights(weights, self.weights_path)
            self._weights_step = step
            self._write_record(state["progress"])
            if self._saved_step is None and (previous := set_aside(self.directory)):
                self.run.log(f"{self.directory}: the states of an earlier run are now in {previous}")
            write_state(self.directory, state)
            self._saved_step, self.error = step, None
        except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch could not write for another reason
            self.error = error
            needed = (tensor_bytes(weights) + tensor_bytes(state)) / 1e6
            self.run.log(
                f"!!! NOT SAVED at step {step}: {error}\n!!! A save takes {needed:,.1f} MB, "
                f"{free_space(self.weights_path)}. {self.kept()} "
                "The run goes on and tries again at the next save: make room."
            )

    def _write_record(self, progress: dict) -> None:
        """The table beside the weights just written. Whoever reads it in between finds that it is of other weights."""
        figures = {name: round(value, 6) for name, value in progress["heldout"].items()}
        done = {"step": progress["step"], "tokens": progress["tokens"], "heldout": figures or None}
        if self.own_tokenizer:
            keep_tokenizer(self.own_tokenizer, self.weights_path.parent)
        write_record(self.weights_path, self.config, **self.origin, **done, **self.program)

    def resume(self) -> bool:
        """Continue from the newest usable state if ``--resume`` says so; True if the run continues.

        Rank 0 reads, so the other machines need not see its disk.
        Raises: CheckpointError when there is none (``--resume auto`` starts anew then), or it is a different run's.
        """
        if not self.args.resume:
            if self.run.is_main and list_states(self.directory):
                self.run.log(
                    f"{self.directory} holds states of an earlier run, which the first save sets aside; "
                    "to continue that run instead, stop now and add --resume"
                )
            return False
        state, problem = self.run.from_main(self._find() if self.run.is_main else None)
        if problem:
            raise CheckpointError(problem)
        if state is None:
            self.run.log(f"{self.directory}: no usable state, --resume auto starts anew")
            return False
        self.updater.load_state(state["updater"])
        self.source.load_state(state["source"])
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        if self.progress.bad_streak >= MAX_BAD_STEPS:
            self.progress.bad_streak = 0
        self.run_name, self.tracker_id = state["run_name"], state["tracker_id"]
        self._saved_step = self._weights_step = self.progress.step
        if self.run.rank < len(state["random"]):
            set_random_state(state["random"][self.run.rank], self.run.device)
        self.run.log(f"continuing {self.directory} after step {self.progress.step}")
        return True

    def _find(self) -> tuple[dict | None, str | None]:
        """The state to continue from, and why there can be none."""
        self._remove_leftovers()
        told = []

        def check(state: dict) -> None:
            told[:] = compare(state["identity"], self.identity, self.directory, self.weights_path)
            check_parts(state, self.source.state())
            self.updater.check_state(state["updater"])

        try:
            state = read_newest_state(self.directory, check, self.run.log)
        except DifferentRunError as error:
            return None, str(error)
        if state is None:
            optional = self.args.resume == "auto"
            return None, None if optional else f"{self.directory}: no state to continue from; start without --resume"
        for line in told:
            self.run.log(f"differs from the saved run: {line}")
        return state, None

    def restore_weights(self) -> None:
        """Write the weights file of a complete run again if it is gone. All ranks must call it."""
        weights = self.weights(self.updater.full_model())
        if self.run.is_main and not self.weights_path.exists():
            save_weights(weights, self.weights_path)
            self._write_record(asdict(self.progress))
            self.run.log(f"{self.weights_path} was gone: written again from the state")

    def refuse_broken(self) -> None:
        """Raises SystemExit with what is left and what to do if the last weights were too broken to be saved."""
        if not self.problem:
            return
        start = f" and {new_run_flags(vars(self.args), self.weights_path)}" if self._weights_step is not None else ""
        raise SystemExit(
            f"this run is broken: after step {self.progress.step} {self.problem}. These weights are not saved. "
            f"{self.kept()}\nStart a new run with a --learning_rate below {self.args.learning_rate}{start}."
        )

    def close(self) -> None:
        """Wait until everything is on disk. Raises SystemExit if the last save failed."""
        if self._pending:
            self._pending.result()
        self._thread.shutdown()
        if self.error:
            what = "start it again" if self._saved_step is None else "redo the steps since the last good save"
            command = launch_command(resume=self._saved_step is not None)
            raise SystemExit(
                f"the end of this run is not saved: {self.error}\n{self.kept()} "
                f"Make room, then {what} with:\n  {command}"
            )


def plain_flags(args) -> dict[str, object]:
    """The flags without what was made of them: a configuration, paths of files."""
    return {name: value for name, value in vars(args).items() if is_plain(value)}


def is_plain(value) -> bool:
    """True for values that a state can hold and compare: no tensors, dtypes or objects."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))


def starting_checksum(weights: Path | None) -> str:
    """Identifies what ``--from_weight`` names: another stage's result may have been replaced in the meantime."""
    if weights is None:
        return "random"
    if weights.is_dir():
        return fingerprint(weights)
    return f"{crc32(weights):08x}" if weights.is_file() else "missing"


def free_space(path: Path) -> str:
    """``12,345.6 MB are free at out``."""
    folder = next(folder for folder in path.parents if folder.exists())  # somebody may have removed out itself
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free at {folder}"


def tensor_bytes(value) -> int:
    """Size of the tensors of a nested state; those that share memory count once."""
    storages = (tensor.untyped_storage() for _, tensor in named_tensors(value))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def launch_command(resume: bool = True) -> str:
    """The command line that continues this run, or starts it anew, in the form in which it was launched."""
    words, given = [], iter(sys.argv)
    for word in given:
        name, _, _ = word.partition("=")
        if name in ("--resume", "--from_resume"):
            following = next(given, "") if word == name else ""
            words += [following] if following.startswith("-") else []
        elif name not in ("--local_rank", "--local-rank"):
            words.append(word)
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        here, everywhere = environment["LOCAL_WORLD_SIZE"], environment["WORLD_SIZE"]
        launcher = ["torchrun", "--nproc_per_node", here]
        if here != everywhere:
            address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
            launcher += ["--nnodes", environment["GROUP_WORLD_SIZE"], "--node_rank", environment["GROUP_RANK"]]
            launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", address]
    elif "CROSS_SIZE" in environment:  # set by the deepspeed launcher alone
        launcher = ["deepspeed", "--num_gpus", environment["LOCAL_SIZE"]]
    else:
        launcher = ["python" if shutil.which("python") == sys.executable else sys.executable]
    return shlex.join([*launcher, *words, *(["--resume"] if resume else [])])
