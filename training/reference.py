"""What the model that training starts from says about every pair: computed once, before training, and kept on disk.

The reference model of DPO never changes, so two numbers a pair replace its forward in every step, and its memory.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from common.tensor_files import UnreadableFile, atomic_save, digest, read_torch_file
from dataset.batching import Pairs, plan_batches, tokens_per_batch

from .inputs import Data
from .losses import answer_logprobs
from .processes import Run


def reference_logprobs(run: Run, model: nn.Module, data: Data, cache_dir: str, max_seq_len: int) -> Tensor:
    """Log-probabilities of both answers of every pair under ``model`` as it is now, on the device.

    Kept in ``{cache_dir}/reference-{key}.pt``; the key is a hash of the weights, the data, the pairs that
    ``max_seq_len`` leaves and the precision, so it is never stale. The ranks share the work.
    Returns: (P, 2) float32, chosen and rejected, indexed by a pair's number in the file; zeros for pairs left out.
    Raises: OSError when there is no room for it: before the work, which may take an hour.
    """
    weights = digest(model.state_dict(), model.config.to_json_string())
    identity = f"{weights} {data.fingerprint} {max_seq_len} {run.dtype}"
    path = Path(cache_dir) / f"reference-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt"
    units = [part for part in (data.train, data.heldout) if len(part)]
    table = torch.zeros(1 + max(int(part.pairs.max()) for part in units), 2, device=run.device)
    cached = _read(path, table.shape, run) if run.is_main else None
    if run.from_main(cached is not None):
        return run.sum_over_ranks(table if cached is None else cached.to(run.device))

    if problem := run.from_main(_why_no_room(path, table) if run.is_main else None):
        raise OSError(problem)
    model.to(run.device).eval()
    for part in units:
        fill_logprobs(run, model, part, table)
    table = run.sum_over_ranks(table)
    if run.is_main:
        run.log(f"参考模型: 已计算 {sum(map(len, units))} 对回答的对数概率, 缓存于 {path}")
        try:
            atomic_save(table.cpu(), path)
        except OSError as error:
            run.log(f"!!! {path} could not be written: {error}; the next run computes it again")
    return table


def _why_no_room(path: Path, table: Tensor) -> str | None:
    """Try to write a table as large as this one; why it failed, or None."""
    trial = path.with_suffix(".trial")
    try:
        atomic_save(table.cpu(), trial)
    except OSError as error:
        return f"cannot write to {path.parent}: {error}. Make room, or point --cache_dir elsewhere"
    trial.unlink()
    return None


@torch.no_grad()
def fill_logprobs(run: Run, model: nn.Module, pairs: Pairs, table: Tensor) -> None:
    """Write the log-probabilities of this rank's share of ``pairs`` into their rows of ``table`` (P, 2)."""
    budget = tokens_per_batch(32, pairs.lengths)
    collate = run.pinned(pairs.collate)
    for ids in plan_batches(pairs.lengths, budget, seed=0, epoch=0)[run.rank :: run.world_size]:
        batch = run.to_device(collate(ids))
        with run.autocast():
            output = model(batch["input_ids"], lengths=batch["lengths"], supervised=batch["positions"])
        table[batch["pairs"]] = answer_logprobs(output.logits, batch).view(2, -1).T


def _read(path: Path, shape: torch.Size, run: Run) -> Tensor | None:
    """The cached table, or None where there is none that can be used."""
    if not path.is_file():
        return None
    try:
        table = read_torch_file(path)
    except (OSError, UnreadableFile) as error:
        run.log(f"{path} cannot be read ({error}): computing it again")
        return None
    if not isinstance(table, Tensor) or table.shape != shape or table.dtype != torch.float32:
        run.log(f"{path} holds something else than a float32 table {tuple(shape)}: computing it again")
        return None
    return table
