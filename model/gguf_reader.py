"""MiniMind out of a GGUF file: configuration, tensors and tokenizer, as gguf_file.py wrote them or as llama.cpp does.

The architectures are those of many other models. One of these is MiniMind if all that its metadata say has a place in
LMConfig: any setting more is a part that MiniMind does not have. Quantised tensors become float32, with the numbers
that llama.cpp computes with.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.flags import is_installed
from common.tensor_files import UNREADABLE, first_line

from .gguf_file import ARCHITECTURES, PRE_TOKENIZERS, open_gguf, paper_attention_factor, read_gguf_tensors
from .LMConfig import LMConfig, config_fields
from .rotary import rotary_frequencies

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
ATTENTION_FACTOR = "rope.scaling.attn_factor"

# Fields that say how to train or run, and those that are compared as what follows from them.
NOT_COMPARED = (
    *("hidden_dim", "multiple_of", "rope_theta", "rope_scaling", "norm_eps", "scoring_func"),
    *("dropout", "flash_attn", "aux_loss_alpha", "seq_aux", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # the tokenizer's are compared
)
ONLY_IN_MIXTURES = ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob")


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
    try:
        for name in ("norm_eps", "rope_theta"):
            fields[name] = _decimal(fields[name])
        if "factor" in scaling:
            scaling = {"rope_type": "linear", **scaling, "factor": _decimal(scaling["factor"])}  # llama.cpp's default
            if scaling["rope_type"] == "yarn" and ATTENTION_FACTOR in settings:
                relative = settings.pop(ATTENTION_FACTOR)
                scaling["attention_factor"] = _decimal(relative * paper_attention_factor(scaling["factor"]))
        if scaling.get("rope_type", "none") != "none":
            fields["rope_scaling"] = scaling
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


def check_gguf(path: Path, config: LMConfig, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Read a GGUF file as if nothing were known of it, and compare with what was to be written.

    Raises:
        ValueError: its configuration computes something else, or its tokenizer makes other tokens out of `text` and all
            added tokens: says what was lost.
    """
    read, read_tokenizer = gguf_config(path), gguf_tokenizer(path)
    fields, read_fields = _computed(config), _computed(read)
    lost = [f"{name} {value}, now {read_fields[name]}" for name, value in fields.items() if value != read_fields[name]]
    if not math.isclose(config.norm_eps, read.norm_eps, rel_tol=1e-6):
        lost.append(f"norm_eps {config.norm_eps}, now {read.norm_eps}")
    (angles, factor), (read_angles, read_factor) = (rotary_frequencies(c, torch.device("cpu")) for c in (config, read))
    same_angles = torch.allclose(angles, read_angles, rtol=1e-5, atol=0)
    if not same_angles or not math.isclose(factor, read_factor, rel_tol=1e-6):
        before, after = ((c.rope_theta, c.rope_scaling) for c in (config, read))
        lost.append(f"rope_theta and rope_scaling {before}, now {after}")
    sample = text + " ".join(tokenizer.get_added_vocab()) + text
    parts = {
        "the numbers of its tokens": lambda t: t.get_vocab(),
        "its added tokens": lambda t: {n: (a.content, a.special) for n, a in t.added_tokens_decoder.items()},
        "its merges": lambda t: json.loads(t.backend_tokenizer.to_str())["model"]["merges"],
        "the tokens of a text": lambda t: t.encode(sample),
        "the text of tokens": lambda t: t.decode(tokenizer.encode(sample)),
        "its control tokens": lambda t: (t.bos_token_id, t.eos_token_id, t.unk_token_id, t.pad_token_id),
        "its chat template": lambda t: t.chat_template or None,
    }
    lost += [f"the tokenizer: {name}" for name, part in parts.items() if part(tokenizer) != part(read_tokenizer)]
    if lost:
        raise ValueError(f"{path.name} would not hold all of the model, lost: {'; '.join(lost)}. Nothing is left of it")


def _computed(config: LMConfig) -> dict[str, object]:
    """The settings that must come back as they were."""
    fields = {**config_fields(config), "intermediate_size": config.intermediate_size}
    left_out = NOT_COMPARED if config.use_moe else NOT_COMPARED + ONLY_IN_MIXTURES
    return {name: value for name, value in fields.items() if name not in left_out}


def _decimal(value: float) -> float:
    """What a float32 was before it was stored: 1e-5 came back as 9.99999974e-06."""
    return float(f"{value:.7g}")


def _metadata(path: Path) -> tuple[str, dict[str, object]]:
    """The architecture of a GGUF file, and its metadata."""
    if not is_installed("gguf"):
        raise ValueError(f"{path}: the package that reads it is missing; pip install gguf")
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: check the path")
    try:
        found = {name: field.contents() for name, field in open_gguf(path).fields.items()}
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
