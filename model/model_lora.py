"""LoRA: a frozen weight learns through the product of two thin matrices (Hu et al. 2021, arXiv 2106.09685).

    y = W x + alpha / rank * B A x        (eq. 3)     A (rank, in) starts random, B (out, rank) at zero: so does B A

An adapter is a plain state dict, `{target}.lora.A.weight` and `{target}.lora.B.weight` for each adapted projection, as
in MiniMind's own files: `model.layers.0.self_attn.q_proj.lora.A.weight`. alpha / rank is multiplied into B when an
adapter leaves the model, so the file alone says everything: the rank is A's height, the targets are the names.
MoE: the routed experts' stacked weights get stacked A (experts, rank, in) and B (experts, out, rank).

`apply_lora` begins an adapter, `lora_state_dict` takes it out, `read_lora` reads one from disk (also of other
layouts), `load_lora` puts it in, replacing the one that is in: that is how to switch. `merge_lora` makes it permanent.
"""

import contextlib
import json
import math
import re
import shlex
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .LMConfig import LMConfig
from .loading import check_finite, read_state_dict, training_command, weights_path
from .moe import Experts, grouped_linear

Adapter = dict[str, torch.Tensor]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All matrices of attention and feed-forward; the router, the embedding and the head are left alone."""

NAMES_2502 = {
    **{"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj"},
    **{"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj"},
    "feed_forward.w3": "mlp.up_proj",
}
PEFT_PREFIX = "base_model.model."
# Of peft's settings: those read here; those that say how an adapter was trained, or which layers it has, as its names
# do too; and the ways to begin one that leave the base weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move a
# part of the base into the adapter: it fits the changed base only. Whatever else is set changes the forward pass.
PEFT_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "init_lora_weights", "bias"}
PEFT_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config"),
    *("megatron_core", "qalora_group_size"),  # never empty, and without effect unless megatron_config or use_qalora is
}
PEFT_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


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


# Files


def lora_path(out_dir: str | Path, name: str, config: LMConfig) -> Path:
    """`{out_dir}/lora/{name}_{dim}[_moe].pth`; a `name` that is a .pth file or a directory is taken as it is."""
    is_path = name.endswith(".pth") or Path(name).is_dir()
    return Path(name) if is_path else weights_path(Path(out_dir) / "lora", name, config)


def saved_adapters(out_dir: str | Path, config: LMConfig) -> list[str]:
    """The names of the adapters in `{out_dir}/lora` for a model of this size."""
    ending = weights_path("", "", config).name  # _512.pth
    return sorted(path.name.removesuffix(ending) for path in Path(out_dir, "lora").glob(f"*{ending}"))


def read_lora(path: str | Path, config: LMConfig) -> Adapter:
    """An adapter from disk: a .pth file of this project or of any MiniMind version, or a directory of peft's.

    Args:
        config: of the base model; says how many heads the files of early 2025 (`layers.0.attention.wq.lora.A.weight`)
            have, whose queries and keys are in another order.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, no LoRA adapter, or one with features that plain LoRA does not have.
    """
    path = Path(path)
    if path.is_dir():
        return _read_peft(path)
    command = _make_command(path, config)
    if not path.is_file() and (others := _of_other_sizes(path, config)):
        raise FileNotFoundError(f"{path} not found, but\n  {others}" + (f"\nor run `{command}`" if command else ""))
    adapter = {}
    for name, tensor in read_state_dict(path, command).items():
        target, is_lora, side = name.removeprefix("module.").removeprefix("_orig_mod.").partition(".lora.")
        if not is_lora or side not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{path} is no LoRA file: it holds {name!r}; pass full weights with --weight or --model_mode"
            )
        tensor, (first, *rest) = tensor.float(), target.split(".")
        if first == "layers":
            projection = ".".join(rest[1:])
            if side == "B.weight" and projection in ("attention.wq", "attention.wk"):
                tensor = _rotate_half_order(tensor, config.head_dim)
            target = f"model.layers.{rest[0]}.{NAMES_2502.get(projection, projection)}"
        adapter[f"{target}.lora.{side}"] = tensor
    check_finite(path, adapter, command)
    return adapter


def _of_other_sizes(path: Path, config: LMConfig) -> str:
    """Adapters of this name for models of other sizes, here or in the lora/ of a folder nearby, with their flags."""
    name = path.name.removesuffix(weights_path("", "", config).name)  # lora_a_512.pth -> lora_a
    found = []
    for file in sorted({*path.parent.glob(f"{name}_*.pth"), *path.parent.parent.glob(f"*/lora/{name}_*.pth")}):
        size = re.fullmatch(r"(\d+)(_moe)?", file.stem.removeprefix(f"{name}_"))
        if size is None:  # lora_a_new_512.pth
            continue
        with contextlib.suppress(ValueError):  # a damaged one helps nobody
            layers = {target.split(".")[2] for target in read_lora(file, config)}
            flags = f"--dim {size[1]} --n_layers {len(layers)}" + " --use_moe" * bool(size[2])
            folder = shlex.quote(str(file.parent.parent))
            found.append(f"{file.parent} holds {file.name}: pass {flags} --out_dir {folder}")
    return "\n  ".join(found)


def _make_command(path: Path, config: LMConfig) -> str | None:
    """The command that writes exactly this file; None if train_lora.py writes none of this name or place."""
    name = path.name.removesuffix(weights_path("", "", config).name)  # lora_a_512.pth -> lora_a
    if name == path.name or path.parent.name != "lora":
        return None
    return training_command(["train_lora.py", "--lora_name", name], config, path.parent.parent)


def _rotate_half_order(B: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the outputs (heads * head_dim, rank) of queries or keys: channels 2i and 2i+1 of a head, the pair that
    the rotary embedding of early 2025 turns, become i and i + head_dim / 2, the pair that it turns here."""
    return B.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _read_peft(directory: Path) -> Adapter:
    files = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{', '.join(missing)} not found: a peft adapter directory holds both")
    try:
        settings, tensors = json.loads(files[0].read_text(encoding="utf-8")), load_file(files[1])
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{directory} is damaged: copy or make it again ({error})") from error
    _check_peft_settings(directory, settings)
    adapter = {}
    for name, tensor in tensors.items():
        target, _, side = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if side not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{files[1]} holds {name!r}, which is no LoRA matrix of a linear layer: merge it with peft"
            )
        if side == "B.weight":
            rank = tensor.shape[1]
            tensor = tensor * (settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))
        adapter[f"{target}.lora.{side}"] = tensor.float()
    check_finite(directory, adapter, make_with=None)
    return adapter


