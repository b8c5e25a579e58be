"""Architectures of transformers that compute exactly what MiniMind computes, and the configurations there and back.

    dense          LlamaForCausalLM, with qk_norm Qwen3ForCausalLM; also Ernie4_5ForCausalLM
    mixture        Ernie4_5_MoeForCausalLM, GraniteMoeSharedForCausalLM, Qwen2MoeForCausalLM
                   without a shared expert and with qk_norm, as minimind-3-moe has it: Qwen3MoeForCausalLM

A model of another architecture is MiniMind if, and only if, its configuration is the one that `to_transformers` makes
of the sizes it has: whatever else it sets is a part that MiniMind does not have. Tensors are layouts.py's business.
"""

from transformers import AutoConfig, PreTrainedConfig

from .LMConfig import LMConfig

# What changes no number of a forward pass, or is decided by whoever loads the model.
IRRELEVANT = {
    *("_name_or_path", "architectures", "transformers_version", "auto_map", "dtype", "torch_dtype", "return_dict"),
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "initializer_range"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "use_cache", "attention_dropout"),
    *("router_aux_loss_coef", "pretraining_tp", "moe_norm_min", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("max_window_layers", "sliding_window", "use_sliding_window", "layer_types", "max_position_embeddings"),
}
MIXTURES = ("ernie4_5_moe", "granitemoeshared", "qwen2_moe", "qwen3_moe")
LAYOUT_OF = {
    **{"llama": "ours", "qwen3": "ours", "ernie4_5": "ernie4_5"},
    **{"ernie4_5_moe": "ernie4_5_moe", "granitemoeshared": "granitemoeshared"},
    **{"qwen2_moe": "qwen2moe", "qwen3_moe": "2025-04"},
}
"""model_type -> name in layouts.LAYOUTS."""
ARCHITECTURES = {
    **{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "ernie4_5": "Ernie4_5ForCausalLM"},
    **{"ernie4_5_moe": "Ernie4_5_MoeForCausalLM", "granitemoeshared": "GraniteMoeSharedForCausalLM"},
    **{"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"},
}
"""model_type -> class in transformers."""


class NotMiniMind(ValueError):
    """A sound model of transformers that computes something else than MiniMind does."""


def native_architecture(config: LMConfig) -> str:
    """The model_type as which a model is exported unless another one is asked for.

    Raises:
        ValueError: no architecture of transformers computes the same.
    """
    for model_type in ("llama", "qwen3", "ernie4_5_moe", "qwen3_moe"):
        if not _obstacles(config, model_type):
            return model_type
    raise ValueError("; ".join(_obstacles(config, "ernie4_5_moe" if config.use_moe else "llama")))


