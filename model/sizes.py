"""What sizes a model has, told from the shapes of its tensors, and whether that is what the user asked for."""

from collections.abc import Mapping
from typing import NamedTuple

from .LMConfig import PUBLISHED, LMConfig, config_fields

# Fields without tensors that may differ from those that the weights were trained with: settings of a run, or the same
# numbers computed in another way ...
RUN_FIELDS = ("dropout", "aux_loss_alpha", "seq_aux", "flash_attn", "use_cache")
# ... and the context, which one may stretch on purpose.
CONTEXT_FIELDS = ("max_seq_len", "rope_scaling")
# Fields that have no tensors either, but with another value the same weights are another model.
HIDDEN_FIELDS = ("n_heads", "rope_theta", "norm_eps")
HIDDEN_MOE_FIELDS = ("num_experts_per_tok", "norm_topk_prob")
WIDTH_FIELDS = ("hidden_dim", "multiple_of")  # two ways to say one number, `intermediate_size`


Shapes = Mapping[str, tuple[int, ...]]


class Given(NamedTuple):
    """The value of a field of LMConfig, and the flag that says so: "--dim 512", or "--model minimind-3 (dim 768)"."""

    value: object
    text: str


def sizes_of(shapes: Shapes) -> dict[str, object] | None:
    """The sizes that the tensors of a state dict show; None if it has no layout of ours.

    Args:
        shapes: name -> shape, e.g. "model.embed_tokens.weight" -> (6400, 512).
    """
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) != 2:
        return None
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    mlp = "model.layers.0.mlp."
    sizes = {
        "vocab_size": embedding[0],
        "dim": embedding[1],
        "n_layers": len(layers),
        "use_moe": any(".mlp.experts." in name for name in shapes),
        "qk_norm": any(".self_attn.q_norm." in name for name in shapes),
    }
    if keys := shapes.get("model.layers.0.self_attn.k_proj.weight"):
        sizes["kv_dim"] = keys[0]  # n_kv_heads * head_dim: two numbers in one, unless there is a norm for each head
    if norm := shapes.get("model.layers.0.self_attn.q_norm.weight"):
        sizes["head_dim"] = norm[0]
    if gate := shapes.get(f"{mlp}gate_proj.weight"):
        sizes["hidden_dim"] = gate[0]
    gates = shapes.get(f"{mlp}experts.gate_proj", ())
    if len(gates) == 3:
        sizes["n_routed_experts"], sizes["hidden_dim"] = gates[:2]
        sizes["n_shared_experts"] = f"{mlp}shared_experts.gate_proj.weight" in shapes
    return sizes


def sizes_of_config(config: LMConfig) -> dict[str, object]:
    """What `sizes_of` says about a model of this configuration."""
    sizes = {name: getattr(config, name) for name in ("vocab_size", "dim", "n_layers", "use_moe", "qk_norm")}
    sizes["kv_dim"] = config.n_kv_heads * config.head_dim
    if config.qk_norm:
        sizes["head_dim"] = config.head_dim
    sizes["hidden_dim"] = config.intermediate_size
    if config.use_moe:
        sizes["n_routed_experts"], sizes["n_shared_experts"] = config.n_routed_experts, bool(config.n_shared_experts)
    return sizes


