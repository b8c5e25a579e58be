"""LoRA: a frozen weight learns through the product of two thin matrices (Hu et al. 2021, arXiv 2106.09685).

    y = W x + alpha / rank * B A x        (eq. 3)     A (rank, in) starts random, B (out, rank) at zero: so does B A

An adapter is a plain state dict, `{target}.lora.A.weight` and `{target}.lora.B.weight` for each adapted projection, as
in MiniMind's own files: `model.layers.0.self_attn.q_proj.lora.A.weight`. alpha / rank is multiplied into B when an
adapter leaves the model, so the file alone says everything: the rank is A's height, the targets are the names.
MoE: the routed experts' stacked weights get stacked A (experts, rank, in) and B (experts, out, rank).

`apply_lora` begins an adapter, `lora_state_dict` takes it out, `load_lora` puts one in, replacing the one that is in:
that is how to switch. `merge_lora` makes it permanent. Files of adapters: model/adapters.py.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .moe import Experts, grouped_linear

Adapter = dict[str, torch.Tensor]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All matrices of attention and feed-forward; the router, the embedding and the head are left alone."""


class LowRank(nn.Module):
    """The trainable part of one projection: scale * B A dropout(x), in float32 (or what autocast makes of it).

    A (..., rank, in) and B (..., out, rank); the dots stand for experts, or nothing.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scale: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale, self.dropout = scale, dropout

    @classmethod
    def start(cls, weight: torch.Tensor, rank: int, alpha: float, dropout: float) -> "LowRank":
        """A uniform within 1/sqrt(in), B zero: the model is unchanged at first, and B's gradient is not zero."""
        *experts, out_features, in_features = weight.shape
        A = torch.empty(*experts, rank, in_features, device=weight.device)
        bound = 1 / math.sqrt(in_features)
        B = torch.zeros(*experts, out_features, rank, device=weight.device)
        return cls(nn.init.uniform_(A, -bound, bound), B, alpha / rank, dropout)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., in) -> (..., out); with `offsets`, x is (M, in) sorted by expert, see `moe.Experts`."""
        A, B, linear = self.A, self.B, F.linear
        if offsets is not None:
            # Autocast passes over grouped products, and they want rows of a multiple of 16 bytes: pad the rank.
            padding = -A.shape[-2] % 8
            A, B = F.pad(A.to(x.dtype), (0, 0, 0, padding)), F.pad(B.to(x.dtype), (0, padding))
            linear = partial(grouped_linear, offsets=offsets)
        x = F.dropout(x, self.dropout, self.training)
        return linear(linear(x, A), B) * self.scale

    def delta(self) -> torch.Tensor:
        """(..., out, in): what the adapter adds to the weight."""
        return self.scale * self.B @ self.A


class LoRALinear(nn.Linear):
    """A linear layer and its adapter; shares the weight of the layer that it replaces."""

    def __init__(self, base: nn.Linear, adapter: LowRank):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.lora = base.weight, adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The weight may be kept in lower precision than x; the sum then has x's again.
        return F.linear(x.to(self.weight.dtype), self.weight) + self.lora(x)


class LoRAExperts(Experts):
    """Routed experts and the adapters of some of their projections."""

    def __init__(self, base: Experts):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj
        self.lora = nn.ModuleDict()

    def project(self, name: str, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        y = super().project(name, x, offsets)
        return y + self.lora[name](x, offsets) if name in self.lora else y


def apply_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: tuple[str, ...] = LORA_TARGETS,
    base_dtype: torch.dtype | None = None,
) -> None:
    """Freeze a MiniMindForCausalLM and begin an adapter on all projections whose names are in `targets`.

    Args:
        alpha: strength; by default equal to the rank, as in MiniMind's files. The update is scaled by alpha / rank.
        dropout: on the adapter's input, while training.
        base_dtype: keep the adapted weights in this type, which halves their memory. Autocast would round them to it
            at every use anyway, so under autocast of the same type nothing else changes.

    Raises:
        ValueError: an unknown target, or a rank that is not positive.
    """
    if unknown := set(targets) - set(LORA_TARGETS):
        raise ValueError(f"LoRA targets {sorted(unknown)} do not exist: choose from {', '.join(LORA_TARGETS)}")
    if rank < 1 or not targets:
        raise ValueError(f"LoRA with rank {rank} on {len(targets)} targets adapts nothing: both must be at least 1")
    model.requires_grad_(False)
    weights = {name: w for name, w in adaptable_weights(model).items() if name.rpartition(".")[2] in targets}
    adapters = {name: LowRank.start(w, rank, rank if alpha is None else alpha, dropout) for name, w in weights.items()}
    if base_dtype is not None:
        for weight in weights.values():
            weight.data = weight.data.to(base_dtype)
    _attach(model, adapters)


def lora_state_dict(model: nn.Module) -> Adapter:
    """The adapter in `model`, its scale multiplied into B."""
    tensors = {}
    for name, adapter in _adapters(model).items():
        tensors[f"{name}.lora.A.weight"] = adapter.A.detach()
        tensors[f"{name}.lora.B.weight"] = adapter.B.detach() * adapter.scale
    return tensors


def load_lora(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter into a model, in the place of the one that is in; costs no more than a few assignments.

    Raises:
        ValueError: it was made for a model of another size or kind.
    """
    targets, weights = sorted({name.rpartition(".lora.")[0] for name in adapter}), adaptable_weights(model)
    adapters = {}
    for target in targets:
        A, B = (adapter.get(f"{target}.lora.{side}.weight") for side in "AB")
        if target not in weights or A is None or B is None or A.shape[-2] != B.shape[-1]:
            raise ValueError(f"the adapter does not fit: {target!r} is no projection of this model, or half is missing")
        weight = weights[target]
        if (*A.shape[:-2], B.shape[-2], A.shape[-1]) != weight.shape:
            raise ValueError(
                f"the adapter does not fit: it changes {target} of shape {(*A.shape[:-2], B.shape[-2], A.shape[-1])}, "
                f"this model's is {tuple(weight.shape)}: use the --dim and --use_moe that it was trained with"
            )
        adapters[target] = LowRank(A.to(weight.device, weight.dtype), B.to(weight.device, weight.dtype))
    _attach(model, adapters)


