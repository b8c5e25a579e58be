"""Training speed in real (non-padding) tokens per second: our data path and step against the plain padded loop.

    python -m benchmarks.train_throughput --data_path dataset/sample/pretrain.jsonl
    python -m benchmarks.train_throughput --data_path dataset/pretrain_hq.jsonl --dim 512 --n_layers 8 --rounds 5

Three arms train the same network on the same texts from the same weights, in turn (A B C A B C ...) in one process:

    plain         every text padded or cut to max_seq_len, batch of 8, float32, eager, logits everywhere, AdamW's loop
    ours float32  batches of equal length and constant token budget, fused AdamW
    ours          the same in the dtype that `--dtype bfloat16` chooses on this device

Each arm takes its batches from one epoch of its own plan, the same number of *positions* per step; only real tokens
are counted. Prints the median of the rounds, their range, and the ratio to the plain loop round by round.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.inputs import add_input_flags, load_inputs, make_runs
from benchmarks.machine import describe_machine
from benchmarks.rounds import Step, add_timing_flags, print_rates, time_rounds
from dataset.batching import Sequences, plan_batches
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from training.loop import add_gradients
from training.losses import next_token_loss
from training.optim import make_optimizer
from training.processes import Run
from training.stats import StepStats
from training.updater import Updater


def plain_step(run: Run, config: LMConfig, units: Sequences, batch_size: int, max_seq_len: int) -> Step:
    """One optimizer step of the textbook loop; returns the real tokens it trained on."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, foreach=False)
    order = np.random.default_rng(0).permutation(len(units))
    rows = (order[i : i + batch_size] for i in range(0, len(order), batch_size))

    def step() -> int:
        ids = next(rows)
        input_ids = torch.zeros(batch_size, max_seq_len, dtype=torch.int64)
        targets = torch.full((batch_size, max_seq_len), -100)
        for row, i in enumerate(ids):
            start, length = int(units.starts[i]), int(units.lengths[i])
            tokens = torch.from_numpy(units.tokens[start : start + length + 1].astype(np.int64))
            input_ids[row, :length], targets[row, :length] = tokens[:-1], tokens[1:]
        logits = model(input_ids.to(run.device)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(run.device), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(units.lengths[ids].sum())

    return step


def our_step(run: Run, config: LMConfig, units: Sequences, positions: int, use_compile: bool) -> Step:
    """One optimizer step as training/loop.py makes it; returns the real tokens it trained on."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).to(run.device)
    optimizer = make_optimizer(model, 5e-4, weight_decay=0.1)
    updater = Updater(run, model, optimizer, use_compile=use_compile, scale=1 / positions)
    stats = StepStats(run)
    plan = iter(plan_batches(units.lengths, positions, seed=0, epoch=0))

    def step() -> int:
        batch = units.collate(next(plan))
        stats.begin()
        add_gradients(run, updater, next_token_loss, [batch], stats)
        updater.step(stats, lr=5e-4)
        return int(batch["lengths"].sum())

    return step


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_flags(parser, "texts", batch_size=8, max_seq_len=512)
    add_timing_flags(parser, rounds=3, steps=2)
    args = parser.parse_args(argv)

    config, units = load_inputs(args, "text")
    positions = args.batch_size * args.max_seq_len
    full, fast, remark = make_runs(args.device)
    arms = {
        "plain": plain_step(full, config, units, args.batch_size, args.max_seq_len),
        "ours float32": our_step(full, config, units, positions, args.compile),
        "ours": our_step(fast, config, units, positions, args.compile),
    }
    print(describe_machine(full.device), remark)
    print(
        f"{args.data_path}: {len(units)} sequences, {units.lengths.mean():.0f} tokens on average, {positions} positions"
    )
    print_rates(time_rounds(arms, args.rounds, args.steps, full.device), "real tokens", baseline="plain")


if __name__ == "__main__":
    main()
