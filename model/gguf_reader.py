"""MiniMind out of a GGUF file: configuration, tensors and tokenizer, as gguf_file.py wrote them or as llama.cpp does.

The architectures are those of many other models. One of these is MiniMind if all that its metadata say has a place in
LMConfig: any setting more is a part that MiniMind does not have. Quantised tensors become float32, with the numbers
that llama.cpp computes with.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.flags import is_installed
from common.tensor_files import UNREADABLE, first_line

from .gguf_file import ARCHITECTURES, PRE_TOKENIZERS, read_gguf_tensors
from .LMConfig import LMConfig

# Metadata under the architecture's name -> field of LMConfig.
FIELDS = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "feed_forward_length": "hidden_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "context_length": "max_seq_len",
    "rope.freq_base": "rope_theta",
}
EXPERT_FIELDS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "hidden_dim",
}
SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}


def gguf_config(path: Path) -> LMConfig:
    """The configuration of the model in a GGUF file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or another model than MiniMind: says which, and what of it MiniMind does not have.
    """
    architecture, found = _metadata(path)
    if architecture not in ARCHITECTURES.values():
        raise ValueError(
            f"{path} is a model of architecture {architecture!r}, and no MiniMind: those in GGUF are of "
            f"{', '.join(ARCHITECTURES.values())}"
        )
    prefix = f"{architecture}."
    settings = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    tokens = found.get("tokenizer.ggml.tokens", ())
    is_mixture = architecture in ("ernie4_5-moe", "qwen3moe")
    fields = {
        "vocab_size": settings.pop("vocab_size", len(tokens)),
        "qk_norm": architecture.startswith("qwen3"),
        "use_moe": is_mixture,
    }
    if is_mixture:
        fields["n_shared_experts"] = architecture == "ernie4_5-moe"
    for key, field in {**FIELDS, **(EXPERT_FIELDS if is_mixture else {})}.items():
        if key not in settings:
            raise ValueError(f"{path} does not say {prefix}{key}: it is no whole model")
        fields[field] = settings.pop(key)
    scaling = {name: settings.pop(key) for key, name in SCALING.items() if key in settings}
    if scaling.get("rope_type", "none") != "none":
        fields["rope_scaling"] = scaling
    for name in ("norm_eps", "rope_theta"):  # stored as float32: 1e-5 came back as 9.99999974e-06
        fields[name] = float(f"{fields[name]:.7g}")
    try:
        config = LMConfig(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no MiniMind: {first_line(error)}") from error
    expected = _implied(config, architecture)
    odd = [
        f"{prefix}{key} is {value!r}" + (f", not {expected[key]!r}" if key in expected else "")
        for key, value in settings.items()
        if key not in expected or value != expected[key]
    ]
    if odd:
        raise ValueError(f"{path} is another {architecture} than MiniMind: {'; '.join(odd)}")
    return config


def gguf_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a GGUF file, in our layout, as float32. Raises what `gguf_config` raises."""
    config = gguf_config(path)
    try:
        return read_gguf_tensors(path, config)
    except NotImplementedError as error:
        raise ValueError(f"{path} is quantised in a way that cannot be read here: {first_line(error)}") from error
    except UNREADABLE as error:
        raise ValueError(f"{path}: {first_line(error)}") from error


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with its chat template.

    Raises:
        ValueError: it is none of the kind that MiniMind has, byte-level BPE; or damaged.
    """
    _, found = _metadata(path)
    kind, split = found.get("tokenizer.ggml.model"), found.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path} has a tokenizer of kind {kind!r} with words split as in {split!r}; MiniMind's is 'gpt2' with one "
            f"of {', '.join(PRE_TOKENIZERS)}: pass its directory with --tokenizer_path"
        )
    import gguf

    types = gguf.TokenType
    try:
        tokens = dict(enumerate(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True)))
        used = {number: (token, kind) for number, (token, kind) in tokens.items() if kind != types.UNUSED}
        added = [
            {
                **{"id": number, "content": token, "special": kind in (types.CONTROL, types.UNKNOWN)},
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for number, (token, kind) in used.items()
            if kind in (types.CONTROL, types.UNKNOWN, types.USER_DEFINED)
        ]
        content = {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": PRE_TOKENIZERS[split],
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": {token: number for number, (token, _) in used.items()},
                "merges": [merge.split(" ") for merge in found["tokenizer.ggml.merges"]],
            },
        }
        control = {
            f"{name}_token": tokens[found[f"tokenizer.ggml.{key}_token_id"]][0]
            for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
            if f"tokenizer.ggml.{key}_token_id" in found
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)),
            chat_template=found.get("tokenizer.chat_template"),
            name_or_path=str(path),
            clean_up_tokenization_spaces=False,
            **control,
        )
    except Exception as error:  # tokenizers raises nothing more exact
        raise ValueError(f"the tokenizer in {path} is damaged ({type(error).__name__}: {first_line(error)})") from error


def _metadata(path: Path) -> tuple[str, dict[str, object]]:
    """The architecture of a GGUF file, and its metadata."""
    if not is_installed("gguf"):
        raise ValueError(f"{path}: the package that reads it is missing; pip install gguf")
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: check the path")
    import gguf

    try:
        found = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
        return str(found["general.architecture"]), found
    except UNREADABLE as error:
        raise ValueError(f"{path} is no GGUF file, or cut off or damaged ({first_line(error)})") from error


def _implied(config: LMConfig, architecture: str) -> dict[str, object]:
    """Settings that follow from the others in a MiniMind, and may be written down all the same."""
    implied = {
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.scaling.type": "none",
    }
    if architecture == "ernie4_5-moe":
        implied |= {
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": config.intermediate_size,
            "interleave_moe_layer_step": 1,
            "leading_dense_block_count": 0,
        }
    return implied
