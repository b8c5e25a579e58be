"""Files of LoRA adapters: this project's, those of every MiniMind version, and directories of peft.

All are read into one form, the state dict that model/model_lora.py describes.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .architectures import ARCHITECTURES, LAYOUT_OF
from .layouts import LAYOUTS, Layout, from_ours, to_ours
from .LMConfig import LMConfig
from .loading import check_finite, of_other_sizes, read_state_dict, training_command, weights_path
from .model_lora import Adapter

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


def lora_path(out_dir: str | Path, name: str, config: LMConfig) -> Path:
    """`{out_dir}/lora/{name}_{dim}[_moe].pth`; a `name` that is a .pth file or a directory is taken as it is."""
    is_path = name.endswith(".pth") or Path(name).is_dir()
    return Path(name) if is_path else weights_path(Path(out_dir) / "lora", name, config)


def saved_adapters(out_dir: str | Path, config: LMConfig) -> list[str]:
    """The names of the adapters in `{out_dir}/lora` for a model of this size."""
    ending = weights_path("", "", config).name  # _512.pth
    return sorted(path.name.removesuffix(ending) for path in Path(out_dir, "lora").glob(f"*{ending}"))


def read_lora(path: str | Path, config: LMConfig, model_type: str | None = None) -> Adapter:
    """An adapter from disk: a .pth file of this project or of any MiniMind version, or a directory of peft's.

    Args:
        config: of the base model; says how many heads the files of early 2025 (`layers.0.attention.wq.lora.A.weight`)
            and some directories have, whose queries and keys are in another order.
        model_type: the architecture that a directory was trained on; by default what it says itself, else Llama's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, no LoRA adapter, or one with features that plain LoRA does not have.
    """
    path = Path(path)
    if path.is_dir():
        return _read_peft(path, config, model_type)
    command = _make_command(path, config)
    if not path.is_file() and (others := of_other_sizes(path, config, path.parent.parent)):
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


def peft_base(settings: dict) -> tuple[str | None, Path | None]:
    """What a peft directory says of its base model: the architecture, and the folder if it is on this machine.

    Args:
        settings: its adapter_config.json. `write_peft` notes the class there; peft itself notes where the base lay.
    """
    folder = settings.get("base_model_name_or_path")
    if isinstance(folder, str) and folder and (Path(folder) / "config.json").is_file():
        fields = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return fields.get("model_type"), Path(folder)
    named = (settings.get("auto_mapping") or {}).get("base_model_class")
    return next((model_type for model_type, name in ARCHITECTURES.items() if name == named), None), None


def read_peft_settings(directory: Path) -> dict:
    """adapter_config.json of a peft directory. Raises FileNotFoundError, ValueError."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a peft adapter directory holds it")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory} is damaged: copy or make it again ({error})") from error
    _check_peft_settings(directory, settings)
    return settings


def _read_peft(directory: Path, config: LMConfig, model_type: str | None) -> Adapter:
    files = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{', '.join(missing)} not found: a peft adapter directory holds both")
    settings = read_peft_settings(directory)
    try:
        tensors = load_file(files[1])
    except SafetensorError as error:
        raise ValueError(f"{directory} is damaged: copy or make it again ({error})") from error
    layout = peft_layout(model_type or peft_base(settings)[0] or "llama")
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        target, _, side = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if side not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{files[1]} holds {name!r}, which is no LoRA matrix of a linear layer: merge it with peft"
            )
        matrices.setdefault(target, {})[side[0]] = tensor.float()
    adapter = {}
    for target, pair in matrices.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{files[1]} holds only one matrix of {target}: copy or make it again")
        rank = pair["B"].shape[1]
        B = pair["B"] * (settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))
        try:  # the rows of B are those of the weight that it is added to
            ours = to_ours({f"{target}.weight": B}, layout, config.head_dim)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        for name, rows in ours.items():
            adapter[f"{name.removesuffix('.weight')}.lora.A.weight"] = pair["A"]
            adapter[f"{name.removesuffix('.weight')}.lora.B.weight"] = rows
    check_finite(directory, adapter, make_with=None)
    return adapter


def peft_layout(model_type: str) -> Layout:
    """The layout of the architecture that an adapter was trained on. Raises ValueError if it is no MiniMind."""
    if model_type == LMConfig.model_type:
        return LAYOUTS["ours"]
    if model_type not in LAYOUT_OF:
        raise ValueError(f"the adapter was trained on a {model_type}, which is no MiniMind: {', '.join(LAYOUT_OF)} are")
    return LAYOUTS[LAYOUT_OF[model_type]]


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


def write_peft(
    adapter: Adapter, directory: Path, config: LMConfig, model_type: str, base_model: str | None = None
) -> None:
    """Write an adapter in peft's format: `PeftModel.from_pretrained(model, directory)` reads it.

    Args:
        directory: an empty one.
        config: of the base model.
        model_type: the architecture that it will be used on: where that has its queries and keys in another order,
            so has the adapter.
        base_model: name or folder of the base model, noted in the adapter's configuration.

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
    named = _named_for_peft(adapter, config, model_type)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "auto_mapping": {"base_model_class": ARCHITECTURES.get(model_type, "MiniMindForCausalLM")},
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in named}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    try:
        save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # what the disk said, in another type
        raise OSError(f"{directory.parent}: {error}; make room there or pass another place") from error
    # safetensors lets the owner alone read what it wrote.
    shutil.copymode(directory / "adapter_config.json", directory / "adapter_model.safetensors")


def _named_for_peft(adapter: Adapter, config: LMConfig, model_type: str) -> Adapter:
    layout, named = peft_layout(model_type), {}
    if model_type == "granitemoeshared" and any(".mlp." in name for name in adapter):
        raise ValueError("granitemoeshared keeps gate and up in one matrix: choose another --architecture")
    for name, B in adapter.items():
        target, is_B, _ = name.partition(".lora.B.")
        if is_B:
            theirs = from_ours({f"{target}.weight": B}, layout, config.head_dim)
            # What else comes is what the architecture has beside, such as biases of zero.
            ((weight, rows),) = ((n, rows) for n, rows in theirs.items() if n.endswith("_proj.weight"))
            start = PEFT_PREFIX + weight.removesuffix(".weight")
            named[f"{start}.lora_A.weight"] = adapter[f"{target}.lora.A.weight"].contiguous()
            named[f"{start}.lora_B.weight"] = rows.contiguous()
    return named