def _check_peft_settings(directory: Path, settings: dict) -> None:
    """Raises ValueError unless an adapter of these settings is W x + alpha / rank * B A x on the base as it is."""
    if not isinstance(settings, dict) or not isinstance(settings.get("lora_alpha"), int | float):
        raise ValueError(f"{directory}/adapter_config.json has no number lora_alpha: copy or make it again")
    odd = {name: value for name, value in settings.items() if value and name not in PEFT_READ | PEFT_WITHOUT_EFFECT}
    expected = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": PEFT_INITS}
    odd |= {name: settings[name] for name, values in expected.items() if settings.get(name, values[0]) not in values}
    if odd:
        raise ValueError(
            f"{directory} is no plain LoRA on the base model ({', '.join(f'{k}: {v!r}' for k, v in odd.items())}): "
            "merge it with peft, or save it as one with its path_initial_model_for_weight_conversion"
        )


def write_peft(adapter: Adapter, directory: str | Path, base_model: str | None = None) -> None:
    """Write an adapter in peft's format: `PeftModel.from_pretrained(model, directory)` reads it.

    Args:
        base_model: name or directory of the base model, noted in the adapter's configuration.

    Raises:
        ValueError: adapters of routed experts, which peft keeps in no layout of their own, or several ranks.
    """
    ranks = {tensor.shape[-2] for name, tensor in adapter.items() if name.endswith(".A.weight")}
    if len(ranks) != 1 or any(tensor.ndim != 2 for tensor in adapter.values()):
        raise ValueError(
            f"peft's format has one rank (here {sorted(ranks)}) and no adapters of routed experts: "
            "train with --lora_targets q_proj,k_proj,v_proj,o_proj, or merge the adapter into full weights"
        )
    (rank,) = ranks
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.partition(".lora.")[0].rpartition(".")[2] for name in adapter}),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = {PEFT_PREFIX + name.replace(".lora.", ".lora_"): tensor.contiguous() for name, tensor in adapter.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
