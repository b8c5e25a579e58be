"""A training run small enough for tests: 20,000 parameters, 60 sequences, no tokenizer, no files but its own."""

import contextlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from dataset.batching import Sequences
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from training.cli import stage_parser
from training.evaluation import Evaluation
from training.inputs import Data
from training.loop import train
from training.losses import next_token_loss
from training.processes import Run, distributed_run

VOCAB = 64


def toy_sequences(count: int = 60, seed: int = 0) -> Sequences:
    """Texts of 4 to 24 tokens that count upwards from a random start: learnable."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 25, count)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    tokens = np.concatenate([(rng.integers(VOCAB) + np.arange(n + 1)) % VOCAB for n in lengths]).astype(np.uint16)
    return Sequences(
        tokens=tokens,
        documents=np.arange(count),
        starts=starts,
        lengths=lengths,
        weights=lengths,
        spans=np.stack([starts + 1, starts + 1 + lengths], axis=1),
        first_spans=np.arange(count),
        span_counts=np.ones(count, dtype=int),
        dropped=0,
    )


def toy_model(seed: int = 0, **changes) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    fields = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": VOCAB, "hidden_dim": 32}
    return MiniMindForCausalLM(LMConfig(**{**fields, **changes}))


def toy_args(out_dir: Path, *flags: str):
    parser = stage_parser("toy", data_path="toy", save_weight="toy")
    size = ["--dim", "16", "--n_layers", "2"]
    defaults = ["--batch_size", "2", "--epochs", "2", "--device", "cpu", "--dtype", "float32", "--num_workers", "0"]
    quiet = ["--save_minutes", "0", "--save_interval", "0", "--eval_interval", "0", "--log_interval", "5"]
    return parser.parse_args([*size, *defaults, *quiet, "--out_dir", str(out_dir), *flags])


def toy_run() -> Run:
    return Run(torch.device("cpu"), torch.float32)


def toy_train(
    out_dir: Path,
    *flags: str,
    run: Run | None = None,
    model: MiniMindForCausalLM | None = None,
    loss_fn=next_token_loss,
    data: Sequences | None = None,
    dropout: float = 0.1,
    draw: bool = False,
) -> MiniMindForCausalLM:
    """Train the toy model as the flags say, by default with dropout, so that random states matter too."""
    torch.set_num_threads(1)  # two threads that wait for each other make a toy 40 times slower on a busy machine
    model = model or toy_model(dropout=dropout)
    sequences = data or toy_sequences()
    args = toy_args(out_dir, *flags)
    run = run or toy_run()
    torch.manual_seed(args.seed + run.rank)
    heldout = toy_sequences(8, seed=1)
    evaluation = SilentEvaluation(heldout, tokenizer=None)
    with contextlib.ExitStack() as patches:
        if not draw:
            patches.enter_context(patch("training.report.plot_log"))
        if loss_fn is not next_token_loss:  # it may count its calls
            patches.enter_context(patch("training.loop.memory_report", return_value=("", 0)))
        train(run, args, model, Data(sequences, heldout, "toy"), loss_fn, evaluation)
    return model


class SilentEvaluation(Evaluation):
    """Measures the held-out loss; bits per byte need a tokenizer, which toys do not have."""

    def measure(self, run, model, loss_fn, tokens_per_batch):
        model.eval()
        batch = self.heldout.collate(np.arange(run.rank, len(self.heldout), run.world_size))
        with torch.no_grad():
            loss, weight, _ = loss_fn(model, batch)
        model.train()
        total = run.sum_over_ranks(torch.stack([loss, weight]))
        return {"heldout_loss": float(total[0] / total[1])}


def toy_process(out_dir: str, *flags: str, **options) -> MiniMindForCausalLM:
    """The same inside a process that a launcher started (RANK, WORLD_SIZE, MASTER_ADDR are set)."""
    with distributed_run(toy_args(Path(out_dir), *flags)) as run:
        return toy_train(Path(out_dir), *flags, run=run, **options)


def same_weights(a: dict, b: dict) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def damaged_copies(good: bytes, count: int, seed: int = 0):
    """`count` copies of a file as a bad disk or a broken download leaves it: bytes flipped, cut off, blocks zeroed."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        copy = bytearray(good)
        start, size = int(rng.integers(len(good))), int(rng.choice([1, 2, 16, 512, 4096]))
        if i % 3 == 0:
            copy[start] ^= int(rng.integers(1, 256))
        elif i % 3 == 1:
            del copy[start:]
        else:
            copy[start : start + size] = bytes(len(copy[start : start + size]))
        if copy != good:  # zeros may have been zeros
            yield bytes(copy)
