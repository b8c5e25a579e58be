"""How much of a run's time goes into saving, with a save every minute.

    python -m benchmarks.save_overhead
    python -m benchmarks.save_overhead --dim 256 --n_layers 6 --saves 12

One run saves every two minutes, so that minutes that begin with a save and minutes without one take turns; all steps
have the same size. The share of steps that a minute loses to its save counts everything: the stall (the copy to memory)
and what the writing thread takes from the steps beside it. Goal: below 2 %. Run it on a quiet machine.
The minute before the first save is compared with those without a save after it, too: saving must not leave a trace.
"""

import argparse
import signal
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.batching import Sequences
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from training.cli import config_from, stage_parser
from training.evaluation import Evaluation
from training.inputs import Data
from training.loop import train
from training.losses import next_token_loss
from training.processes import distributed_run

from .machine import describe_machine

MINUTE = 60.0


def random_texts(count: int, length: int, vocab_size: int) -> Sequences:
    """``count`` texts of random tokens."""
    starts = np.arange(count) * (length + 1)
    lengths = np.full(count, length)
    tokens = np.random.default_rng(0).integers(16, vocab_size, count * (length + 1)).astype(np.uint16)
    spans = np.stack([starts + 1, starts + 1 + lengths], axis=1)
    order = np.arange(count)
    return Sequences(tokens, order, starts, lengths, lengths, spans, order, np.ones_like(order), 0)


def timed_run(saves: int, dim: int, n_layers: int, out: Path) -> tuple[list[float], list[float]]:
    """(moments at which steps began, moments at which saves began) of one run, in seconds."""
    parser = stage_parser("benchmark", data_path="random", save_weight="benchmark")
    flags = ["--dim", str(dim), "--n_layers", str(n_layers), "--batch_size", "8", "--eval_interval", "0"]
    flags += ["--device", "cpu", "--save_interval", "0", "--save_minutes", "2", "--out_dir", str(out)]
    args = parser.parse_args(flags)
    config: LMConfig = config_from(args)
    data = random_texts(40_000, 256, config.vocab_size)
    step_times: list[float] = []
    save_times: list[float] = []

    def loss_until_done(model, batch):
        step_times.append(time.perf_counter())
        if len(save_times) == saves and step_times[-1] > save_times[-1] + 2 * MINUTE:
            signal.raise_signal(signal.SIGTERM)
        return next_token_loss(model, batch)

    def weights_at_save(model):
        save_times.append(time.perf_counter())
        return nn.Module.state_dict(model)

    with distributed_run(args) as run:
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config)
        nothing = data.take(np.arange(0))
        try:
            train(run, args, model, Data(data, nothing, "random"), loss_until_done, Evaluation(nothing, None),
                  weights=weights_at_save)  # fmt: skip
        except SystemExit as stop:
            if stop.code != 128 + signal.SIGTERM:
                raise
    return step_times, save_times[:saves]


def lost_shares(step_times: list[float], save_times: list[float]) -> list[float]:
    """For each save, the share of the next minute's steps that the minute of the save did not make."""
    count = np.arange(len(step_times))
    shares = []
    for start in save_times:
        with_save, without = np.diff(np.interp([start, start + MINUTE, start + 2 * MINUTE], step_times, count))
        shares.append(1 - with_save / without)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=8, help="two minutes each")
    args = parser.parse_args()
    Path("out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="out") as out:  # not /tmp, which may be memory and not a disk
        step_times, save_times = timed_run(args.saves, args.dim, args.n_layers, Path(out))
    shares = lost_shares(step_times, save_times)
    print(describe_machine(torch.device("cpu")))
    print(f"{len(step_times)} steps of {statistics.median(np.diff(step_times)):.3f} s")
    print("lost to a save, each: " + " ".join(f"{share:+.2%}" for share in shares))
    count = np.arange(len(step_times))
    quiet = [np.diff(np.interp([t + MINUTE, t + 2 * MINUTE], step_times, count))[0] for t in save_times]
    before = np.diff(np.interp([save_times[0] - MINUTE, save_times[0]], step_times, count))[0]
    print(f"steps in a quiet minute: {before:.1f} before the first save, {statistics.median(quiet):.1f} after (median)")
    print(f"a save every minute costs {statistics.median(shares):+.2%} of the run time (median; goal: below 2 %)")


if __name__ == "__main__":
    main()
