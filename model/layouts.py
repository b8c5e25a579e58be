"""Every layout in which MiniMind's weights were published, and those of other models that compute the same function.

A layout is a way to name the same tensors, and sometimes to arrange them: two halves glued into one matrix, experts one
by one or stacked, rotary pairs side by side or half a head apart. Nothing is rounded on the way, so a conversion there
and back returns every bit. This file knows only tensors: which configuration they need is in record.py.

    MiniMind v1 and 2025-02    layers.0.attention.wq.weight               rotary pairs (2i, 2i+1)
    MiniMind 2025-04, today's  model.layers.0.self_attn.q_proj.weight     experts one by one; also Qwen3 and Qwen3Moe
    ours                       the same, experts stacked; dense also Llama
    GraniteMoeShared           block_sparse_moe.input_linear.weight       gate and up in one
    Ernie4_5_Moe               mlp.experts.0.gate_proj.weight             rotary pairs (2i, 2i+1)
    Qwen2Moe                   mlp.shared_expert_gate.weight              the shared expert behind a gate that is 1/2
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."
_PARTS = ("gate_proj", "up_proj", "down_proj")
_SAME = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.{layer}.input_layernorm.weight",
    "model.layers.{layer}.post_attention_layernorm.weight",
    *(_ATTENTION + f"{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
]
_DENSE = {name: name for name in [*_SAME, *(_MLP + f"{part}.weight" for part in _PARTS)]}

# Constants that could be computed again, in old files, and what wrappers put before a name.
_NO_WEIGHTS = re.compile(r"(.*\.)?(pos_cis|freqs_cos|freqs_sin|mask|inv_freq|rotary_emb\.inv_freq)")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Layout:
    """One way to name and arrange the tensors of a model.

    Attributes:
        name: for messages and flags.
        names: our name -> theirs; {layer} and {expert} stand for numbers. Where ours has no {expert} and theirs has,
            ours holds the tensors of all experts stacked.
        marks: one of these patterns is found in names of this layout, and in no layout listed before it.
        pairs: True where rotary embedding turns the channels (2i, 2i+1) of a head, False for (i, i + C/2).
        unfold, fold: between their arrangement and one tensor a name; see the functions below.
    """

    name: str
    names: dict[str, str]
    marks: str
    pairs: bool = False
    unfold: Callable[[Tensors], Tensors] = field(default=_unchanged)
    fold: Callable[[Tensors], Tensors] = field(default=_unchanged)


def _experts(routed: str, router: str, shared: str) -> dict[str, str]:
    """Names of a mixture of experts: patterns for a routed expert's part, for the router and for the shared expert."""
    names = {_MLP + "gate.weight": router}
    for part in _PARTS:
        names[_MLP + f"experts.{part}"] = routed.replace("PART", part)
        names[_MLP + f"shared_experts.{part}.weight"] = shared.replace("PART", part)
    return names


def _named_as_in_2025_02() -> dict[str, str]:
    words = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    layer, forward = "layers.{layer}.", "layers.{layer}.feed_forward."
    names = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.{layer}.input_layernorm.weight": layer + "attention_norm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight": layer + "ffn_norm.weight",
        _MLP + "gate.weight": forward + "gate.weight",
    }
    for part in "qkvo":
        names[_ATTENTION + f"{part}_proj.weight"] = layer + f"attention.w{part}.weight"
    for part, word in words.items():
        names[_MLP + f"{part}.weight"] = forward + f"{word}.weight"
        names[_MLP + f"experts.{part}"] = forward + f"experts.{{expert}}.{word}.weight"
        names[_MLP + f"shared_experts.{part}.weight"] = forward + f"shared_experts.{word}.weight"
    return names


def split_granite(tensors: Tensors) -> Tensors:
    """GraniteMoeShared keeps gate and up in one matrix, gate first: (..., 2F, D) -> two of (..., F, D)."""
    split = {}
    for name, tensor in tensors.items():
        if name.endswith(".input_linear.weight"):
            if tensor.dim() < 2:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, and gate and up are two matrices")
            start = name.removesuffix("input_linear.weight")
            gate, up = tensor.chunk(2, dim=-2)
            split |= {start + "gate_proj.weight": gate, start + "up_proj.weight": up}
        else:
            split[name.replace(".output_linear.weight", ".down_proj.weight")] = tensor
    return split


def join_granite(tensors: Tensors) -> Tensors:
    """The inverse of `split_granite`."""
    joined = {}
    for name, tensor in tensors.items():
        is_expert = "block_sparse_moe." in name or "shared_mlp." in name
        start, part = name.removesuffix(".weight").rpartition(".")[::2]
        if is_expert and part == "gate_proj":
            joined[start + ".input_linear.weight"] = torch.cat((tensor, tensors[start + ".up_proj.weight"]), dim=-2)
        elif is_expert and part == "down_proj":
            joined[start + ".output_linear.weight"] = tensor
        elif not (is_expert and part == "up_proj"):
            joined[name] = tensor
    return joined