def remove_lora(model: nn.Module) -> None:
    """Take the adapter out, if there is one: the model is its base again."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, LoRALinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = module.weight
            setattr(model.get_submodule(parent), name, plain)
        elif isinstance(module, LoRAExperts):
            module.lora.clear()


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapter to the weights, W + alpha / rank * B A, and take it out. Exact for float32 weights only."""
    weights = adaptable_weights(model)
    for name, adapter in _adapters(model).items():
        weights[name] += adapter.delta().to(weights[name].dtype)
    remove_lora(model)


def adaptable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights that LoRA can adapt, by the name of their projection, e.g. model.layers.0.self_attn.q_proj."""
    found = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and name in LORA_TARGETS:
            found[path] = module.weight
        elif isinstance(module, Experts):
            found |= {f"{path}.{name}": getattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")}
    return found


def _adapters(model: nn.Module) -> dict[str, LowRank]:
    """The adapters in `model`, by the name of their projection."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[path] = module.lora
        elif isinstance(module, LoRAExperts):
            found |= {f"{path}.{name}": adapter for name, adapter in module.lora.items()}
    return found


def _attach(model: nn.Module, adapters: dict[str, LowRank]) -> None:
    remove_lora(model)
    for target, adapter in adapters.items():
        path, _, name = target.rpartition(".")
        parent = model.get_submodule(path)
        if not isinstance(parent, Experts):
            setattr(parent, name, LoRALinear(getattr(parent, name), adapter))
            continue
        if not isinstance(parent, LoRAExperts):
            parent = LoRAExperts(parent)
            outer, _, own_name = path.rpartition(".")
            setattr(model.get_submodule(outer), own_name, parent)
        parent.lora[name] = adapter
    model.train(model.training)  # new modules begin in training mode, with dropout
