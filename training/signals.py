"""How a run is asked to stop: by signals, and by the death of its launcher."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from common.output import write_from_handler

SECOND_CTRL_C = 1.0  # seconds: launchers hand one Ctrl-C on, so that it can arrive twice at the same moment


@contextlib.contextmanager
def stop_on_signals(run) -> Iterator[None]:
    """These signals ask the loop to finish its step, save and leave; a second Ctrl-C leaves at once.

    Leaving at once is safe because files are written atomically. SIGHUP: the terminal or the connection is gone; nohup
    has it ignored, and so it stays. SIGUSR1 is what schedulers send before preemption (``sbatch --signal=USR1@120``).
    """
    asked_at = -SECOND_CTRL_C

    def ask_to_stop(number: int, frame) -> None:
        nonlocal asked_at
        if run.stop_signal == signal.SIGINT == number and time.monotonic() - asked_at > SECOND_CTRL_C:
            os._exit(128 + signal.SIGINT)
        if not run.stop_signal:
            run.stop_signal, asked_at = number, time.monotonic()
            if run.is_main:
                name = signal.Signals(number).name
                write_from_handler(f"\n{name}: finishing this step, then saving (Ctrl-C again: leave at once)\n")

    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]  # Windows lacks two
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        names.remove("SIGHUP")
    previous = {name: signal.signal(getattr(signal, name), ask_to_stop) for name in names}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


def stop_without_launcher() -> None:
    """Ask this process to stop, as SIGTERM does, when the launcher that started it is gone: somebody killed it.

    Otherwise the processes of a dead launcher would train on, unseen. Where the parent's number never changes
    (Windows) nothing happens.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
