"""How fast and how tight is the data path: tokenising, second start, planning, collating, padding.

    python -m benchmarks.data_path dataset/sample/pretrain.jsonl dataset/sample/sft.jsonl
    python -m benchmarks.data_path --max_seq_len 1024 --kind preference dataset/dpo.jsonl

Builds each file's cache in a temporary directory. The kind is guessed from the first line unless given.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dataset.batching import Pairs, Sequences, plan_batches
from dataset.token_cache import open_token_cache
from model.chat_format import ChatFormat
from model.loading import load_tokenizer

KIND_OF_KEY = {"text": "text", "conversations": "chat", "chosen": "preference"}


def timed(function: Callable, *args, **kwargs) -> tuple[object, float]:
    """(result, wall-clock seconds)."""
    started = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - started


def guess_kind(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        keys = json.loads(file.readline()).keys()
    return next(kind for key, kind in KIND_OF_KEY.items() if key in keys)


def measure(path: Path, kind: str, chat_format: ChatFormat, cache_dir: str, args: argparse.Namespace) -> None:
    """Print the figures of one file."""
    options = {"on_bad_line": "skip", "log": lambda line: None}
    megabytes = path.stat().st_size / 1e6
    cpu_started = time.process_time()
    _, build = timed(open_token_cache, path, kind, chat_format, cache_dir, **options)
    cpu = time.process_time() - cpu_started
    cache, second = timed(open_token_cache, path, kind, chat_format, cache_dir, **options)
    units, cut = timed((Pairs if kind == "preference" else Sequences).from_cache, cache, args.max_seq_len)
    plan, planning = timed(plan_batches, units.lengths, args.tokens_per_batch, seed=0, epoch=0)
    batches, collating = timed(lambda: [_size(units.collate(ids)) for ids in plan])
    positions, real = np.array(batches).sum(axis=0)
    lengths = cache.meta["lengths"]
    print(
        f"{path.name} ({kind}): {megabytes:.1f} MB, {len(cache)} documents, {len(cache.tokens)} tokens, "
        f"mean {lengths['mean']:.1f}, median {lengths['p50']}, p95 {lengths['p95']}, longest {lengths['max']}\n"
        f"  build {build:.1f} s = {megabytes / build:.2f} MB/s ({megabytes / cpu:.2f} MB per CPU second), "
        f"second start {second:.4f} s\n"
        f"  from_cache {cut:.4f} s, plan {planning:.4f} s for {len(units)} units in {len(plan)} batches "
        f"({units.dropped} dropped), collate {real / collating / 1e6:.1f} M real tokens/s\n"
        f"  real tokens per row {real / len(units):.1f}, padding {1 - real / positions:.2%}; "
        f"padded to {args.max_seq_len} it would be {cache.fixed_padding(args.max_seq_len):.2%}"
    )


def _size(batch: dict) -> tuple[int, int]:
    return batch["input_ids"].numel(), int(batch["lengths"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="jsonl files")
    parser.add_argument("--kind", choices=sorted(KIND_OF_KEY.values()), help="of all files; guessed by default")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens")
    parser.add_argument("--tokens_per_batch", type=int, default=16384, help="padded positions of a batch")
    args = parser.parse_args()
    chat_format = ChatFormat(load_tokenizer())
    for path in args.files:
        with tempfile.TemporaryDirectory() as cache_dir:
            measure(path, args.kind or guess_kind(path), chat_format, cache_dir, args)


if __name__ == "__main__":
    main()