def assume_config(shapes: Shapes, layout: str, given: Mapping[str, Given]) -> tuple[LMConfig, str]:
    """The configuration of weights without a record, and in words what of it is only assumed ("" if nothing is).

    What shapes show comes first, then what is given, then the published model that has these shapes, then the published
    family that such files come from, then the defaults.

    Args:
        shapes: in our layout; layout: the file's own, by name (layouts.py).

    Example: with dim 512 and keys 128 wide, MiniMind2-Small has 8 heads of 64 channels and 2 for the keys. Another
    model may have 16 heads of 32 channels, and 4: the shapes are the same, the answers are not.

    Raises:
        ValueError: it is no model of ours, or what is given does not fit the shapes.
    """
    sizes = sizes_of(shapes)
    if sizes is not None and "kv_dim" not in sizes:
        raise ValueError("model.layers.0.self_attn.k_proj.weight is missing: it is no whole model")
    if sizes is None or "hidden_dim" not in sizes:
        raise ValueError(f"it has another layout than this project's (its first name is {next(iter(shapes), None)!r})")
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise ValueError(f"{empty[0]} is empty: {shapes[empty[0]]}")
    if not 0 < sizes.get("head_dim", 1) <= sizes["dim"]:
        raise ValueError(f"its heads have {sizes['head_dim']} channels, and the whole model dim {sizes['dim']}")
    published = [name for name, fields in PUBLISHED.items() if sizes_of_config(LMConfig(**fields)) == sizes]
    like = published[0] if published else family(sizes, layout)
    fields = config_fields(LMConfig(**PUBLISHED.get(like, {})))
    fields["hidden_dim"] = None  # shapes say it, below
    fields |= {name: value for name, (value, _) in given.items()}
    fields |= {name: value for name, value in sizes.items() if name not in ("kv_dim", "head_dim", "hidden_dim")}

    hidden = HIDDEN_FIELDS + (HIDDEN_MOE_FIELDS if fields["use_moe"] else ())
    if "head_dim" in sizes:
        fields["n_heads"] = fields["dim"] // sizes["head_dim"]
        hidden = tuple(name for name in hidden if name != "n_heads")
    n_heads, head_dim = fields["n_heads"], fields["dim"] // fields["n_heads"]
    if not head_dim or sizes["kv_dim"] % head_dim:
        raise ValueError(
            f"its keys are {sizes['kv_dim']} wide, which is no multiple of dim/n_heads = {fields['dim']}/{n_heads}: "
            "pass the --n_heads that it was trained with"
        )
    fields["n_kv_heads"] = sizes["kv_dim"] // head_dim
    if LMConfig(**fields).intermediate_size != sizes["hidden_dim"]:
        fields["hidden_dim"] = sizes["hidden_dim"]
    config = LMConfig(**fields)
    assumed = [f"{name} {getattr(config, name)}" for name in hidden if name not in given]
    return config, f"{', '.join(assumed)} ({f'as in {like}' if like else 'by default'})" if assumed else ""


def family(sizes: Mapping[str, object], layout: str) -> str | None:
    """The published model whose relatives have such files, whatever their size; None for those of the defaults."""
    if sizes["qk_norm"]:  # today's
        return "minimind-3-moe" if sizes["use_moe"] and not sizes["n_shared_experts"] else "minimind-3"
    if layout == "2025-02" and sizes["kv_dim"] * 2 == sizes["dim"]:  # 2024-09: 16 heads and 8; 2025-02: 8 and 2
        return "minimind-v1-small"
    return None


def misfits(config: LMConfig, shapes: Shapes) -> str:
    """Where a configuration has other sizes than tensors show, in words; "" if nowhere. Needs no model to be built."""
    sizes = sizes_of(shapes)
    if sizes is None:
        return ""
    wanted = sizes_of_config(config)
    differing = [name for name in sizes if sizes[name] != wanted.get(name)]
    return ", ".join(f"{name} {wanted.get(name)}, but its tensors show {sizes[name]}" for name in differing)


def contradictions(config: LMConfig, given: Mapping[str, Given], whose: str) -> list[str]:
    """Where what is given is not what a model has, one sentence each.

    Args:
        whose: the model and how its configuration is known, e.g. "out/full_sft_512.pth (as its record says)".
    """
    found = []
    for name, (value, text) in given.items():
        if name in (*RUN_FIELDS, *CONTEXT_FIELDS, *WIDTH_FIELDS):
            continue
        if value != (has := getattr(config, name)):
            found.append(f"{text} contradicts {name} {has} of {whose}")
    if widths := [given[name] for name in WIDTH_FIELDS if name in given]:
        asked = {name: given[name].value for name in WIDTH_FIELDS if name in given}
        wanted = LMConfig(**{**config_fields(config), "hidden_dim": None, **asked}).intermediate_size
        if wanted != config.intermediate_size:
            text = next(text for value, text in widths if value is not None)  # with a hidden_dim, multiple_of is idle
            found.append(f"{text} contradicts hidden_dim {config.intermediate_size} of {whose}")
    return found


def agreed(config: LMConfig, given: Mapping[str, Given], whose: str) -> LMConfig:
    """A model's configuration together with what is given.

    Fields of CONTEXT_FIELDS replace the model's; RUN_FIELDS are taken from what is given alone, or have their defaults;
    all others must be the model's.

    Raises:
        ValueError: with every contradiction, both values and both sources.
    """
    if found := contradictions(config, given, whose):
        raise ValueError(f"{'; '.join(found)}: leave {'these' if len(found) > 1 else 'it'} out, or name other weights")
    fields = config_fields(config)
    for name in RUN_FIELDS:
        fields[name] = getattr(LMConfig(), name)
    for name in (*RUN_FIELDS, *CONTEXT_FIELDS):
        if name in given:
            fields[name] = given[name].value
    return LMConfig(**fields)
