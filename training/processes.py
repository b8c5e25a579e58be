"""The processes of a run: one of them, how they exchange numbers, their beginning and end.

One process, N gloo processes on a CPU and N GPUs on M machines run the same code. There is no DistributedDataParallel
wrapper: replicas start equal, and once per optimizer step ``sum_gradients`` adds all gradients in one flat all-reduce.
"""

import contextlib
import os
import random
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common.device import choose_device, choose_dtype
from common.files import locked
from common.flags import plain_errors, plain_message
from common.memory import keep_fewer_kernels, keep_freed_memory
from common.output import make_output_last
from model.LMConfig import LMConfig, config_fields

from .compute import Compute
from .files import check_writable, remove_unused, run_files
from .signals import stop_without_launcher

STEP_TIMEOUT = timedelta(seconds=45)  # inside a step: then a process that hangs or vanished ends the run everywhere
WAIT_TIMEOUT = timedelta(hours=6)  # where one process may work long while others wait: caches, evaluations, compiling


@dataclass
class Run(Compute):
    """One process of a training run, on its device. Ranks differ only in what they print and write."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # number of this process on its machine
    step_group: dist.ProcessGroup | None = None  # the group whose collectives fail after STEP_TIMEOUT
    stop_signal: int = 0  # number of the signal that asked the run to stop, 0 while nobody did

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes files."""
        return self.rank == 0

    def log(self, message: str) -> None:
        """Print a line, on the main process only: above the progress bar if there is one, and at once."""
        if self.is_main:
            tqdm.write(message)
            sys.stdout.flush()  # a file or pipe would get it some hundred lines later

    def log_error(self, message: str) -> None:
        """The same on stderr."""
        if self.is_main:
            tqdm.write(message, file=sys.stderr)

    def barrier(self) -> None:
        """Wait for all processes, however long they work."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # on the CPU: dist.barrier would pick the GPU

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block alone, then the first process of every machine, then the rest.

        One builds a cache that all read, whether the machines share a file system or not.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        try:
            yield
        finally:
            for _ in range(turn, 2):
                self.barrier()

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place; every process gets it, however long the others need."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, model: nn.Module) -> None:
        """Make every replica equal to rank 0's, once, before the first step."""
        if self.world_size > 1:
            self.barrier()
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0, group=self.step_group)

    def from_main(self, value):
        """Rank 0's Python object, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """The small Python objects of all processes in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, model: nn.Module, step_sums: Tensor) -> Tensor:
        """Sum the gradients of all processes, and a small vector of the step's statistics with them, in one all-reduce.

        A process whose share of the step was empty has no gradients yet and adds zeros.
        Args: step_sums: (K,) float32 on the device. Returns: its sum over all processes.
        """
        if self.world_size == 1:
            return step_sums
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters] + [step_sums])
        dist.all_reduce(flat, group=self.step_group)
        *gradients, summed = flat.split([p.numel() for p in parameters] + [len(step_sums)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        return summed


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed every generator; ranks get different dropout, and equal weights through ``Run.broadcast``."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


@contextlib.contextmanager
def distributed_run(args) -> Iterator[Run]:
    """Set up this process (device, precision, process group, seeds) and tear it down again.

    Under a launcher (torchrun, deepspeed) the environment gives RANK and WORLD_SIZE; otherwise the run is one process.
    Inside, the files that the run will write are its own. A process that fails says who it is, then leaves without
    waiting for the others: they notice within STEP_TIMEOUT.
    Raises SystemExit for a device that is not there, an --out_dir that cannot be written or is another run's, Ctrl-C.
    """
    make_output_last()
    if {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"} & os.environ.keys():
        stop_without_launcher()
    if args.threads:
        torch.set_num_threads(args.threads)
    with plain_errors():
        device = choose_device(args.device)
        if args.deepspeed:
            from .deepspeed import check_config

            check_config(args.deepspeed, args.batch_size, args.grad_clip, device)
    if device.type == "cpu":
        keep_freed_memory()
        keep_fewer_kernels()
    dtype, remark = choose_dtype(args.dtype, device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run = Run(device, dtype, rank, world_size, int(os.environ.get("LOCAL_RANK", 0)))
    for line in [*args.remarks, remark]:
        if line:
            run.log(line)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = unused_store(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=WAIT_TIMEOUT)
        run.step_group = dist.new_group(backend=backend, timeout=STEP_TIMEOUT)
    seed_everything(args.seed, rank)
    try:
        with own_files(run, args):
            yield run
    except KeyboardInterrupt:  # inside train() the signal asks to stop instead
        run.log_error("\ninterrupted while nothing was being trained: nothing is lost")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if world_size > 1:
            print(
                f"rank {rank} of {world_size} on {socket.gethostname()} failed: {type(error).__name__}: {error}\n"
                "A lost connection or a timeout means that another process died or hangs: its own message, or the "
                "launcher's, says why. --resume continues from the last saved state.",
                file=sys.stderr,
                flush=True,
            )
        raise
    else:
        leave_together(run)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def own_files(run: Run, args) -> Iterator[None]:
    """The files that ``args`` name can be written and are this run's alone; if not, SystemExit on all processes."""
    with contextlib.ExitStack() as stack:
        problem = None
        if run.is_main:
            files = run_files(args, args.config)
            stack.callback(remove_unused, files, [folder for folder in files.folders() if not folder.exists()])
            try:
                check_writable(files)
                remedy = "or pass another --out_dir or --save_weight"
                stack.enter_context(locked(files.states, files.weights, remedy, run.log))
            except (OSError, ValueError) as error:
                problem = plain_message(error)
        if problem := run.from_main(problem) or other_model(run, args.config):
            run.log_error(f"error: {problem}")
            raise SystemExit(2)
        yield


def other_model(run: Run, config: LMConfig) -> str | None:
    """Why the processes cannot train together, if they found weights of different sizes; the same on all of them."""
    configs = run.gather(config_fields(config))
    for rank, fields in enumerate(configs):
        for name, value in fields.items():
            if value != configs[0][name]:
                return (
                    f"rank {rank} found weights with {name} {value}, rank 0 with {configs[0][name]}: copy the weights "
                    "to all machines, or pass the sizes"
                )
    return None


def unused_store(rank: int, world_size: int) -> dist.Store:
    """The store over which the processes tell each other their addresses, without those of processes that are gone.

    torchrun keeps one store over all restarts (pytorch#135712), and whoever reads it too early connects to a dead
    process. So rank 0 thinks of a new prefix and tells it to those who ask under a name that is new as well, until each
    has used it. TORCHELASTIC_RESTART_COUNT would not do: launchers on several machines count differently.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=WAIT_TIMEOUT))
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"rank {rank}", name)
        prefix = store.get(f"to {name}").decode()
        store.set(f"{prefix} known to {rank}", "")
        return dist.PrefixStore(prefix, store)
    for other in range(1, world_size):
        while not store.check([f"{name} known to {other}"]):
            store.set(f"to {store.get(f'rank {other}').decode()}", name)
            time.sleep(0.02)
    return dist.PrefixStore(name, store)


def leave_together(run: Run) -> None:
    """Return on any process only when all have finished their collectives.

    Gloo resets its connections when a process leaves, and what a slower one has not yet received is lost with them: it
    would report a failure at the end of a good run. Everybody tells rank 0, then rank 0 answers; if only the answer is
    lost, the work is done all the same, hence the suppressed error.
    """
    if run.world_size == 1:
        return
    token, others = torch.zeros(1), range(1, run.world_size)
    with contextlib.suppress(RuntimeError):
        if run.is_main:
            for rank in others:
                dist.recv(token, src=rank)
            for rank in others:
                dist.send(token, dst=rank)
        else:
            dist.send(token, dst=0)
            dist.recv(token, src=0)
