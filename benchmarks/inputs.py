"""What the throughput benchmarks of training have in common: model, data and runs that the flags describe."""

import argparse
import tempfile

import torch

from common.device import choose_device, choose_dtype
from dataset.batching import Pairs, Sequences
from dataset.token_cache import open_token_cache
from model.chat_format import ChatFormat
from model.LMConfig import LMConfig
from model.loading import load_tokenizer
from training.processes import Run


def add_input_flags(parser: argparse.ArgumentParser, rows: str, batch_size: int, max_seq_len: int) -> None:
    """The flags that `load_inputs` reads, and ``--batch_size``. Args: rows: what the data file holds, in plural."""
    parser.add_argument("--data_path", required=True, help=f"jsonl of {rows}: its lengths decide the padding")
    parser.add_argument("--dim", type=int, default=512, help="width of the model")
    parser.add_argument("--n_layers", type=int, default=8, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=batch_size, help=f"{rows} per step of the plain loop")
    parser.add_argument("--max_seq_len", type=int, default=max_seq_len, help="what the plain loop pads to, in tokens")


def load_inputs(args, kind: str) -> tuple[LMConfig, Sequences | Pairs]:
    """The model's configuration and the data, tokenised for this once; kind: see dataset/readers.py."""
    tokenizer = load_tokenizer()
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer))
    with tempfile.TemporaryDirectory() as cache_dir:
        cache = open_token_cache(args.data_path, kind, ChatFormat(tokenizer), cache_dir, log=lambda line: None)
        units = Pairs if kind == "preference" else Sequences
        return config, units.from_cache(cache, args.max_seq_len)


def make_runs(device_name: str) -> tuple[Run, Run, str]:
    """A run in float32, one in the type of two bytes that the device is fast at, and a remark if there is none."""
    device = choose_device(device_name)
    dtype, remark = choose_dtype("bfloat16", device)
    return Run(device, torch.float32), Run(device, dtype), remark
