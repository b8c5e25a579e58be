"""Devices, precision, and signals."""

import argparse
import os
import signal
import subprocess
import sys

import pytest
import torch
from toy import toy_args, toy_model, toy_run

from common.device import choose_device, choose_dtype
from training.runtime import Run, distributed_run, seed_everything, stop_on_signals

CPU = torch.device("cpu")


def test_a_missing_device_is_refused_with_a_remedy(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda:3: not available here; use --device auto"):
        choose_device("cuda:3")
    with pytest.raises(SystemExit), distributed_run(argparse.Namespace(threads=0, device="cuda", dtype="float32")):
        pass
    assert "error: --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["abacus", "xla", ""])
def test_an_unknown_device_is_a_plain_error(name, capsys):
    with pytest.raises(SystemExit), distributed_run(argparse.Namespace(threads=0, device=name, dtype="float32")):
        pass
    assert "--device" in capsys.readouterr().err


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"


def test_a_cpu_without_bfloat16_instructions_trains_in_float32(monkeypatch):
    """Emulated bfloat16 is tens of times slower than float32."""
    monkeypatch.setattr("common.device.cpu_has_fast_bfloat16", lambda: False)
    dtype, remark = choose_dtype("bfloat16", CPU)
    assert dtype == torch.float32 and "float32" in remark
    monkeypatch.setattr("common.device.cpu_has_fast_bfloat16", lambda: True)
    assert choose_dtype("bfloat16", CPU) == (torch.bfloat16, "")


def test_dtype_on_other_devices(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert choose_dtype("float32", CPU) == (torch.float32, "")
    assert choose_dtype("float16", CPU)[0] == choose_dtype("float16", torch.device("mps"))[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_dtype("bfloat16", cuda)[0] == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_dtype("bfloat16", cuda) == (torch.bfloat16, "")


def test_autocast_really_switches_and_weights_stay_float32():
    """Upstream A1: --dtype only switched the gradient scaler."""
    model = toy_model()
    for dtype in (torch.bfloat16, torch.float32):
        with Run(CPU, dtype).autocast():
            logits = model(torch.arange(8)[None]).logits
        assert logits.dtype == dtype
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert Run(CPU, torch.bfloat16).make_scaler().is_enabled() is False


def test_one_process_needs_no_collectives():
    run, tensor = toy_run(), torch.ones(2)
    run.barrier()
    run.broadcast(toy_model())
    assert run.sum_over_ranks(tensor) is tensor and run.from_main(5) == 5 and run.gather(5) == [5]
    with run.main_first():
        pass


def test_seeds_differ_between_ranks_and_repeat():
    draws = []
    for rank in (0, 1, 0):
        seed_everything(7, rank)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[2] != draws[1]


def test_the_first_signal_asks_and_handlers_are_restored(capfd):
    run, before = toy_run(), signal.getsignal(signal.SIGTERM)
    with stop_on_signals(run):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err.count("finishing this step") == 1


def test_a_second_ctrl_c_leaves_at_once():
    """The one that a launcher hands on at the same moment does not count."""
    program = """
import os, signal, sys, time
sys.path[:0] = sys.argv[1:]
from training import runtime
run = runtime.Run(None, None)
with runtime.stop_on_signals(run):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program, os.getcwd()], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "still here\n", done


def test_ctrl_c_outside_of_training_is_one_line_and_no_trace(tmp_path, capsys):
    """While data is read, in DPO's reference pass, in LoRA's evaluations before and after."""
    with pytest.raises(SystemExit) as stopped, distributed_run(toy_args(tmp_path)):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and "nothing is lost" in capsys.readouterr().err


def test_threads_flag(tmp_path):
    before = torch.get_num_threads()
    with distributed_run(toy_args(tmp_path, "--threads", "1")):
        assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
