"""Two gloo processes make the run that one process makes, for every stage, and a process that dies is noticed."""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toy import largest_difference, same_weights, toy_args, toy_process, toy_train

from common.flags import is_installed
from training.checkpoint import list_states, read_state
from training.curves import read_log
from training.processes import distributed_run

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
SIZE = ["--dim", "32", "--n_layers", "2", "--max_seq_len", "64"]
COMMON = [
    *SIZE, "--device", "cpu", "--dtype", "float32", "--max_steps", str(STEPS), "--log_interval", "1",
    "--heldout_share", "0", "--eval_interval", "0", "--save_interval", "0", "--epochs", "9", "--threads", "1",
    "--batch_size", "4", "--accumulation_steps", "1",
]  # fmt: skip
STAGES = {
    "train_pretrain.py": ["--data_path", "dataset/sample/pretrain.jsonl"],
    "train_full_sft.py": ["--data_path", "dataset/sample/sft.jsonl", "--from_weight", "START"],
    "train_lora.py": ["--data_path", "dataset/sample/lora_identity.jsonl", "--from_weight", "START"],
    "train_dpo.py": ["--data_path", "dataset/sample/dpo.jsonl", "--max_seq_len", "256", "--from_weight", "START"],
    "train_distillation.py": [
        "--data_path", "dataset/sample/sft.jsonl", "--from_weight", "START", "--from_teacher_weight", "START",
        "--teacher_dim", "32", "--teacher_n_layers", "2",
    ],
    "train_distill_reason.py": ["--data_path", "dataset/sample/reason.jsonl", "--max_seq_len", "256",
                                "--from_weight", "START"],
}  # fmt: skip


def test_every_stage_is_tested_here():
    assert {path.name for path in ROOT.glob("train_*.py")} == set(STAGES)


def run_stage(script: str, out_dir: Path, start: Path, *flags: str) -> None:
    """Run a stage's main in this process, as launched: alone or as one of several ranks."""
    words = [str(start) if word == "START" else word for word in STAGES[script]]
    argv = [*COMMON, *words, "--out_dir", str(out_dir / script), "--cache_dir", str(out_dir / "cache"), *flags]
    with patch("training.report.plot_log"), patch("training.evaluation.Evaluation.answers", return_value=[]):
        runpy.run_path(str(ROOT / script))["main"](argv)


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def as_ranks(function, world_size: int, *args) -> None:
    """Run ``function(*args, ports)`` in processes that see what a launcher would set; one port for each run inside."""
    mp.spawn(_as_rank, args=(world_size, function, args, free_ports(12)), nprocs=world_size)


def _as_rank(rank: int, world_size: int, function, args, ports) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    os.chdir(ROOT)
    function(*args, iter(ports))


def work_of_two(out: Path, ports) -> None:
    """All that the tests below look at, in one pair of processes: starting them is the slow part."""
    rank = int(os.environ["RANK"])
    original, calls = dist.all_reduce, []

    def counting(tensor, *args, group=None, **kwargs):
        calls.append(group is not None)
        return original(tensor, *args, group=group, **kwargs)

    dist.all_reduce = counting
    for script in STAGES:
        calls.clear()
        os.environ["MASTER_PORT"] = next(ports)
        run_stage(script, out / "two", out / "start.pth")
        (out / f"{script}.{rank}").write_text(str(sum(calls)))
    dist.all_reduce = original
    os.environ["MASTER_PORT"] = next(ports)
    toy_process(str(out / "straight"), "--save_interval", "7")
    _stop_and_continue(out / "resumed", ports)


