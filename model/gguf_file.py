"""MiniMind as one GGUF file, for llama.cpp, Ollama and everything that is built on them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors go under llama.cpp's names, and with the
rotary pairs where its architecture turns them: side by side in "llama" and "ernie4_5-moe", half a head apart in "qwen3"
and "qwen3moe". The `gguf` package does the writing and the quantising; it is imported only here.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .architectures import native_architecture
from .layouts import Layout, from_ours, to_ours
from .LMConfig import LMConfig

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "ernie4_5_moe": "ernie4_5-moe", "qwen3_moe": "qwen3moe"}
"""model_type of transformers -> llama.cpp's name."""

ROUNDING = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}
"""How a number may be stored, and the most that this moves it, as a share of the largest number of its row."""
QUANTISATIONS = tuple(ROUNDING)
BLOCK = 32  # numbers that share a scale in q8_0 and q4_0: rows must be multiples

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = {"smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}, "gpt-2": _BYTES}
"""llama.cpp's name -> how a tokenizer of Hugging Face splits text into words before merging; MiniMind's until ours."""

# Parts of a tokenizer of Hugging Face that change the ids and that GGUF cannot hold: None, False and "" are all "none".
_NOT_IN_GGUF = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_NOT_IN_ADDED = ("single_word", "lstrip", "rstrip")

_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.{layer}.input_layernorm.weight": "blk.{layer}.attn_norm.weight",
    "model.layers.{layer}.post_attention_layernorm.weight": "blk.{layer}.ffn_norm.weight",
    "model.layers.{layer}.self_attn.q_proj.weight": "blk.{layer}.attn_q.weight",
    "model.layers.{layer}.self_attn.k_proj.weight": "blk.{layer}.attn_k.weight",
    "model.layers.{layer}.self_attn.v_proj.weight": "blk.{layer}.attn_v.weight",
    "model.layers.{layer}.self_attn.o_proj.weight": "blk.{layer}.attn_output.weight",
    "model.layers.{layer}.self_attn.q_norm.weight": "blk.{layer}.attn_q_norm.weight",
    "model.layers.{layer}.self_attn.k_norm.weight": "blk.{layer}.attn_k_norm.weight",
    "model.layers.{layer}.mlp.gate_proj.weight": "blk.{layer}.ffn_gate.weight",
    "model.layers.{layer}.mlp.up_proj.weight": "blk.{layer}.ffn_up.weight",
    "model.layers.{layer}.mlp.down_proj.weight": "blk.{layer}.ffn_down.weight",
    "model.layers.{layer}.mlp.gate.weight": "blk.{layer}.ffn_gate_inp.weight",
    "model.layers.{layer}.mlp.experts.gate_proj": "blk.{layer}.ffn_gate_exps.weight",
    "model.layers.{layer}.mlp.experts.up_proj": "blk.{layer}.ffn_up_exps.weight",
    "model.layers.{layer}.mlp.experts.down_proj": "blk.{layer}.ffn_down_exps.weight",
    "model.layers.{layer}.mlp.shared_experts.gate_proj.weight": "blk.{layer}.ffn_gate_shexp.weight",
    "model.layers.{layer}.mlp.shared_experts.up_proj.weight": "blk.{layer}.ffn_up_shexp.weight",
    "model.layers.{layer}.mlp.shared_experts.down_proj.weight": "blk.{layer}.ffn_down_shexp.weight",
}


def gguf_architecture(config: LMConfig) -> str:
    """llama.cpp's architecture that computes what this configuration says. Raises ValueError if there is none."""
    if config.use_moe and config.num_experts_per_tok == 1 and config.n_shared_experts:
        raise ValueError("llama.cpp does not know ernie4_5-moe with one expert per token: num_experts_per_tok is 1")
    if config.use_moe and not config.norm_topk_prob:
        raise ValueError("llama.cpp normalises the weights of a token's experts: norm_topk_prob is False")
    scaling = config.rope_scaling or {}
    for name, only in (("beta_fast", 32), ("beta_slow", 1)):  # it has keys for them, and reads them for other models
        if (value := scaling.get(name, only)) != only:
            raise ValueError(
                f"llama.cpp computes yarn with {name} {only} here: rope_scaling has {value}; convert to a folder"
            )
    trained = scaling.get("original_max_position_embeddings", config.max_seq_len)
    if trained != int(trained):
        raise ValueError(
            f"GGUF holds original_max_position_embeddings as a whole number: rope_scaling has {trained}; "
            "convert to a folder"
        )
    return ARCHITECTURES[native_architecture(config)]


