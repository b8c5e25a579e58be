"""docs/distributed.md's recipe for several machines, on loopback: two launchers that share nothing but a port."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from test_distributed import COMMON, ROOT, STAGES, free_ports, run_stage
from toy import largest_difference, toy_process, toy_train

from training.losses import next_token_loss

PROGRAM = f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
from test_machines import toy_on_one_of_two
toy_on_one_of_two(sys.argv[1])
"""
DIES_IN_STEP = 12


@pytest.fixture
def launch():
    """launch(port, machine, *words) -> the launcher of one of two machines, each with one process."""
    launchers = []

    def start(port: str, machine: int, *words: str, **variables: str) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--max-restarts", "3", "--rdzv_id", "x", "--rdzv_backend", "c10d"]
        # Machine 0 holds what both agree in; with one address for both, the launchers cannot know by themselves.
        launcher += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_conf", f"is_host={machine == 0}"]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | variables
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        launchers.append(subprocess.Popen([*launcher, "--local_addr", "127.0.0.1", *words], cwd=ROOT, env=environment))
        return launchers[-1]

    yield start
    for launcher in launchers:  # nothing but a failed test leaves one that still runs
        launcher.terminate()
    for launcher in launchers:
        launcher.wait()


@pytest.mark.slow
def test_two_machines_with_their_own_launchers_equal_one_process(launch, tmp_path):
    flags = [*COMMON, *STAGES["train_pretrain.py"], "--max_steps", "6", "--cache_dir", str(tmp_path / "cache")]
    script = [str(ROOT / "train_pretrain.py"), *flags, "--out_dir", str(tmp_path / "two")]
    (port,) = free_ports(1)
    machines = [launch(port, machine, *script) for machine in (0, 1)]
    assert [machine.wait(timeout=600) for machine in machines] == [0, 0]
    run_stage(
        "train_pretrain.py", tmp_path / "one", tmp_path, *flags[-2:], "--max_steps", "6", "--accumulation_steps", "2"
    )
    one, two = (torch.load(path, weights_only=True) for path in sorted(tmp_path.rglob("pretrain_32.pth")))
    assert largest_difference(one, two) < 1e-6


@pytest.mark.slow
def test_a_launcher_that_is_killed_and_started_again_joins_the_run(launch, tmp_path):
    """The launcher that stayed restarts its process and waits for the other; what they train equals one process."""
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [str(tmp_path / "program.py"), str(tmp_path / "two")]
    (port,) = free_ports(1)
    stays = launch(port, 0, *words)
    dies = launch(port, 1, *words, LAUNCHER_DIES="yes")
    assert dies.wait(timeout=600) == -signal.SIGKILL
    again = launch(port, 1, *words)
    assert [machine.wait(timeout=600) for machine in (stays, again)] == [0, 0]
    toy_train(tmp_path / "one", "--epochs", "1", "--accumulation_steps", "2", dropout=0.0)
    one, two = (torch.load(path, weights_only=True) for path in sorted(tmp_path.rglob("toy_16.pth")))
    assert largest_difference(one, two) < 1e-6


def toy_on_one_of_two(out: str) -> None:
    """The toy run; where LAUNCHER_DIES is set, this process kills its launcher in the middle."""
    calls = []

    def loss_fn(model, batch):
        calls.append(None)
        if len(calls) == DIES_IN_STEP and "LAUNCHER_DIES" in os.environ:
            os.kill(os.getppid(), signal.SIGKILL)
            (watch,) = [thread for thread in threading.enumerate() if thread.name == "launcher watch"]
            watch.join(60)  # it asks this process to save and stop
        return next_token_loss(model, batch)

    toy_process(out, "--epochs", "1", "--resume", "auto", loss_fn=loss_fn, dropout=0.0)
