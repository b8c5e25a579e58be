"""Weight files: names, places, strict loading; and the tokenizer. What they hold is opened by opening.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from common.tensor_files import (
    UNREADABLE,
    UnreadableFile,
    atomic_save,
    first_line,
    is_state_dict,
    nonfinite,
    read_torch_file,
)

from .LMConfig import PUBLISHED, LMConfig, config_fields
from .sizes import sizes_of

if TYPE_CHECKING:
    from .model import MiniMindForCausalLM

REPO_ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_DIR = REPO_ROOT / "model" / "minimind_tokenizer"

WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# eval_model.py --model_mode N talks to the file of that stage.
MODEL_MODES = {0: "pretrain", 1: "full_sft", 2: "rlhf", 3: "reason"}
STAGE_SCRIPTS = {
    "pretrain": "train_pretrain.py",
    "full_sft": "train_full_sft.py",
    "rlhf": "train_dpo.py",
    "reason": "train_distill_reason.py",
    "full_dist": "train_distillation.py",
}


def weights_path(out_dir: str | Path, name: str, config: LMConfig) -> Path:
    """`{out_dir}/{name}_{dim}[_moe].pth`, e.g. out/full_sft_512.pth."""
    return Path(out_dir) / weights_name(name, config.dim, config.use_moe)


def weights_name(name: str, dim: int, use_moe: bool) -> str:
    """`{name}_{dim}[_moe].pth`: the sizes that a file's name shows."""
    return f"{name}_{dim}{'_moe' if use_moe else ''}.pth"


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_weights(state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Write a state dict as plain float32 CPU tensors, all or nothing. Raises what `atomic_save` raises."""
    atomic_save(_plain_tensors(state_dict), path)


def _plain_tensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 CPU tensors. Tied names keep sharing one, and none drags along a larger storage.

    A tensor that is so already is not copied: in a run this is called by the thread that writes, and there a large copy
    would start a second pool of OpenMP threads. With more of them than cores, libgomp puts waiting threads to sleep
    at once, and all later training steps take 1.4 times as long (two cores, a model of 6M).
    """
    plain_of: dict[tuple, torch.Tensor] = {}
    plain = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach()
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if identity not in plain_of:
            converted = tensor.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
            is_whole = converted.untyped_storage().nbytes() == converted.nbytes
            plain_of[identity] = converted if is_whole else converted.clone()
        plain[name] = plain_of[identity]
    return plain


def require_weights(path: str | Path, config: LMConfig, make_with: str | None = None) -> None:
    """Raises FileNotFoundError unless weights are there: names the command that makes them, and those of other sizes.

    Args:
        path: of a .pth file, a folder of transformers, or a GGUF file.
    """
    path = Path(path)
    if path.exists():
        return
    if path.suffix not in (".pth", ".gguf"):
        raise not_found(path, "weights are a .pth file, a folder in the format of transformers, or a .gguf file")
    make_with = make_with or make_command(path, config)
    if others := of_other_sizes(path, config, path.parent):
        raise FileNotFoundError(f"{path} not found, but\n  {others}" + (f"\nor run `{make_with}`" if make_with else ""))
    raise not_found(path, f"run `{make_with}` first" if make_with else "check the path")


def fill(model: nn.Module, state_dict: dict[str, torch.Tensor], path: Path, make_with: str | None) -> None:
    """Put tensors in our layout, which were read from `path`, into `model` as float32; ValueError unless all fit."""
    expected = model.state_dict()
    if state_dict.keys() != expected.keys() or any(state_dict[name].shape != expected[name].shape for name in expected):
        raise ValueError(_difference(path, state_dict, expected))
    if other := [name for name in state_dict if state_dict[name].dtype not in WEIGHT_TYPES]:
        kind = str(state_dict[other[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{path} holds no floating-point weights ({other[0]} is {kind}): {_remedy(make_with)}")
    state_dict = {name: tensor.float() for name, tensor in state_dict.items()}  # float64 may hold more than fits
    check_finite(path, state_dict, make_with)  # before the comparison: NaN equals nothing
    if not torch.equal(state_dict["lm_head.weight"], state_dict["model.embed_tokens.weight"]):
        raise ValueError(
            f"{path}: lm_head.weight and model.embed_tokens.weight differ, but this model uses one matrix for both"
        )
    model.load_state_dict(state_dict)


def new_model(config: LMConfig) -> MiniMindForCausalLM:
    """A model with random weights.

    The import stands here because transformers' model classes take longer to import than PyTorch itself: whoever asks
    for ``--help`` or has mistyped a flag should not wait for them.
    """
    from .model import MiniMindForCausalLM

    return MiniMindForCausalLM(config)


def load_tokenizer(path: str | Path = TOKENIZER_DIR) -> PreTrainedTokenizerBase:
    """The tokenizer in directory `path`.

    Raises:
        FileNotFoundError: there is none; names the command that makes it.
        ValueError: it is damaged, or needs code of its author.
    """
    from transformers import AutoTokenizer  # and with it a table of every architecture, which --help does not need

    if not (Path(path) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{path} holds no tokenizer.json: run `python scripts/train_tokenizer.py` to make one")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        if "custom code" in str(error):
            raise ValueError(
                f"the tokenizer in {path} needs code of its author (auto_map in tokenizer_config.json), which is never "
                "run: pass another tokenizer with --tokenizer_path"
            ) from error
        raise ValueError(
            f"the tokenizer in {path} is damaged: copy it again ({type(error).__name__}: {first_line(error)})"
        ) from error


def check_vocabulary(path: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has tokens for which the model in `path` has no row of its embedding."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{path} has rows for {vocab_size} tokens, but the tokenizer in {tokenizer.name_or_path} has "
            f"{len(tokenizer)}: put the one there that the model was trained with"
        )


def make_command(path: Path, config: LMConfig) -> str | None:
    """The command that writes a file of this name, if one of our stages does."""
    stage = next((name for name in STAGE_SCRIPTS if path.name == weights_path("", name, config).name), None)
    if stage is None:
        return None
    return training_command([STAGE_SCRIPTS[stage]], config, path.parent)


def training_command(words: list[str], config: LMConfig, out_dir: Path) -> str:
    """`python WORDS` for a model of this size and a directory of weights, quoted for the shell."""
    usual, flags = LMConfig(), []
    if (published := _published_name(config)) is not None:
        flags += ["--model", published]
    elif config.dim != usual.dim:
        flags += ["--dim", str(config.dim)]
    if published is None and config.n_layers != usual.n_layers and words[0] == STAGE_SCRIPTS["pretrain"]:
        flags += ["--n_layers", str(config.n_layers)]  # the others read it
    if published is None and config.use_moe:
        flags += ["--use_moe", "True"]
    if out_dir != Path("out"):
        flags += ["--out_dir", str(out_dir)]
    return shlex.join(["python", *words, *flags])


def _published_name(config: LMConfig) -> str | None:
    """The published model that this is, if --dim, --n_layers and --use_moe alone would make another one."""
    fields = config_fields(config)
    if fields == config_fields(LMConfig(dim=config.dim, n_layers=config.n_layers, use_moe=config.use_moe)):
        return None
    return next((name for name in PUBLISHED if config_fields(LMConfig(**PUBLISHED[name])) == fields), None)


def of_other_sizes(path: Path, config: LMConfig, out_dir: Path) -> str:
    """Files of the same name for models of other sizes, with the flags they need; one a line, "" if there are none.

    Looked for where `path` is looked for, in `out_dir` and in the folders right below it: for out/lora/a_512.pth in
    out/lora and in out/*/lora.
    """
    name = path.name.removesuffix(weights_path("", "", config).name)  # full_sft_512.pth -> full_sft
    below = path.parent.relative_to(out_dir)
    found = []
    for folder in [out_dir, *sorted(out_dir.glob("*"))]:
        for file in sorted((folder / below).glob(f"{name}_*.pth")):
            size = re.fullmatch(r"(\d+)(_moe)?", file.stem.removeprefix(f"{name}_"))
            if size is not None:  # it is of full_sft_new_512.pth
                use_moe = " --use_moe" if size[2] else " --use_moe False" if config.use_moe else ""
                flags = f"--dim {size[1]}{use_moe} --out_dir {shlex.quote(str(folder))}"
                found.append(f"{file.parent} holds {file.name}: pass {flags}")
    return "\n  ".join(found)


def read_state_dict(path: Path, make_with: str | None) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file, by name.

    Args:
        make_with: the command that makes the file, for the error messages.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or holds something else than tensors.
    """
    if not path.is_file():
        raise not_found(path, f"run `{make_with}` first" if make_with else "check the path")
    try:
        state_dict = read_torch_file(path)
    except UnreadableFile as error:
        raise ValueError(f"{path} {error}: {_remedy(make_with)}") from error
    if not is_state_dict(state_dict):
        raise ValueError(f"{path} is not a state dict, a table from names to tensors: {_remedy(make_with)}")
    return state_dict


def check_finite(path: str | Path, state_dict: dict[str, torch.Tensor], make_with: str | None) -> None:
    """Raises ValueError if a tensor holds NaN or infinity: the model would answer nothing but NaN."""
    if problem := nonfinite(state_dict):
        raise ValueError(f"{path} {problem}, as a run that diverged leaves it: {_remedy(make_with)}")


def not_found(path: Path, remedy: str) -> FileNotFoundError:
    """The error for weights that are not there. It names those in the same folder, else in the folders right below."""
    for places in ([path.parent], sorted(path.parent.glob("*/"))):
        lists = [f"{place} holds {', '.join(names)}" for place in places if (names := _weights_in(place))]
        if lists:
            return FileNotFoundError(f"{path} not found: {remedy}; {'; '.join(lists)}")
    return FileNotFoundError(f"{path} not found: {remedy}")


def _weights_in(folder: Path) -> list[str]:
    """The names of what looks like weights: .pth and .gguf files, and folders of transformers."""
    files = [file for file in folder.glob("*") if file.suffix in (".pth", ".gguf") and file.is_file()]
    folders = [config.parent for config in folder.glob("*/config.json")]
    return sorted(path.name for path in files + folders)


def _remedy(make_with: str | None) -> str:
    return f"remove it and run `{make_with}` again" if make_with else "copy or make it again"


def _describe(state_dict: dict[str, torch.Tensor]) -> dict[str, object] | None:
    """The sizes that have a flag of that name everywhere; None if the state dict has no layout of ours."""
    sizes = sizes_of({name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    return sizes and {name: sizes[name] for name in ("vocab_size", "dim", "n_layers", "use_moe")}


def _difference(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """One message: what the file holds, what was asked for, and what to pass instead."""
    sizes, wanted = _describe(found), _describe(expected)
    if sizes is None:
        return f"{path} has another layout than this project's (its first name is {next(iter(found), None)!r})"
    if sizes != wanted:
        flags = " ".join(f"--{name} {sizes[name]}" for name in sizes if sizes[name] != wanted[name])
        return f"{path} holds a model of {_sizes(sizes)}, but {_sizes(wanted)} was asked for: pass {flags}"
    differences = [f"{name} missing" for name in expected if name not in found]
    differences += [f"{name} unexpected" for name in found if name not in expected]
    differences += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    return (
        f"{path} does not fit the model in {len(differences)} tensors ({'; '.join(differences[:4])}): "
        "make the model with the n_heads, n_kv_heads, hidden_dim, qk_norm and experts that the file was trained with"
    )


def _sizes(sizes: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())
