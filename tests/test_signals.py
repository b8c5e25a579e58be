"""Signals ask a run to stop."""

import os
import signal
import subprocess
import sys

from toy import toy_run

from training.signals import stop_on_signals


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
from training.processes import Run
from training.signals import stop_on_signals
run = Run(None, None)
with stop_on_signals(run):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program, os.getcwd()], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "still here\n", done
