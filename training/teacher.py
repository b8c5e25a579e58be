"""The teacher of distillation: where it comes from, and what it says at the supervised positions."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.folders import load_directory
from model.LMConfig import LMConfig, config_fields
from model.model import MiniMindForCausalLM
from model.moe import Experts

from .inputs import model_from
from .losses import supervised_forward


def load_teacher(args, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The teacher that the flags name: a stage's weights, or with ``--teacher_path`` any causal model of transformers.

    Raises: FileNotFoundError, ValueError: it is not there, or its vocabulary is not ours.
    """
    if args.teacher_path is None:
        config = LMConfig(**{**config_fields(args.teacher_config), "vocab_size": len(tokenizer)})
        try:
            return model_from(args, config, args.teacher_weights, is_trained=False)
        except (FileNotFoundError, ValueError) as error:
            flags = "--teacher_dim, --teacher_n_layers and --teacher_use_moe give the teacher's size"
            raise type(error)(f"the teacher: {error}\n{flags}") from error
    teacher, its_tokenizer = load_directory(args.teacher_path)
    ours, theirs = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    if theirs != ours or teacher.config.vocab_size != len(ours):
        same = sum(theirs.get(token) == i for token, i in ours.items())
        raise ValueError(
            f"--teacher_path {args.teacher_path}: the teacher knows {same} of the {len(ours)} tokens of our tokenizer "
            f"by the same number, and its logits are {teacher.config.vocab_size} wide. Distillation compares "
            "probabilities token by token, so the vocabularies must be equal: train a teacher with our tokenizer, or "
            "let the teacher write answers and learn from these with train_full_sft.py"
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
    if isinstance(teacher, MiniMindForCausalLM):
        return supervised_forward(teacher, batch).logits
    return teacher(batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["positions"]]
