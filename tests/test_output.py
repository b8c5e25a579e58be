"""Printing never ends a run, whatever became of the terminal, the pipe, the disk or the encoding."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kill import in_a_fork
from test_loop import interrupt_at
from toy import same_weights, toy_args, toy_run, toy_train

from common.output import LastingStream, make_output_last
from training.curves import read_log
from training.processes import distributed_run
from training.report import Report, append_line
from training.signals import stop_on_signals
from training.trackers import start_tracker

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--max_steps", "12", "--save_interval", "4", "--log_interval", "2"]


def broken_pipe() -> int:
    end, pipe = os.pipe()
    os.close(end)
    return pipe


def lost_terminal() -> int:
    window, terminal = os.openpty()
    os.close(window)
    return terminal


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def chatty_run(out: Path, *flags: str) -> None:
    with distributed_run(toy_args(out, *flags)) as run:
        print("👶: 你好")
        toy_train(out, *flags, run=run)
        print("🤖️: 再见", file=sys.stderr, flush=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict:
    return toy_train(tmp_path_factory.mktemp("straight"), *FLAGS).state_dict()


def is_whole(out: Path, straight: dict) -> bool:
    log = [record["step"] for path in (out / "logs").glob("*.jsonl") for record in read_log(path) if "loss" in record]
    return same_weights(torch.load(out / "toy_16.pth", weights_only=True), straight) and log == [1, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("target", [broken_pipe, lost_terminal, full_disk])
def test_a_run_outlives_its_output(target, straight, tmp_path):
    def work():
        for name in ("stdout", "stderr"):
            setattr(sys, name, os.fdopen(target(), "w", buffering=1, encoding="utf-8"))
        chatty_run(tmp_path, *FLAGS)

    assert in_a_fork(work) == 0 and is_whole(tmp_path, straight)


def test_a_run_without_any_output(straight, tmp_path):
    def work():
        sys.stdout = sys.stderr = None  # Python, started with `>&- 2>&-`
        chatty_run(tmp_path, *FLAGS)

    assert in_a_fork(work) == 0 and is_whole(tmp_path, straight)


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "cp1252"])
def test_an_encoding_without_emoji(encoding, straight, tmp_path):
    printed = tmp_path / "printed"

    def work():
        sys.stdout = sys.stderr = printed.open("w", encoding=encoding)
        chatty_run(tmp_path, *FLAGS)
        sys.stdout.flush()

    assert in_a_fork(work) == 0 and is_whole(tmp_path, straight)
    assert ("?: 你好" if encoding == "gbk" else "?: ??\n") in printed.read_text(encoding)


def test_the_exit_code_is_the_runs(tmp_path):
    """Python ends with 120 when it cannot flush stdout."""
    program = "import sys; sys.path[:0] = sys.argv[1:3]; import test_output as t; t.chatty_run(t.Path(sys.argv[3]))"
    runs = []
    for target in (broken_pipe, full_disk):
        words = [sys.executable, "-c", program, str(ROOT), str(ROOT / "tests"), str(tmp_path / target.__name__)]
        runs.append(subprocess.Popen(words, stdout=target(), stderr=target()))
    assert [run.wait(timeout=300) for run in runs] == [0, 0]


def test_a_disk_with_room_again_is_written_again(tmp_path):
    class Disk:
        is_full, text, closed = False, "", False

        def write(self, text):
            if self.is_full:
                raise OSError(28, "No space left on device")
            self.text += text

    disk = Disk()
    stream = LastingStream(disk)
    for word, disk.is_full in (("a", False), ("b", True), ("c", False)):
        assert stream.write(word) == 1
    assert disk.text == "ac"


def test_streams_are_wrapped_once_and_behave_as_before(capsys):
    make_output_last()
    first = sys.stdout
    make_output_last()
    assert sys.stdout is first and not first.isatty() and first.encoding.lower() == "utf-8"
    print("👶")
    assert capsys.readouterr().out == "👶\n"


# Signals


def test_a_lost_connection_stops_unless_nohup_ignores_it(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stopped:
            toy_train(tmp_path / "stops", loss_fn=interrupt_at(7, signal.SIGHUP))
        assert stopped.value.code == 128 + signal.SIGHUP and (tmp_path / "stops/toy_16.pth").exists()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        toy_train(tmp_path / "goes on", *FLAGS, loss_fn=interrupt_at(7, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_with_stderr_gone(tmp_path):
    def work():
        os.dup2(broken_pipe(), 2)
        run = toy_run()
        with stop_on_signals(run):
            os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_signal == signal.SIGTERM

    assert in_a_fork(work) == 0


# The log and the tracker


def test_a_name_that_is_no_utf8_is_logged(tmp_path):
    toy_train(tmp_path, "--max_steps", "2", "--wandb_project", "\udce9")
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    assert read_log(log)[0]["flags"]["wandb_project"] == "\udce9"


def test_a_line_after_one_that_was_cut_off_is_whole(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    append_line(log, b'{"step": 1}')
    log.write_bytes(log.read_bytes() + b'{"step": 2, "lo')
    append_line(log, b'{"step": 3}')
    append_line(log, b'{"step": 4}')
    assert [record["step"] for record in read_log(log)] == [1, 3, 4]


class Failing:
    id = None

    def log(self, values, step):
        raise ConnectionError("no route to host")

    finish = log


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path, capsys):
    report = Report(toy_run(), toy_args(tmp_path), "log", total_steps=1, tracker=Failing())
    for step in (1, 2):
        report.record({"step": step, "loss": 2.0})
    report.close()
    assert capsys.readouterr().out.count("the tracker failed (ConnectionError: no route to host)") == 1
    assert len(read_log(report.path)) == 3


def test_a_tracker_that_does_not_start_is_a_plain_error(tmp_path, monkeypatch):
    monkeypatch.setattr("training.cli.is_installed", lambda package: True)
    monkeypatch.setitem(sys.modules, "wandb", Failing)
    with pytest.raises(SystemExit, match="--tracker wandb does not start: AttributeError(.|\n)*offline"):
        start_tracker(toy_run(), toy_args(tmp_path, "--use_wandb"), "log")