def drop_ernie_bias(tensors: Tensors) -> Tensors:
    """Ernie adds a bias to the router's scores when it chooses; ours has none, which is a bias of zero."""
    return _without_zeros(tensors, re.compile(r".*\.moe_statics\.e_score_correction_bias"))


def add_ernie_bias(tensors: Tensors) -> Tensors:
    """The inverse of `drop_ernie_bias`."""
    added = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".mlp.gate.weight"):
            bias = name.replace("gate.weight", "moe_statics.e_score_correction_bias")
            added[bias] = torch.zeros(1, len(tensor), dtype=torch.float32)
    return added


def drop_qwen2_extras(tensors: Tensors) -> Tensors:
    """Qwen2Moe has biases of q, k, v, and multiplies its shared expert by sigmoid(x w). Ours is the case b = w = 0.

    sigmoid(0) is 1/2, so its down projection holds twice ours: a power of two, and nothing is rounded.
    """
    extras = re.compile(r".*\.(self_attn\.[qkv]_proj\.bias|mlp\.shared_expert_gate\.weight)")
    plain = _without_zeros(tensors, extras)
    return {name: tensor / 2 if _is_qwen2_shared_down(name) else tensor for name, tensor in plain.items()}


def add_qwen2_extras(tensors: Tensors) -> Tensors:
    """The inverse of `drop_qwen2_extras`."""
    added = {name: tensor * 2 if _is_qwen2_shared_down(name) else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if re.search(r"self_attn\.[qkv]_proj\.weight", name):
            added[name.replace(".weight", ".bias")] = tensor.new_zeros(tensor.shape[0])
        elif name.endswith(".mlp.gate.weight"):
            added[name.replace("gate.weight", "shared_expert_gate.weight")] = tensor.new_zeros(1, tensor.shape[1])
    return added


def _is_qwen2_shared_down(name: str) -> bool:
    return name.endswith(".mlp.shared_expert.down_proj.weight")


def _without_zeros(tensors: Tensors, extras: re.Pattern) -> Tensors:
    """The tensors without those that `extras` matches; ValueError if one of these is not zero."""
    for name, tensor in tensors.items():
        if extras.fullmatch(name) and not tensor.is_meta and tensor.any():  # of a mere shape nobody can say
            raise ValueError(
                f"{name} is not zero (largest {tensor.abs().max():.3g}), and MiniMind has no such part: this is no "
                "MiniMind but another model with the same architecture"
            )
    return {name: tensor for name, tensor in tensors.items() if not extras.fullmatch(name)}


_ONE_BY_ONE = _MLP + "experts.{expert}.PART.weight"
_ROUTER = _MLP + "gate.weight"
_GRANITE = "model.layers.{layer}.block_sparse_moe."

# In the order in which they are tried: the marks of the later ones occur in the earlier ones too.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("2025-02", _named_as_in_2025_02(), r"^(tok_embeddings|layers\.\d+)\.", pairs=True),
        Layout(
            "granitemoeshared",
            {
                **{name: name for name in _SAME},
                **_experts(
                    _GRANITE + "PART.weight",
                    _GRANITE + "router.layer.weight",
                    "model.layers.{layer}.shared_mlp.PART.weight",
                ),
            },
            r"\.block_sparse_moe\.",
            unfold=split_granite,
            fold=join_granite,
        ),
        Layout(
            "qwen2moe",
            {**_DENSE, **_experts(_ONE_BY_ONE, _ROUTER, _MLP + "shared_expert.PART.weight")},
            r"\.shared_expert_gate\.",
            unfold=drop_qwen2_extras,
            fold=add_qwen2_extras,
        ),
        Layout(
            "ernie4_5_moe",
            {**_DENSE, **_experts(_ONE_BY_ONE, _ROUTER, _MLP + "shared_experts.PART.weight")},
            r"\.moe_statics\.",
            pairs=True,
            unfold=drop_ernie_bias,
            fold=add_ernie_bias,
        ),
        Layout(
            "2025-04",
            {**_DENSE, **_experts(_ONE_BY_ONE, _ROUTER, _MLP + "shared_experts.0.PART.weight")},
            r"\.experts\.\d+\.",
        ),
        Layout(
            "ours",
            {**_DENSE, **_experts(_MLP + "experts.PART", _ROUTER, _MLP + "shared_experts.PART.weight")},
            r"^model\.(embed_tokens|layers\.\d+)\.",
        ),
        # Its names are those of a dense Llama: only a config.json can tell it, so no file is recognised as this one.
        Layout("ernie4_5", _DENSE, r"(?!)", pairs=True),
    )
}