def _stop_and_continue(out: Path, ports) -> None:
    """Rank 1 alone gets a signal in step 9; both stop, and continue."""
    from test_loop import interrupt_at

    options = {"loss_fn": interrupt_at(9)} if os.environ["RANK"] == "1" else {}
    os.environ["MASTER_PORT"] = next(ports)
    try:
        toy_process(str(out), "--save_interval", "7", **options)
    except SystemExit as stopped:
        assert stopped.code == 128 + signal.SIGTERM
    os.environ["MASTER_PORT"] = next(ports)
    toy_process(str(out), "--save_interval", "7", "--resume")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with the results of two processes, and of one process with the same global batch in one/."""
    out = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patches:
        patches.chdir(ROOT)
        run_stage("train_pretrain.py", out, out, "--max_steps", "2", "--save_weight", "start")
        (out / "train_pretrain.py" / "start_32.pth").rename(out / "start.pth")
        as_ranks(work_of_two, 2, out)
        for script in STAGES:
            run_stage(script, out / "one", out / "start.pth", "--accumulation_steps", "2")
    return out


@pytest.mark.parametrize("script", STAGES)
def test_two_processes_equal_one_with_the_same_global_batch(two, script):
    (a,), (b,) = (list((two / who / script).rglob("*.pth")) for who in ("one", "two"))
    assert a.name == b.name
    one, both = (torch.load(path, weights_only=True) for path in (a, b))
    assert largest_difference(one, both) < 1e-6
    losses = [
        [r["loss"] for path in (two / who / script / "logs").glob("*.jsonl") for r in read_log(path) if "loss" in r]
        for who in ("one", "two")
    ]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("script", STAGES)
def test_gradients_are_summed_once_per_step(two, script):
    assert [(two / f"{script}.{rank}").read_text() for rank in (0, 1)] == [str(STEPS)] * 2


def test_only_rank_0_writes(two):
    for script in STAGES:
        assert len(list((two / "two" / script / "logs").glob("*.jsonl"))) == 1


def test_a_signal_to_one_rank_stops_both_and_they_continue_exactly(two):
    straight, resumed = (torch.load(two / who / "toy_16.pth", weights_only=True) for who in ("straight", "resumed"))
    assert same_weights(straight, resumed)


def test_a_state_of_two_processes_continues_with_one(two, tmp_path, capsys):
    """Nothing is trained twice or left out; the steps are renumbered, because they are larger with more processes."""
    out_dir = shutil.copytree(two / "straight", tmp_path / "straight")
    newest = list_states(out_dir / "checkpoints" / "toy_16")[1]
    state = read_state(newest)
    list_states(out_dir / "checkpoints" / "toy_16")[0].unlink()
    toy_train(out_dir, "--save_interval", "7", "--resume")
    out = capsys.readouterr().out
    assert "processes: 2 then, 1 now" in out
    assert f"its step {state['progress']['step']} is step {2 * state['progress']['step']} now" in out
    continued = torch.load(out_dir / "toy_16.pth", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in continued.values())


def die_in_step_3(out: str, how: str) -> None:
    from test_loop import interrupt_at

    number = {"killed": signal.SIGKILL, "hangs": signal.SIGSTOP}[how]
    options = {"loss_fn": interrupt_at(3, number)} if os.environ["RANK"] == "1" else {}
    with patch("training.processes.STEP_TIMEOUT", timedelta(seconds=5)):
        toy_process(out, **options)


PROGRAM = f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import test_distributed
getattr(test_distributed, sys.argv[1])(*sys.argv[2:])
"""


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_process_that_dies_ends_the_others_with_the_cause(how, tmp_path):
    processes, (port,) = [], free_ports(1)
    for rank in (0, 1):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        words = [sys.executable, "-c", PROGRAM, "die_in_step_3", str(tmp_path), how]
        processes.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    started = time.monotonic()
    _, message = processes[0].communicate(timeout=500)
    assert processes[0].returncode == 1, message
    assert re.search(r"rank 0 of 2 on \S+ failed", message) and "another process died or hangs" in message
    assert time.monotonic() - started < 400, "the step timeout is 5 s; the rest is a busy machine starting processes"
    processes[1].kill()
    processes[1].communicate()


def test_processes_do_not_meet_those_before_a_restart(tmp_path):
    """torchrun keeps one store over all restarts: rank 1, here first, finds the address of a rank 0 that is gone."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        patches.setenv("MASTER_PORT", str(store.port))
        as_ranks(meet_twice, 2, tmp_path)


def meet_twice(out: Path, ports) -> None:
    rank = int(os.environ["RANK"])
    with patch("training.processes.WAIT_TIMEOUT", timedelta(seconds=60)):
        for _ in range(2):
            time.sleep(3 * (rank == 0))
            with distributed_run(toy_args(out, "--threads", "1")) as run:
                assert run.gather(rank) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_restarts_after_a_process_was_killed(rank, two, tmp_path):
    """docs/distributed.md's recipe: the launcher restarts both, and they make the run that nothing broke."""
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "3"]
    words = ["--master_port", *free_ports(1), str(tmp_path / "program.py"), "die_once", str(tmp_path), rank]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher + words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr
    straight, restarted = (torch.load(out / "toy_16.pth", weights_only=True) for out in (two / "straight", tmp_path))
    assert same_weights(straight, restarted)


def die_once(out: str, rank: str) -> None:
    """The toy run; in step 12 this rank is killed, with a state on disk, unless it was restarted already."""
    from test_loop import interrupt_at

    dies = os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    options = {"loss_fn": interrupt_at(12, signal.SIGKILL)} if dies else {}
    toy_process(out, "--save_interval", "7", "--resume", "auto", **options)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("deepspeed"), reason="needs: pip install deepspeed")
def test_the_launcher_of_deepspeed_starts_the_same_run(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port", *free_ports(1)]
    words = ["--no_local_rank", str(tmp_path / "program.py"), "run_without_dropout", str(tmp_path / "two")]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run(launcher + words, env=environment, check=True, timeout=500)
    toy_train(tmp_path / "one", "--accumulation_steps", "2", dropout=0.0)
    one, two = (torch.load(path, weights_only=True) for path in sorted(tmp_path.rglob("toy_16.pth")))
    assert largest_difference(one, two) < 1e-6


def run_without_dropout(out: str) -> None:
    toy_process(out, dropout=0.0)


def test_main_first_lets_rank_0_go_first_on_every_machine(tmp_path):
    as_ranks(enter_in_turn, 3, tmp_path)
    order = sorted(tmp_path.glob("rank*"), key=lambda path: int(path.read_text()))
    assert [path.name for path in order] == ["rank0", "rank2", "rank1"], "rank 2 is the first of the second machine"


def enter_in_turn(out: Path, ports) -> None:
    os.environ["MASTER_PORT"] = next(ports)
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str((0, 1, 0)[rank])
    with distributed_run(toy_args(out / "run", "--threads", "1")) as run:
        with run.main_first():
            (out / f"rank{rank}").write_text(str(time.monotonic_ns()))
            time.sleep(0.05)
        assert run.gather(rank) == [0, 1, 2] and run.from_main(rank) == 0
        assert run.sum_over_ranks(torch.ones(1)).item() == 3
