"""Whether a run on a CPU takes the memory that its memory line tells, and no more as time goes by. Linux.

    python -m benchmarks.memory --data_path dataset/pretrain_hq.jsonl
    python -m benchmarks.memory --data_path dataset/pretrain_hq.jsonl --minutes 15 --sizes 64x2 512x8

Each size is a run of train_pretrain.py in a process of its own, one after the other, whose resident memory is read
twice a second. Goal: the peak is at most 1.5 times the line, and the last third of the time no higher than the middle
third by more than a tenth.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from common.memory import resident_memory
from training.curves import read_log


def watched_run(flags: list[str], seconds: float, out: Path) -> tuple[float, list[float], int]:
    """(MB that the memory line tells, MB that the process held twice a second from there on, steps made)."""
    command = [sys.executable, "train_pretrain.py", *flags, "--out_dir", str(out), "--log_interval", "1"]
    held, told, line = [], None, re.compile(r"^memory: about ([\d,]+) MB", re.MULTILINE)
    with (out / "output.txt").open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < seconds:
            time.sleep(0.5)
            if told is None and (found := line.search((out / "output.txt").read_text())):
                told, started = float(found[1].replace(",", "")), time.monotonic()
            if told is not None:
                held.append(resident_memory(process.pid) / 1e6)
        process.send_signal(signal.SIGTERM)
    if told is None or not held:
        raise SystemExit(f"the run did not get as far as training:\n{(out / 'output.txt').read_text()}")
    steps = [record["step"] for path in (out / "logs").glob("*.jsonl") for record in read_log(path) if "step" in record]
    return told, held, max(steps, default=0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="jsonl of texts")
    parser.add_argument("--sizes", nargs="+", default=["64x2", "256x6", "512x8"], help="dim x n_layers")
    parser.add_argument("--batch_size", default="32", help="sequences per micro-batch")
    parser.add_argument("--max_seq_len", default="256", help="longest sequence in tokens")
    parser.add_argument("--minutes", type=float, default=15, help="of each run")
    args = parser.parse_args(argv)

    print(describe_machine(torch.device("cpu")))
    print("| model | steps | memory line | peak | ratio | peak of each third of the time |\n|---|---|---|---|---|---|")
    for size in args.sizes:
        dim, n_layers = size.split("x")
        flags = ["--data_path", args.data_path, "--dim", dim, "--n_layers", n_layers, "--device", "cpu"]
        flags += ["--batch_size", args.batch_size, "--max_seq_len", args.max_seq_len]
        flags += ["--accumulation_steps", "1", "--epochs", "1000"]
        with tempfile.TemporaryDirectory() as out:
            told, held, steps = watched_run(flags, 60 * args.minutes, Path(out))
        third = len(held) // 3
        thirds = [max(part, default=0) for part in (held[:third], held[third : 2 * third], held[2 * third :])]
        peaks = ", ".join(f"{peak:.0f}" for peak in thirds)
        print(
            f"| {size} | {steps} | {told:.0f} MB | {max(held):.0f} MB | {max(held) / told:.2f} | {peaks} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
