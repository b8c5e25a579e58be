"""What a way of handing out memory costs on a CPU: tokens per second of CPU time, and memory. Linux with glibc.

    python -m benchmarks.memory_speed --data_path dataset/pretrain_hq.jsonl
    python -m benchmarks.memory_speed --data_path dataset/pretrain_hq.jsonl --dim 512 --n_layers 8 --rounds 5 --steps 2

Every arm trains the same model on the same batches on one thread, in a process of its own, since these settings hold
for a whole process; the processes take turns (A B C A B C ...), so that one works while the others wait. CPU time holds
what the system does for a process, like fetching pages, and not how long it waits for other work.

    as a run       every freed block is kept, and given back when it grows (KeptMemory); 512 compiled kernels
    kept           nothing is given back
    C library      its own rules
    1024 kernels   as a run, with as many compiled kernels as oneDNN keeps by itself
    whole loss     as a run, with all rows of the loss at once instead of 512 at a time
    large pages    as a run, with pages of 2 MB for large tensors (transparent huge pages)
"""

import argparse
import multiprocessing
import os
import time
from itertools import count
from multiprocessing.connection import Connection

import torch

from benchmarks.machine import describe_machine
from benchmarks.rounds import print_rates
from common.memory import keep_fewer_kernels, keep_freed_memory, resident_memory
from dataset.batching import Sequences, plan_batches, tokens_per_batch
from dataset.token_cache import open_token_cache
from model.chat_format import ChatFormat
from model.LMConfig import LMConfig
from model.loading import load_tokenizer
from model.model import MiniMindForCausalLM
from training import losses
from training.kept_memory import KeptMemory
from training.loop import add_gradients
from training.memory import memory_report
from training.optim import make_optimizer
from training.processes import Run
from training.stats import StepStats
from training.updater import Updater

ARMS = ("as a run", "kept", "C library", "1024 kernels", "whole loss", "large pages")


def prepare_arm(arm: str) -> None:
    """The settings of a process that trains as this arm; before its first tensor."""
    if arm == "large pages":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    if arm == "1024 kernels":
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = "1024"
    if arm != "C library":
        keep_freed_memory()
    keep_fewer_kernels()
    if arm == "whole loss":
        losses.CHUNK = 10**9


def worker(arm: str, args: argparse.Namespace, connection: Connection) -> None:
    """Train as ``arm``; whenever a number arrives, make so many steps and answer (tokens a second, MB held)."""
    prepare_arm(arm)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    cache = open_token_cache(args.data_path, "text", ChatFormat(tokenizer), args.cache_dir, log=lambda line: None)
    units = Sequences.from_cache(cache, args.max_seq_len)
    budget = tokens_per_batch(args.batch_size, units.lengths)
    torch.manual_seed(0)
    run = Run(torch.device("cpu"), getattr(torch, args.dtype))
    model = MiniMindForCausalLM(LMConfig(dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer)))
    _, needed = memory_report(run, args, model, losses.next_token_loss, units, budget)
    kept = KeptMemory(0 if arm in ("kept", "C library") else needed)
    updater = Updater(run, model, make_optimizer(model, 5e-4, weight_decay=0.1), scale=1 / budget)
    stats = StepStats(run)
    batches = (ids for epoch in count() for ids in plan_batches(units.lengths, budget, seed=0, epoch=epoch))
    connection.send("ready")
    while steps := connection.recv():
        tokens, held, started = 0, 0, time.process_time()
        for _ in range(steps):
            batch = units.collate(next(batches))
            stats.begin()
            add_gradients(run, updater, losses.next_token_loss, [batch], stats)
            updater.step(stats, lr=5e-4)
            held = max(held, resident_memory())
            kept.end_step()
            tokens += int(batch["lengths"].sum())
        connection.send((tokens / (time.process_time() - started), held / 1e6))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="jsonl of texts")
    parser.add_argument("--cache_dir", default="out/cache", help="where tokenised text is kept")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--dim", type=int, default=64, help="width of the model")
    parser.add_argument("--n_layers", type=int, default=2, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per micro-batch")
    parser.add_argument("--max_seq_len", type=int, default=256, help="longest sequence in tokens")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds after one for warm-up")
    parser.add_argument("--steps", type=int, default=20, help="steps of each arm in a round")
    parser.set_defaults(accumulation_steps=1)  # memory_report names it where memory does not suffice
    args = parser.parse_args(argv)

    spawn = multiprocessing.get_context("spawn")
    connections, processes, peaks = {}, [], dict.fromkeys(args.arms, 0.0)
    for arm in args.arms:
        connections[arm], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=worker, args=(arm, args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that recv() says when the worker died
        connections[arm].recv()

    rounds = []
    for number in range(args.rounds + 1):
        rates = {}
        for arm, connection in connections.items():
            connection.send(args.steps)
            rates[arm], held = connection.recv()
            peaks[arm] = max(peaks[arm], held)
        if number:  # the first one warms up
            rounds.append(rates)
            print("  ".join(f"{arm}: {rate:,.0f}" for arm, rate in rates.items()), flush=True)
    print(describe_machine(torch.device("cpu")))
    print_rates(rounds, "tokens", baseline=args.arms[0])
    print("most memory held after a step: " + ", ".join(f"{arm} {peak:,.0f} MB" for arm, peak in peaks.items()))
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(0)
        process.join()


if __name__ == "__main__":
    main()
