"""How much of a run's time goes into saving: the same run with a save every minute, and without.

    python benchmarks/save_overhead.py
    python benchmarks/save_overhead.py --dim 768 --n_layers 16 --minutes 5

Runs of both kinds take turns; compared are the medians of the seconds per step. A save costs its stall (the copy to
memory) and what the writing thread takes from the steps beside it. Goal: below 2 %. Run it on a quiet machine.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.batching import Sequences
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from training.cli import config_from, stage_parser
from training.evaluation import Evaluation
from training.inputs import Data
from training.loop import train
from training.losses import next_token_loss
from training.runtime import distributed_run


def random_texts(count: int, length: int, vocab_size: int) -> Sequences:
    """``count`` texts of random tokens."""
    starts = np.arange(count) * (length + 1)
    lengths = np.full(count, length)
    tokens = np.random.default_rng(0).integers(16, vocab_size, count * (length + 1)).astype(np.uint16)
    spans = np.stack([starts + 1, starts + 1 + lengths], axis=1)
    order = np.arange(count)
    return Sequences(tokens, order, starts, lengths, lengths, spans, order, np.ones_like(order), 0)


def timed_run(minutes: float, save_minutes: float, dim: int, n_layers: int, out: Path) -> tuple[int, float]:
    """(steps made, seconds they took), without start and end, in about ``minutes``."""
    parser = stage_parser("benchmark", data_path="random", save_weight="benchmark")
    flags = ["--dim", str(dim), "--n_layers", str(n_layers), "--batch_size", "8", "--eval_interval", "0"]
    flags += ["--save_interval", "0", "--save_minutes", str(save_minutes), "--out_dir", str(out)]
    args = parser.parse_args(flags)
    config: LMConfig = config_from(args)
    data = random_texts(20_000, 256, config.vocab_size)
    times: list[float] = []

    def stop_when_done(model, batch):
        times.append(time.perf_counter())
        if times[-1] - times[min(5, len(times) - 1)] > 60 * minutes:
            os.kill(os.getpid(), 15)
        return next_token_loss(model, batch)

    with distributed_run(args) as run:
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config)
        try:
            train(run, args, model, Data(data, data.take(np.arange(0)), "random"), stop_when_done,
                  Evaluation(data.take(np.arange(0)), None))  # fmt: skip
        except SystemExit:
            pass
    return len(times) - 6, times[-1] - times[5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=3.5, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in turn")
    args = parser.parse_args()
    seconds_per_step: dict[float, list[float]] = {0.0: [], 1.0: []}
    for _ in range(args.rounds):
        for save_minutes, measured in seconds_per_step.items():
            with tempfile.TemporaryDirectory() as out:
                steps, seconds = timed_run(args.minutes, save_minutes, args.dim, args.n_layers, Path(out))
            measured.append(seconds / steps)
            print(f"save every {save_minutes or 'never'} min: {steps} steps, {seconds / steps:.4f} s each", flush=True)
    without, with_saves = (statistics.median(values) for values in seconds_per_step.values())
    print(f"a save every minute costs {with_saves / without - 1:+.2%} of the run time (medians; goal: below 2 %)")


if __name__ == "__main__":
    main()
