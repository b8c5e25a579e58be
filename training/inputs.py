"""What a stage starts from: weights (``--from_weight``) and data (``--data_path``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.batching import Pairs, Sequences
from dataset.token_cache import open_token_cache
from model.chat_format import ChatFormat
from model.LMConfig import LMConfig
from model.loading import new_model, require_weights
from model.opening import load_weights
from model.record import describe_file, tokenizer_remark
from model.vocabulary import tokenizer_of, with_token_ids

from .cli import config_from
from .memory import refuse_a_model_that_cannot_fit
from .processes import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model.model import MiniMindForCausalLM


def starting_tokenizer(args) -> PreTrainedTokenizerBase:
    """The tokenizer of the weights that training starts from, or the one that ``--tokenizer_path`` names.

    Raises: FileNotFoundError, ValueError: it is not there, or not theirs; the message names the remedy.
    """
    return tokenizer_of(args.start_weights, args.config.vocab_size, args.tokenizer_path)


def starting_model(args, tokenizer: PreTrainedTokenizerBase, is_trained: bool = True) -> MiniMindForCausalLM:
    """The model that training starts from: random weights, or those that ``args.from_weight`` names.

    A name is a stage's (``pretrain`` is ``{out_dir}/pretrain_{dim}[_moe].pth``), or a file or folder: see opening.py.
    Args: is_trained: all its weights will be trained, not an adapter's alone.
    Raises: FileNotFoundError, ValueError: no such file, weights of another size, or a model that does not fit into
        memory; the message names the remedy.
    """
    rows = len(tokenizer) if args.start_weights is None else args.config.vocab_size
    config = with_token_ids(config_from(args, vocab_size=rows), tokenizer)
    return model_from(args, config, args.start_weights, is_trained)


def model_from(args, config: LMConfig, weights: Path | None, is_trained: bool) -> MiniMindForCausalLM:
    """A model with the weights that lie at a path, or random ones; raises what ``starting_model`` raises."""
    if weights is not None:
        require_weights(weights, config)
    refuse_a_model_that_cannot_fit(args, config, is_trained)
    model = new_model(config)
    if weights is not None:
        load_weights(model, weights)
    return model


FEW_HELD_OUT = 10  # rows


@dataclass
class Data:
    """Training and held-out units (sequences, or preference pairs), and what identifies their content."""

    train: Sequences | Pairs
    heldout: Sequences | Pairs
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase | None = None


def load_data(run: Run, args, chat: ChatFormat, kind: str, *, path: str | None = None) -> Data:
    """Tokenise ``args.data_path`` (or find its cache), cut to ``args.max_seq_len``, hold out ``args.heldout_share``.

    Rank 0 builds the cache; all ranks map the same file into memory.
    Args:
        kind: 'text', 'chat' or 'preference' (dataset/readers.py).
        path: another file than ``args.data_path``.
    Raises: FileNotFoundError, ValueError: the file is missing, unusable, or nothing in it fits max_seq_len.
    """
    path = path or args.data_path
    if args.start_weights and (remark := tokenizer_remark(args.start_weights, chat.fingerprint())):
        run.log(remark)
    with run.main_first():
        cache = open_token_cache(path, kind, chat, args.cache_dir, on_bad_line=args.on_bad_line, log=run.log)
    content = cache.path.name.rpartition("-")[2]  # of the data: the file may be renamed
    contents = run.gather(content)
    if other := [rank for rank in range(len(contents)) if contents[rank] != contents[0]]:
        raise ValueError(f"{path} is another file for rank {other[0]} than for rank 0: copy it there again")
    run.log(
        f"数据: --max_seq_len {args.max_seq_len}; 若像原版每行都补齐到这么长, "
        f"填充占 {cache.fixed_padding(args.max_seq_len):.1%}"
    )
    units = (Pairs if kind == "preference" else Sequences).from_cache(cache, args.max_seq_len)
    if units.dropped:
        rows = units.dropped + len(units)
        run.log(f"{units.dropped} of {rows} rows do not fit --max_seq_len {args.max_seq_len} and are left out")
    train, heldout = units.split(args.heldout_share, args.seed)
    if not len(train):
        raise ValueError(f"{path}: no row can be trained on at --max_seq_len {args.max_seq_len}; raise it, or add data")
    if args.heldout_share and len(heldout) < FEW_HELD_OUT:
        run.log(
            f"!!! {len(train)} rows to train on and {len(heldout)} held out: "
            + ("a held-out loss of so few may be chance" if len(heldout) else "there is no held-out loss")
            + f"; raise --heldout_share {args.heldout_share:g}, or add rows"
        )
    return Data(train, heldout, content, chat.tokenizer)


def origin(args, data: Data) -> dict[str, object]:
    """Where the weights that a run will write come from: what the record beside them says of it."""
    return {
        "stage": args.stage,
        "started_from": describe_file(args.start_weights) if args.start_weights else None,
        "data": {
            "path": args.data_path,
            "fingerprint": data.fingerprint,
            "rows_trained_on": len(data.train),
            "rows_held_out": len(data.heldout),
            "max_seq_len": args.max_seq_len,
        },
        "tokenizer": ChatFormat(data.tokenizer).fingerprint() if data.tokenizer else None,
    }
