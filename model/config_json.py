"""The fields of a config.json of our own model_type, "minimind", of whatever age: folders.py reads the file."""

from torch import Tensor

from .layouts import Layout
from .LMConfig import LMConfig, config_fields

# What a config.json of our own model_type may say besides, where MiniMind can do one thing only.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": True,
}
# What MiniMind's own code makes of "inference_rope_scaling": true in a config.json.
INFERENCE_ROPE_SCALING = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


def config_of_any_age(fields: dict, tensors: dict[str, Tensor], layout: Layout) -> LMConfig:
    """The configuration of a MiniMind from its config.json, which had other names in 2024-09, 2025-02, 2025-04 and now.

    Args:
        fields: of config.json.
        tensors: of the same folder: they show what old files do not say.

    Raises:
        ValueError: it says something that MiniMind does not compute, with each value and the one expected.
    """
    names = {**LMConfig.attribute_map, "intermediate_size": "hidden_dim", "moe_intermediate_size": "hidden_dim"}
    known = {name: name for name in config_fields(LMConfig())} | names
    own = {known[name]: value for name, value in fields.items() if name in known and value is not None}
    if rope := fields.get("rope_parameters"):  # as transformers 5 writes the two fields
        scaling = _rope_scaling(rope)
        own["rope_theta"] = scaling.pop("rope_theta", own.get("rope_theta", 1e6))
        own["rope_scaling"] = scaling if "rope_type" in scaling else None
    elif layout.pairs and "rope_theta" not in fields:
        own["rope_theta"] = 1e4  # 2024-09 had no such field: it was a constant
    if fields.get("inference_rope_scaling") and own.get("rope_scaling") is None:
        own["rope_scaling"] = INFERENCE_ROPE_SCALING
    own["qk_norm"] = any(name.endswith("self_attn.q_norm.weight") for name in tensors)
    if own.get("use_moe"):
        own["use_moe"] = bool(own["use_moe"])
        own["n_shared_experts"] = any(".shared_experts." in name for name in tensors)
    config = LMConfig(**own)
    expected = {**FIXED, "head_dim": config.head_dim}
    differing = [
        f"{name} is {fields[name]!r}, not {value!r}"
        for name, value in expected.items()
        if fields.get(name) is not None and fields[name] != value
    ]
    if fields.get("inference_rope_scaling") not in (None, True, False):
        differing.append(f"inference_rope_scaling is {fields['inference_rope_scaling']!r}, not True or False")
    if differing:
        raise ValueError(f"its config.json describes no MiniMind: {'; '.join(differing)}")
    return config


def _rope_scaling(rope: object) -> dict[str, object]:
    """What `rope_parameters` of a config.json say, without what says nothing; no rope_type: no scaling.

    Example: {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 1.0} -> {"rope_theta": 1e6}

    Raises: ValueError: they are no table, or hold what only some types have, such as a factor, and name no type.
    """
    if not isinstance(rope, dict):
        raise ValueError(f'rope_parameters is {rope!r}, not a table like {{"rope_type": "default", "rope_theta": 1e6}}')
    said = {name: value for name, value in rope.items() if value is not None}
    if said.get("partial_rotary_factor") == 1:
        del said["partial_rotary_factor"]  # all channels turn
    if said.get("rope_type", said.get("type", "default")) != "default":
        return said
    said = {name: value for name, value in said.items() if name not in ("rope_type", "type")}
    if unknown := sorted(said.keys() - {"rope_theta"}):
        raise ValueError(f"rope_parameters of type default have rope_theta alone, and no {', '.join(unknown)}")
    return said
