"""The files of a run: found unusable before any work, and written by one run at a time."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_distributed import free_ports
from test_kill import in_a_fork
from test_loop import interrupt_at
from toy import toy_args, toy_process, toy_run, toy_train

import train_pretrain
from model.chat_format import ChatFormat
from model.loading import load_tokenizer
from training.inputs import load_data
from training.processes import distributed_run

ROOT = Path(__file__).resolve().parents[1]
STOPPED = ["--max_steps", "3"]


def refusal(capsys, out, *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped, distributed_run(toy_args(out, *flags)):
        pytest.fail("the run began")
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "checkpoints", "logs", "checkpoints/toy_16"])
def test_a_file_where_a_folder_should_be(name, tmp_path, capsys):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("a file")
    message = refusal(capsys, out)
    assert f"cannot write into {out / name}" in message and "--out_dir" in message and "Traceback" not in message


def test_a_folder_where_the_weights_should_be(tmp_path, capsys):
    (tmp_path / "toy_16.pth").mkdir()
    assert "toy_16.pth is a folder" in refusal(capsys, tmp_path)


def test_a_folder_that_nobody_may_write(capsys):
    assert "cannot write into /proc/self" in refusal(capsys, Path("/proc/self"))


def test_an_unusable_folder_is_found_before_the_data_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train_pretrain.load_data", lambda *args, **kwargs: pytest.fail("read"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit):
        train_pretrain.main(["--out_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert "cannot write into" in capsys.readouterr().err


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.files.LOCK_WAIT", 0.2)
    with distributed_run(toy_args(tmp_path)):
        message = refusal(capsys, tmp_path)
        with distributed_run(toy_args(tmp_path, "--save_weight", "other")):
            pass
    assert re.search(rf"another run writes \S+toy_16.pth: process {os.getpid()} on \S+, started 20\S+ \S+: ", message)
    assert "--save_weight" in message
    toy_process(str(tmp_path), *STOPPED)  # the first one has ended


def test_the_lock_of_a_killed_run_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.LOCK_WAIT", 5)
    killed = in_a_fork(lambda: toy_process(str(tmp_path), loss_fn=interrupt_at(3, signal.SIGKILL)))
    assert killed == signal.SIGKILL and (tmp_path / "checkpoints/toy_16.holder").exists()
    toy_process(str(tmp_path), *STOPPED)
    assert not (tmp_path / "checkpoints/toy_16.holder").exists()


def test_a_folder_that_vanishes_does_not_end_a_run_with_a_stack_trace(tmp_path):
    with distributed_run(toy_args(tmp_path)):
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("a file")


def test_a_file_system_without_locks_is_told(tmp_path, capsys, monkeypatch):
    def no_locks(self, timeout):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("common.files.FileLock.acquire", no_locks)
    toy_process(str(tmp_path), *STOPPED)
    assert "files cannot be locked" in capsys.readouterr().out and (tmp_path / "toy_16.pth").exists()


def test_the_weights_of_a_complete_run_are_written_again_when_they_are_gone(tmp_path, capsys):
    weights = tmp_path / "toy_16.pth"
    toy_train(tmp_path, *STOPPED)
    before = weights.read_bytes()
    weights.unlink()
    toy_train(tmp_path, *STOPPED, "--resume")
    assert "was gone: written again" in capsys.readouterr().out and weights.read_bytes() == before


def test_data_under_another_name_is_the_same_data(tmp_path, write_jsonl):
    rows = [{"text": f"{i} 世界上最高的山峰是珠穆朗玛峰。"} for i in range(40)]
    data = write_jsonl(rows, "before.jsonl")

    def run(*flags: str) -> None:
        train_pretrain.main([
            "--dim", "16", "--n_layers", "1", "--device", "cpu", "--out_dir", str(tmp_path / "out"),
            "--batch_size", "2", "--cache_dir", str(tmp_path / "cache"), "--eval_interval", "0",
            "--accumulation_steps", "1", *flags,
        ])  # fmt: skip

    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patches:
        patches.setattr("train_pretrain.next_token_loss", interrupt_at(4))
        patches.setattr("training.loop.memory_report", lambda *args: ("", 0))
        run("--data_path", str(data))
    assert stopped.value.code == 128 + signal.SIGTERM
    run("--data_path", str(data.rename(tmp_path / "after.jsonl")), "--resume")


def test_ranks_with_different_data_are_refused(tmp_path, write_jsonl, monkeypatch):
    """On two machines --data_path can name two files: each rank trained on its own, in silence."""
    data = write_jsonl([{"text": f"{i} 世界上最高的山峰是珠穆朗玛峰。"} for i in range(40)], "data.jsonl")
    run, chat = toy_run(), ChatFormat(load_tokenizer())
    args = toy_args(tmp_path, "--data_path", str(data), "--cache_dir", str(tmp_path / "cache"))
    assert len(load_data(run, args, chat, "text").train)
    monkeypatch.setattr(run, "gather", lambda content: [content, content, "another"])
    with pytest.raises(ValueError, match="data.jsonl is another file for rank 2 than for rank 0"):
        load_data(run, args, chat, "text")


def test_ranks_end_and_save_when_their_launcher_is_killed(tmp_path):
    program = f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import test_files
test_files.slow_process(sys.argv[1])
"""
    (tmp_path / "program.py").write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", *free_ports(1)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "printed").open("w") as printed:
        words = [*launcher, str(tmp_path / "program.py"), str(tmp_path)]
        process = subprocess.Popen(words, env=environment, stdout=printed, stderr=printed)
        wait_for(lambda: len(list(tmp_path.glob("rank*"))) == 2, 300)
        process.kill()
        process.wait()
        ranks = [int(path.read_text()) for path in tmp_path.glob("rank*")]
        wait_for(lambda: not any(is_running(pid) for pid in ranks), 100)
    assert "everything is saved" in (tmp_path / "printed").read_text()
    assert list((tmp_path / "checkpoints" / "toy_16").glob("*.pt"))


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """A zombie is not: nobody may be there to wait for the ranks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def slow_process(out: str) -> None:
    """A toy run of minutes that tells its process number when it trains."""
    from training.losses import next_token_loss

    def slowly(model, batch):
        (Path(out) / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
        time.sleep(0.1)
        return next_token_loss(model, batch)

    toy_process(out, "--epochs", "100", loss_fn=slowly)
