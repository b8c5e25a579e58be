"""DPO speed in preference pairs per second: ours against the plain padded two-model loop.

    python -m benchmarks.dpo_throughput --data_path dataset/sample/dpo.jsonl --max_seq_len 256
    python -m benchmarks.dpo_throughput --data_path dataset/dpo.jsonl --dim 256 --n_layers 6 --rounds 5

Each arm trains the same network on the same pairs, in turn (A B C A B C ...) in one process:

    plain         every answer padded or cut to max_seq_len, policy and reference forward in every step, the full
                  float32 log-softmax of both, eager, AdamW's loop
    ours float32  real lengths, head at the answers only, reference from the cache, fused AdamW
    ours          the same in the dtype that `--dtype bfloat16` chooses on this device

Our arms pay for their reference: the forward that fills the cache is run again for every --epochs-th batch, as if
the cost were spread over a run of so many epochs. Prints the median of the rounds, their range, and the ratio to the
plain loop round by round.
"""

import argparse
import copy
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.inputs import add_input_flags, load_inputs, make_runs
from benchmarks.machine import describe_machine
from benchmarks.rounds import Step, add_timing_flags, print_rates, time_rounds
from dataset.batching import Pairs, plan_batches, tokens_per_batch
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from train_dpo import make_loss
from training.loop import add_gradients
from training.optim import make_optimizer
from training.processes import Run
from training.reference import fill_logprobs
from training.stats import StepStats
from training.updater import Updater

BETA = 0.1


def plain_step(run: Run, config: LMConfig, pairs: Pairs, batch_size: int, max_seq_len: int) -> Step:
    """One optimizer step of the textbook loop; returns the pairs it trained on."""
    torch.manual_seed(0)
    policy = MiniMindForCausalLM(config).to(run.device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, foreach=False)
    order = np.random.default_rng(0).permutation(len(pairs))
    batches = itertools.cycle([order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)])

    def logprobs(model, input_ids, targets, mask):
        logp = F.log_softmax(model(input_ids).logits.float(), dim=-1)
        return (logp.gather(2, targets[..., None]).squeeze(2) * mask).sum(1)

    def step() -> int:
        batch = pairs.collate(next(batches))
        rows, width = batch["input_ids"].shape
        row, column = batch["positions"] // width, batch["positions"] % width
        input_ids, targets = torch.zeros(2, rows, max_seq_len, dtype=torch.int64)
        input_ids[:, : min(width, max_seq_len)] = batch["input_ids"][:, :max_seq_len]
        mask = torch.zeros(rows, max_seq_len)
        targets[row, column], mask[row, column] = batch["targets"], 1.0
        inputs = [tensor.to(run.device) for tensor in (input_ids, targets, mask)]
        with torch.no_grad():
            ref_chosen, ref_rejected = logprobs(reference, *inputs).chunk(2)
        chosen, rejected = logprobs(policy, *inputs).chunk(2)
        loss = -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return rows // 2

    return step


def our_step(run: Run, config: LMConfig, pairs: Pairs, positions: int, epochs: int, use_compile: bool) -> Step:
    """One optimizer step as train_dpo.py makes it, and its share of the reference; returns the pairs trained on."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).to(run.device)
    reference = copy.deepcopy(model).eval()
    optimizer = make_optimizer(model, 1e-6, weight_decay=0.1)
    updater = Updater(run, model, optimizer, use_compile=use_compile, scale=1 / positions)
    stats = StepStats(run)
    table = torch.zeros(int(pairs.pairs.max()) + 1, 2, device=run.device)
    loss_fn = make_loss(table, BETA)
    batches = itertools.cycle(plan_batches(pairs.lengths, positions, seed=0, epoch=0))
    made = itertools.count()

    def step() -> int:
        ids = next(batches)
        if next(made) % epochs == 0:
            fill_logprobs(run, reference, pairs.take(ids), table)
        stats.begin()
        add_gradients(run, updater, loss_fn, [pairs.collate(ids)], stats)
        updater.step(stats, lr=1e-6)
        return len(ids)

    return step


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_flags(parser, "pairs", batch_size=4, max_seq_len=1024)
    parser.add_argument("--epochs", type=int, default=2, help="epochs that share the cost of our reference")
    add_timing_flags(parser, rounds=3, steps=2)
    args = parser.parse_args(argv)

    config, pairs = load_inputs(args, "preference")
    full, fast, remark = make_runs(args.device)
    positions = tokens_per_batch(args.batch_size, pairs.lengths)
    ours = (config, pairs, positions, args.epochs, args.compile)
    arms = {
        "plain": plain_step(full, config, pairs, args.batch_size, args.max_seq_len),
        "ours float32": our_step(full, *ours),
        "ours": our_step(fast, *ours),
    }
    print(describe_machine(full.device), remark)
    print(
        f"{args.data_path}: {len(pairs)} pairs, {2 * pairs.rows.lengths.mean():.0f} tokens a pair on average, "
        f"{2 * args.max_seq_len} positions when padded"
    )
    print_rates(time_rounds(arms, args.rounds, args.steps, full.device), "pairs", baseline="plain")


if __name__ == "__main__":
    main()
