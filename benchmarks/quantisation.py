"""What storing a model in fewer bits costs: bits per byte in llama.cpp, of f32, f16, q8_0 and q4_0.

    python -m benchmarks.quantisation --weights out/pretrain_512.pth --data_path dataset/heldout.jsonl
    python -m benchmarks.quantisation --weights MiniMind2 --data_path dataset/heldout_chat.jsonl --kind chat

llama.cpp is given every text token by token and asked for the log-probability of the token that follows; the embedding
of q4_0 is stored as q8_0, as scripts/convert_model.py does. "+-" is the standard error of the difference to
f32, whose texts are the same.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.llama_cpp import LlamaCpp
from benchmarks.machine import describe_machine
from dataset.batching import Sequences
from dataset.token_cache import open_token_cache
from model.chat_format import ChatFormat
from model.gguf_file import write_gguf
from model.opening import Source, open_model

STORED = ("f32", "f16", "q8_0", "q4_0")


def read_sequences(args, source: Source) -> list[tuple[list[int], list[int]]]:
    """The first tokens of each sequence, up to its last target, and where its targets are (index of the token)."""
    with tempfile.TemporaryDirectory() as cache_dir:
        chat_format = ChatFormat(source.tokenizer)
        cache = open_token_cache(args.data_path, args.kind, chat_format, cache_dir, log=lambda line: None)
        sequences = Sequences.from_cache(cache, args.max_seq_len)
        found, targets = [], 0
        for i in range(len(sequences)):
            if targets >= args.targets:
                break
            batch = sequences.collate(np.array([i]))
            positions = (batch["positions"] + 1).tolist()
            ids = batch["input_ids"][0, : int(batch["lengths"][0])].tolist() + [int(batch["targets"][-1])]
            found.append((ids, positions))
            targets += len(positions)
    return found


def our_nats(source: Source, sequences: list) -> np.ndarray:
    """Negative log-probability of each sequence's targets, by our own forward pass in float32."""
    model = source.model()
    nats = []
    with torch.no_grad():
        for ids, positions in sequences:
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats.append(-sum(float(logprobs[at - 1, ids[at]]) for at in positions))
    return np.array(nats)


def llama_cpp_nats(path: Path, sequences: list, args) -> np.ndarray:
    """The same by llama.cpp."""
    server = LlamaCpp(path, context=args.max_seq_len + 8, threads=args.threads)
    return np.array([-sum(server.logprob(ids[:at], ids[at]) for at in positions) for ids, positions in sequences])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a .pth file or a model folder")
    parser.add_argument("--data_path", required=True, help="jsonl that the model was not trained on")
    parser.add_argument("--kind", choices=("text", "chat"), default="text", help="what its rows hold")
    parser.add_argument("--targets", type=int, default=2000, help="tokens to predict")
    parser.add_argument("--max_seq_len", type=int, default=256, help="longest sequence")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    source = open_model(args.weights, {})
    sequences = read_sequences(args, source)
    token_bytes = ChatFormat(source.tokenizer).token_bytes()
    sizes = np.array([sum(token_bytes[ids[at]] for at in positions) for ids, positions in sequences])
    print(describe_machine(torch.device("cpu")))
    print(f"{len(sequences)} sequences, {sum(len(p) for _, p in sequences)} targets, {sizes.sum()} bytes")
    per_byte = math.log(2) * sizes.sum()
    print(f"ours, float32: {our_nats(source, sequences).sum() / per_byte:.4f} bits per byte")
    reference = None
    for stored in STORED:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            write_gguf(path, source.config, source.tensors, source.tokenizer, stored)
            size = path.stat().st_size
            nats = llama_cpp_nats(path, sequences, args)
        reference = nats if reference is None else reference
        difference = nats - reference
        error = difference.std(ddof=1) * math.sqrt(len(sequences)) / per_byte if len(sequences) > 1 else math.nan
        print(
            f"{stored:5} {size / 1e6:7.2f} MB  {nats.sum() / per_byte:.4f} bits per byte, "
            f"{difference.sum() / per_byte:+.4f} +- {error:.4f}  ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