def write_gguf(
    path: Path, config: LMConfig, tensors: dict[str, Tensor], tokenizer, quantisation: str, name: str = "MiniMind"
) -> None:
    """Write one file, all or nothing.

    Args:
        tensors: in our layout; matrices are stored as `quantisation` says, norms and routers as float32. With q4_0 the
            embedding, which is the output matrix too, is stored as q8_0.
        tokenizer: byte-level BPE, of transformers.

    Raises:
        ValueError: no architecture of llama.cpp computes the same; GGUF cannot hold all of the tokenizer; or rows that
            are no multiple of 32 in q8_0, q4_0.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    import gguf

    architecture = gguf_architecture(config)
    kind = gguf.GGMLQuantizationType[quantisation.upper()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, architecture)
    try:
        _add_sizes(writer, config, architecture, name)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        is_whole = kind.name in ("F32", "F16", "BF16")
        file_type = "ALL_F32" if quantisation == "f32" else f"MOSTLY_{quantisation.upper()}"
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor_name, tensor in _named_for_llama_cpp(tensors, config, architecture).items():
            array = tensor.detach().float().numpy()
            stored = gguf.GGMLQuantizationType.F32
            if array.ndim > 1 and not tensor_name.endswith("ffn_gate_inp.weight"):
                is_embedding = tensor_name == "token_embd.weight"
                stored = gguf.GGMLQuantizationType.Q8_0 if is_embedding and quantisation == "q4_0" else kind
            if not is_whole and array.ndim > 1 and array.shape[-1] % BLOCK:
                raise ValueError(
                    f"{tensor_name} has rows of {array.shape[-1]} numbers, and {quantisation} takes blocks of {BLOCK}: "
                    "use f16, or a model whose dim and hidden_dim are multiples of 32"
                )
            writer.add_tensor(tensor_name, gguf.quants.quantize(array, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(f"{path.name}: {error}; make room or pass another place") from error  # NumPy's words
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def open_gguf(path: Path):
    """The reader of the `gguf` package, which ends where the file ends.

    Its own takes what is declared for what is there: a list of 2**40 numbers in a file of 60 bytes is a loop of hours.

    Raises:
        ValueError, LookupError, ...: it is no GGUF file, cut off or damaged (UNREADABLE of common/tensor_files.py).
    """
    import gguf

    class Bounded(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            end = offset + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it declares {end} bytes or more, and has {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

    return Bounded(path)


def read_gguf_tensors(path: Path, config: LMConfig) -> dict[str, Tensor]:
    """The tensors of a file that `write_gguf` wrote, in our layout, as float32: what llama.cpp computes with.

    Raises:
        ValueError: it is no GGUF file, or of another architecture.
    """
    import gguf

    reader = open_gguf(path)
    architecture = gguf_architecture(config)
    if (found := reader.fields["general.architecture"].contents()) != architecture:
        raise ValueError(f"{path} is of architecture {found}, not {architecture}")
    tensors = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: the file is mapped
    for name in [name for name in tensors if name.endswith("exp_probs_b.bias")]:
        if tensors.pop(name).any():
            raise ValueError(f"{name} is not zero, and MiniMind's router has no such part: this is another model")
    return to_ours(tensors, _layout(architecture), config.head_dim)


def check_rounding(read: dict[str, Tensor], written: dict[str, Tensor], quantisation: str) -> None:
    """Raises ValueError if a number that was read is further from the one written than its type rounds.

    Both are in our layout. A block of q8_0 or q4_0 is a part of a row, so its largest number is at most the row's.
    """
    for name, tensor in written.items():
        allowed = ROUNDING[quantisation] * tensor.abs().amax(dim=-1, keepdim=True)
        if quantisation != "f32":
            allowed = allowed + 127 * 2.0**-25  # the smallest step of float16, in which blocks hold their scale
        if not ((read[name] - tensor).abs() <= allowed).all():  # NaN is no smaller either
            raise ValueError(f"{name} would hold other numbers than {quantisation} rounds to: nothing is left of it")


def modelfile(gguf_name: str, context: int, bos: str, eos: str) -> str:
    """Ollama's Modelfile beside a GGUF file: the chat format as a Go template, what ends an answer, how to sample.

    `bos` and `eos` are the tokenizer's tokens around a message.
    """
    turns = "".join(
        f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{bos}{role}\n{{{{ .Content }}}}{eos}\n'
        for i, role in enumerate(("system", "user", "assistant"))
    )
    return (
        f"FROM ./{gguf_name}\n"
        f'TEMPLATE """{{{{- range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{bos}assistant\n"""\n'
        f'PARAMETER stop "{eos}"\nPARAMETER stop "{bos}"\n'
        f"PARAMETER num_ctx {context}\nPARAMETER temperature 0.85\nPARAMETER top_p 0.85\n"
    )


def _layout(architecture: str) -> Layout:
    pairs = architecture in ("llama", "ernie4_5-moe")
    return Layout("gguf", _MODEL, r"^token_embd\.", pairs=pairs)


def _named_for_llama_cpp(tensors: dict[str, Tensor], config: LMConfig, architecture: str) -> dict[str, Tensor]:
    """Under llama.cpp's names; without the output matrix, which is the embedding."""
    kept = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    named = from_ours(kept, _layout(architecture), config.head_dim)
    if architecture == "ernie4_5-moe":  # its router adds a bias when it chooses: none here
        for layer in range(config.n_layers):
            named[f"blk.{layer}.exp_probs_b.bias"] = torch.zeros(config.n_routed_experts)
    return named


def _add_sizes(writer, config: LMConfig, architecture: str, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    if architecture.startswith("qwen3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture == "ernie4_5-moe":
        writer.add_expert_shared_count(1)
        writer.add_expert_shared_feed_forward_length(config.intermediate_size)
        writer.add_interleave_moe_layer_step(1)
        writer.add_leading_dense_block_count(0)
    _add_rope_scaling(writer, config)


def _add_rope_scaling(writer, config: LMConfig) -> None:
    import gguf

    scaling = config.rope_scaling
    if scaling is None:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings", config.max_seq_len)))
        if "attention_factor" in scaling:
            relative = scaling["attention_factor"] / paper_attention_factor(scaling["factor"])
            writer.add_rope_scaling_attn_factors(relative)


def paper_attention_factor(factor: float) -> float:
    """Yarn's factor for cos and sin (arXiv 2309.00071 eq. 22); llama.cpp multiplies the one in a file by it."""
    return 0.1 * math.log(factor) + 1.0


def _name_of_splitting(pre_tokenizer: dict | None) -> str:
    """llama.cpp's name for how text is split before merging. Raises ValueError where it has none that we know."""
    for name, known in PRE_TOKENIZERS.items():
        if pre_tokenizer == known:
            return name
    raise ValueError(
        f"the tokenizer splits text as {json.dumps(pre_tokenizer)}, for which no name of llama.cpp is known; "
        f"known are {', '.join(PRE_TOKENIZERS)}"
    )


def _refuse_what_gguf_lacks(content: dict, tokenizer) -> None:
    """Raises ValueError for a part of a tokenizer (its tokenizer.json) that would be lost, and with it the ids."""
    model = content["model"]
    lost = [f"{name} {model[name]!r}" for name in _NOT_IN_GGUF if model.get(name)]
    if model["type"] != "BPE":
        lost.append(f"a model of type {model['type']}")
    if content["normalizer"] is not None:
        lost.append(f"the normalizer {json.dumps(content['normalizer'], ensure_ascii=False)}")
    if tokenizer.num_special_tokens_to_add():
        lost.append("a post_processor that adds tokens to a text")
    for token in content["added_tokens"]:
        lost += [f"{name} of {token['content']}" for name in _NOT_IN_ADDED if token[name]]
    if lost:
        raise ValueError(f"GGUF cannot hold this of the tokenizer: {'; '.join(lost)}. Convert to a folder")


def _add_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """Byte-level BPE, with names for the rows of the embedding that have no token: llama.cpp wants one for each.

    The id of a token is its place in the list: with tokens 0, 1 and 3 the list is [t0, t1, "[PAD2]", t3].
    Tags such as <think> are tokens that a prompt may hold as text, control tokens are not."""
    import gguf

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_what_gguf_lacks(content, tokenizer)
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    tokens = [f"[PAD{row}]" for row in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in tokenizer.get_vocab().items():
        if number >= vocab_size:
            raise ValueError(f"the tokenizer's {token!r} is number {number}, and the model has {vocab_size} tokens")
        if types[number] != gguf.TokenType.UNUSED:
            raise ValueError(f"the tokenizer's {token!r} and {tokens[number]!r} are both number {number}")
        tokens[number] = token
        if token not in special:
            types[number] = gguf.TokenType.NORMAL
        else:
            types[number] = gguf.TokenType.CONTROL if special[token] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_of_splitting(content["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