def recognise(names: object) -> Layout:
    """The layout of a state dict with these names. Raises ValueError, with names that are known, if it is none."""
    names = sorted(map(_bare, names))
    for layout in LAYOUTS.values():
        if any(re.search(layout.marks, name) for name in names):
            return layout
    raise ValueError(
        f"no layout of MiniMind: its names begin with {', '.join(names[:2]) or 'nothing'}; known are names like "
        "model.layers.0.self_attn.q_proj.weight, or layers.0.attention.wq.weight (until 2025-02)"
    )


def to_ours(tensors: Tensors, layout: Layout, head_dim: int) -> Tensors:
    """The tensors of `layout` under our names and in our arrangement; values are never rounded.

    Args:
        head_dim: channels of a head, C; decides which rows of q and k change places (shapes do not show it).

    Raises:
        ValueError: names that the layout does not have, experts that are missing in between, sizes that do not fit.
    """
    patterns = [(_pattern(theirs), ours) for ours, theirs in layout.names.items()]
    found, experts, unknown = {}, {}, []
    weights = {_bare(name): tensor for name, tensor in tensors.items()}
    if len(weights) < len(tensors):
        twice = next(name for name in tensors if name != _bare(name) and _bare(name) in tensors)
        raise ValueError(f"it holds both {twice} and {_bare(twice)}: which one is meant?")
    weights = {name: tensor for name, tensor in weights.items() if not _NO_WEIGHTS.fullmatch(name)}
    for name, tensor in layout.unfold(weights).items():
        ours, numbers = _translate(name, patterns)
        if ours is None:
            unknown.append(name)
            continue
        expert = numbers.pop("expert", None)
        target = ours.format(**numbers)
        if expert is None:
            found[target] = _turned(target, tensor, head_dim, _to_halves) if layout.pairs else tensor
        else:
            experts.setdefault(target, {})[int(expert)] = tensor
    if unknown:
        raise ValueError(f"{len(unknown)} names that layout {layout.name} does not have, first {sorted(unknown)[0]}")
    for target, of_expert in experts.items():
        if sorted(of_expert) != list(range(len(of_expert))):
            raise ValueError(f"{target}: experts {sorted(of_expert)} are there, not 0 to {len(of_expert) - 1}")
        if len({tensor.shape for tensor in of_expert.values()}) > 1:
            raise ValueError(f"{target}: its experts have different sizes")
        found[target] = torch.stack([of_expert[number] for number in sorted(of_expert)])
    if "lm_head.weight" not in found and "model.embed_tokens.weight" in found:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]  # tied, and files may leave it out
    return found


def from_ours(tensors: Tensors, layout: Layout, head_dim: int) -> Tensors:
    """The inverse of `to_ours`: our tensors under the names and in the arrangement of `layout`.

    Raises:
        ValueError: a tensor has no place there, as the norms of q and k have none in MiniMind's files of 2025-02.
    """
    patterns = [(_pattern(ours), theirs) for ours, theirs in layout.names.items()]
    named = {}
    for name, tensor in tensors.items():
        theirs, numbers = _translate(name, patterns)
        if theirs is None:
            raise ValueError(f"layout {layout.name} has no place for {name}: choose another one")
        if "{expert}" in theirs:
            for expert, part in enumerate(tensor):
                named[theirs.format(**numbers, expert=expert)] = part.clone()  # a view would save the whole stack
        else:
            turned = _turned(name, tensor, head_dim, _to_pairs) if layout.pairs else tensor
            named[theirs.format(**numbers)] = turned
    return layout.fold(named)


def _bare(name: str) -> str:
    """A name without what DistributedDataParallel and torch.compile put before it."""
    return _WRAPPERS.sub("", name)


def _translate(name: str, patterns: list[tuple[re.Pattern, str]]) -> tuple[str | None, dict[str, str]]:
    """The template that a name translates to, and the numbers in it; (None, {}) where no pattern fits."""
    for pattern, template in patterns:
        if match := pattern.fullmatch(name):
            return template, match.groupdict()
    return None, {}


def _pattern(template: str) -> re.Pattern:
    """The names that a template stands for: {layer} and {expert} are numbers."""
    return re.compile(re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(
        r"\{expert\}", r"(?P<expert>\d+)"
    ))  # fmt: skip


def _turned(name: str, tensor: Tensor, head_dim: int, reorder: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`tensor` with its rows reordered if it is a q or k projection, whose rows are channels that RoPE turns."""
    if not name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
        return tensor
    if tensor.dim() != 2:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, where a matrix is needed")
    if tensor.shape[0] % head_dim:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, which are no whole heads of {head_dim}: check --n_heads")
    return reorder(tensor, head_dim)


def _to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from neighbouring pairs to halves: for C = 6, 0 1 2 3 4 5 -> 0 2 4 1 3 5.

    RoPE turns pair i by an angle of its own, wherever its two channels stand; q and k change places together, and
    their dot product stays the same. weight (heads * C, D) -> the same shape.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # head, pair, member of the pair
    return pairs.transpose(1, 2).reshape(weight.shape)


def _to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `_to_halves`: for C = 6, 0 1 2 3 4 5 -> 0 3 1 4 2 5."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)
