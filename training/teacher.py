"""The teacher of distillation: where it comes from, and what it says at the supervised positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.flags import add_bool_flag, non_empty, whole
from model.LMConfig import PUBLISHED, LMConfig
from model.model_flags import settle_model
from model.moe import Experts
from model.opening import is_foreign
from model.vocabulary import tokenizer_of

from .inputs import model_from
from .losses import supervised_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHER = {"dim": 768, "n_layers": 16}  # MiniMind2, the usual one


def add_teacher_flags(group) -> None:
    """The flags that name the teacher; `settle_teacher` understands them."""
    group.add_argument(
        "--teacher_model", choices=sorted(PUBLISHED), metavar="NAME", help="all sizes of a published model"
    )
    group.add_argument("--teacher_dim", "--teacher_hidden_size", type=whole(1, 2**16), help="width of the teacher")
    group.add_argument("--teacher_n_layers", "--teacher_num_layers", type=whole(1, 1000), help="blocks of the teacher")
    add_bool_flag(group, "--teacher_use_moe", default=None, help="the teacher is a mixture of experts")
    group.add_argument(
        "--from_teacher_weight", type=non_empty, default="full_sft", help="like --from_weight, for the teacher"
    )
    group.add_argument(
        "--teacher_path", type=non_empty, metavar="PATH",
        help="or any causal model of transformers with the same tokenizer, in a folder; also a .pth or .gguf file",
    )  # fmt: skip


def settle_teacher(args) -> list[str]:
    """Find the teacher that the flags name; returns what is wrong with it.

    Sets ``teacher_config`` and ``teacher_weights``, and adds remarks about what was assumed.
    """
    problems = []
    if args.from_teacher_weight == "none":
        problems.append("--from_teacher_weight none: a teacher with random weights teaches nothing")
    is_chosen = args.teacher_dim or args.teacher_model or args.teacher_path
    if args.teacher_path and is_foreign(args.teacher_path):
        args.teacher_config, args.teacher_weights = None, Path(args.teacher_path)
        return problems
    weight = Path(args.teacher_path) if args.teacher_path else args.from_teacher_weight
    settled = settle_model(args, weight, prefix="teacher_", sizes=TEACHER)
    args.teacher_config, args.teacher_weights = settled.config, settled.weights
    args.remarks += settled.remarks
    if args.teacher_weights and args.teacher_weights == args.start_weights and not is_chosen:
        problems.append(
            f"the teacher: {args.teacher_weights} is what the student starts from, and no other is there: pass "
            "--teacher_dim, --from_teacher_weight or --teacher_path; or --from_weight none and the student's --dim"
        )
    return problems + [f"the teacher: {problem}" for problem in settled.problems]


def load_teacher(args, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The teacher that the flags name: a MiniMind, or with ``--teacher_path`` any causal model of transformers.

    Args: vocab_size, tokenizer: the student's.
    Raises: FileNotFoundError, ValueError: it is not there, or its vocabulary is not the student's.
    """
    if args.teacher_config is None:
        from model.folders import load_foreign  # and with it a table of every architecture, seldom needed

        teacher, its_tokenizer = load_foreign(args.teacher_weights)
    else:
        try:
            its_tokenizer = tokenizer_of(args.teacher_weights, args.teacher_config.vocab_size)
            teacher = model_from(args, args.teacher_config, args.teacher_weights, is_trained=False)
        except (FileNotFoundError, ValueError) as error:
            flags = "--teacher_dim, --teacher_n_layers and --teacher_use_moe give the teacher's size"
            raise type(error)(f"the teacher: {error}\n{flags}") from error
    ours, theirs = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    if theirs != ours or teacher.config.vocab_size != vocab_size:
        same = sum(theirs.get(token) == i for token, i in ours.items())
        raise ValueError(
            f"the teacher {args.teacher_weights} knows {same} of the student's {len(ours)} tokens by the same number, "
            f"and its logits are {teacher.config.vocab_size} wide, the student's {vocab_size}. Distillation compares "
            "probabilities token by token, so the vocabularies must be equal: train a teacher with the student's "
            "tokenizer, or let the teacher write answers and learn from these with train_full_sft.py"
        )
    return teacher


def freeze(teacher: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The teacher in evaluation mode and without gradients; the matrices of its blocks in ``dtype``.

    Autocast would round them to it in every forward pass. The head stays float32, since it is also the embedding.
    """
    teacher.float().eval().requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.Linear | Experts) and module is not teacher.get_output_embeddings():
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(dtype)
    return teacher


@torch.no_grad()
def teacher_logits(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(N, V) at the supervised positions. Rows are padded on the right, which causality hides: no mask is needed."""
    if isinstance(teacher.config, LMConfig):
        return supervised_forward(teacher, batch).logits
    return teacher(batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["positions"]]