def to_transformers(config: LMConfig, model_type: str) -> PreTrainedConfig:
    """The configuration of another architecture with which it computes what MiniMind with `config` does.

    Raises:
        ValueError: there is none, with every reason.
    """
    if found := _obstacles(config, model_type):
        raise ValueError("; ".join(found))
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": _rope_parameters(config),
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    experts, chosen, width = config.n_routed_experts, config.num_experts_per_tok, config.intermediate_size
    own = {
        "llama": {"head_dim": config.head_dim, "attention_bias": False, "mlp_bias": False},
        "qwen3": {"head_dim": config.head_dim, "attention_bias": False},
        "ernie4_5": {"head_dim": config.head_dim, "use_bias": False},
        "ernie4_5_moe": {
            "use_bias": False,
            # Unused where every layer is a mixture, but llama.cpp's converter divides it by the key/value heads to get
            # the width of the shared expert.
            "intermediate_size": config.n_kv_heads * width,
            "moe_intermediate_size": width,
            "moe_num_experts": experts,
            "moe_k": chosen,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": config.n_layers - 1,
            "moe_layer_interval": 1,
        },
        "granitemoeshared": {
            "attention_bias": False,
            "shared_intermediate_size": width,
            "num_local_experts": experts,
            "num_experts_per_tok": chosen,
            "attention_multiplier": config.head_dim**-0.5,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
        },
        "qwen2_moe": {
            "qkv_bias": True,  # of zeros
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": width,
            "num_experts": experts,
            "num_experts_per_tok": chosen,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "qwen3_moe": {
            "head_dim": config.head_dim,
            "attention_bias": False,
            "moe_intermediate_size": width,
            "num_experts": experts,
            "num_experts_per_tok": chosen,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    }
    return AutoConfig.for_model(model_type, **{**fields, **own[model_type]})


def check_model_type(model_type: str | None) -> None:
    """Raises NotMiniMind for an architecture none of whose models computes what MiniMind does."""
    if model_type not in LAYOUT_OF:
        raise NotMiniMind(f"models of type {model_type!r} are no MiniMind; these can be: {', '.join(LAYOUT_OF)}")


def from_transformers(other: PreTrainedConfig) -> LMConfig:
    """MiniMind's configuration of a model of another architecture.

    Raises:
        NotMiniMind: it computes something else, with each setting that is not MiniMind's.
    """
    model_type = other.model_type
    check_model_type(model_type)
    is_mixture = model_type in MIXTURES
    rope = dict(other.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    fields = {
        "vocab_size": other.vocab_size,
        "dim": other.hidden_size,
        "n_layers": other.num_hidden_layers,
        "n_heads": other.num_attention_heads,
        "n_kv_heads": other.num_key_value_heads,
        "norm_eps": other.rms_norm_eps,
        "max_seq_len": other.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {k: v for k, v in rope.items() if v is not None},
        "qk_norm": model_type in ("qwen3", "qwen3_moe"),
        "use_moe": is_mixture,
        "hidden_dim": other.intermediate_size,
    }
    if is_mixture:
        names = {
            "ernie4_5_moe": ("moe_num_experts", "moe_k"),
            "granitemoeshared": ("num_local_experts", "num_experts_per_tok"),
        }
        experts, chosen = names.get(model_type, ("num_experts", "num_experts_per_tok"))
        if model_type != "granitemoeshared":
            fields["hidden_dim"] = other.moe_intermediate_size
        fields["n_routed_experts"] = getattr(other, experts)
        fields["num_experts_per_tok"] = getattr(other, chosen)
        fields["n_shared_experts"] = model_type != "qwen3_moe"
        fields["norm_topk_prob"] = getattr(other, "norm_topk_prob", True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(token := getattr(other, name), int):
            fields[name] = token
    try:
        config = LMConfig(**fields)
    except ValueError as error:  # a rope_scaling that MiniMind has not, a vocabulary too large
        raise NotMiniMind(f"this {model_type} is no MiniMind: {error}") from error

    expected, has = to_transformers(config, model_type).to_dict(), other.to_dict()
    ignored = IRRELEVANT | {"rope_parameters"}
    if is_mixture and model_type != "granitemoeshared":
        ignored = ignored | {"intermediate_size"}  # of dense layers, and there are none
    differing = [
        f"{name} is {has.get(name)!r}, not {expected[name]!r}"
        for name in sorted(expected.keys() - ignored)
        if has.get(name) != expected[name]
    ]
    if getattr(other, "use_sliding_window", False):
        differing.append("use_sliding_window is True, not False")
    if differing:
        raise NotMiniMind(f"this {model_type} is no MiniMind: {'; '.join(differing)}")
    return config


def _rope_parameters(config: LMConfig) -> dict[str, object]:
    scaling = dict(config.rope_scaling or {"rope_type": "default"})
    kind = scaling.pop("rope_type", None) or scaling.pop("type")
    scaling.pop("type", None)
    return {"rope_type": kind, "rope_theta": config.rope_theta, **scaling}


def _obstacles(config: LMConfig, model_type: str) -> list[str]:
    """Why an architecture cannot compute what this configuration says; empty if it can."""
    found = []
    is_mixture = model_type in MIXTURES
    if config.use_moe != is_mixture:
        found.append(f"{model_type} is {'a mixture of experts' if is_mixture else 'dense'}, and this model is not")
    has_norm = model_type in ("qwen3", "qwen3_moe")
    if config.qk_norm != has_norm:
        found.append(f"{model_type} has {'' if has_norm else 'no '}norms of q and k: qk_norm is {config.qk_norm}")
    if config.use_moe and is_mixture:
        has_shared = model_type != "qwen3_moe"
        if bool(config.n_shared_experts) != has_shared:
            found.append(
                f"{model_type} has {'a' if has_shared else 'no'} shared expert: n_shared_experts is "
                f"{config.n_shared_experts}"
            )
        if not config.norm_topk_prob and model_type != "qwen3_moe":
            found.append(f"{model_type} normalises the weights of the chosen experts: norm_topk_prob is False")
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type")) == "ntk":
        found.append("no architecture of transformers has rope_scaling ntk: use yarn")
    return found
