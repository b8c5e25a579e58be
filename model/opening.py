"""Whatever names a model, opened: a .pth file of any age, a folder in the format of transformers, or a GGUF file.

    describe        its configuration, in milliseconds and without slow libraries: for the flags
    load_weights    its tensors, into a model
    open_model      configuration, tensors in our layout, tokenizer, and what the user is to know of it

Every program reads models by these: training (--from_weight, --teacher_path), eval_model.py (--load, --weight) and
scripts/convert_model.py. Nothing in a file is executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.files import is_special

from .layouts import recognise, to_ours
from .LMConfig import LMConfig
from .loading import fill, make_command, new_model, not_found, read_state_dict, require_weights
from .record import AN_ADAPTER, config_for, is_peft
from .sizes import Given, agreed
from .vocabulary import tokenizer_of, with_token_ids

if TYPE_CHECKING:
    from .model import MiniMindForCausalLM


@dataclass(frozen=True)
class Source:
    """A model that was read: its configuration, its tensors in our layout, and what the user is to know of it.

    adapter: the file of the one that was merged into it, see adapter_conversion.py.
    """

    path: Path
    config: LMConfig
    tensors: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    remarks: list[str]
    adapter: Path | None = None

    def model(self) -> MiniMindForCausalLM:
        """The model in float32, in evaluation mode; ValueError if the tensors do not fit it."""
        model = new_model(self.config).eval()
        fill(model, self.tensors, self.path, make_with=None)
        return model


def is_path(name: str) -> bool:
    """Whether a name of weights is that of a file or folder, and not a stage's: ./MiniMind2, x.pth, but full_sft."""
    is_there = os.path.dirname(name) != "" and os.path.exists(name)
    return is_there or name.endswith((".pth", ".gguf")) or has_config(name)


def has_config(path: str | Path) -> bool:
    """Whether this is a folder of transformers; False too for what cannot be a path, such as one too long."""
    return os.path.isfile(os.path.join(path, "config.json"))


def kind_of(path: Path) -> str:
    """ "pth", "gguf" or "folder"; what is not there is what its name says. ValueError for another kind of file."""
    if is_special(path):
        raise ValueError(f"{path} is a pipe or a device, no file: pass a .pth or .gguf file, or a folder")
    if path.suffix in (".pth", ".gguf") and not path.is_dir():
        return path.suffix[1:]
    if path.suffix == ".safetensors" and path.is_file():
        raise ValueError(f"{path}: pass the folder that it lies in, which says in config.json what model it is")
    if path.suffix == ".onnx" and path.is_file():
        raise ValueError(
            f"{path}: ONNX is for onnxruntime alone: pass the .pth file, folder or .gguf file of this model"
        )
    if is_peft(path):
        raise ValueError(f"{path}: {AN_ADAPTER}")
    return "pth" if path.is_file() else "folder"


def is_foreign(path: str | Path) -> bool:
    """Whether a folder holds a causal model of transformers that is no MiniMind: one can talk to it or learn from it.

    False for what is missing or damaged, too: whoever loads it will say what is wrong.
    """
    if not has_config(path):
        return False
    from .architectures import NotMiniMind  # and with them a table of every architecture, which --help does not need
    from .folders import folder_config

    try:
        folder_config(path)
    except NotMiniMind:
        return True
    except (ValueError, OSError):
        return False
    return False


def describe(path: Path, given: Mapping[str, Given]) -> tuple[LMConfig, list[str]]:
    """The configuration of the model that lies there, and remarks for the user on how it is known.

    Args:
        given: fields that the user gave; see `agreed`.

    Raises:
        NotMiniMind: a folder of another sound model. FileNotFoundError: a folder is incomplete.
        ValueError: it is damaged, no model, or not what is given; with what was expected and what was found.
    """
    kind = kind_of(path)
    if kind == "pth":
        return config_for(path, given)
    if kind == "gguf":
        from .gguf_reader import gguf_config  # and with it the package, which is optional

        return agreed(gguf_config(path), given, f"{path} (as its metadata say)"), []
    from .folders import folder_config

    return agreed(folder_config(path), given, f"{path} (as its config.json says)"), []


def read_tensors(path: Path, config: LMConfig, make_with: str | None = None) -> tuple[dict[str, Tensor], str]:
    """All tensors of the model that lies there, in our layout, and the name of a file's own layout ("" of a folder).

    Args:
        config: as `describe` says it.
        make_with: the command that makes a .pth file, for the error messages.

    Raises: what `load_weights` raises.
    """
    kind = kind_of(path)
    if kind == "gguf":
        from .gguf_reader import gguf_tensors

        return gguf_tensors(path), "GGUF"
    if kind == "folder":
        from .folders import read_folder

        return read_folder(path)[1], ""
    state_dict = read_state_dict(path, make_with)
    try:
        layout = recognise(state_dict)
        return to_ours(state_dict, layout, config.head_dim), layout.name
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(model: nn.Module, path: str | Path, make_with: str | None = None) -> None:
    """Load weights into `model`: same names, same shapes, nothing missing, nothing left over.

    Args:
        model: a MiniMindForCausalLM of the sizes that `describe` says.
        path: a .pth file of this project or of MiniMind of any age, a folder, or a GGUF file.
        make_with: the command that makes a .pth file, for the error message; derived from its name by default.

    Raises:
        FileNotFoundError: it is missing, see `require_weights`.
        ValueError: it is damaged, holds something else than tensors, or a model of another size.
    """
    path = Path(path)
    make_with = make_with or make_command(path, model.config)
    require_weights(path, model.config, make_with)
    tensors, _ = read_tensors(path, model.config, make_with)
    fill(model, tensors, path, make_with)


def load_model(config: LMConfig, path: str | Path, device: str | torch.device = "cpu") -> MiniMindForCausalLM:
    """A model in evaluation mode with the weights that lie at `path`; raises what `load_weights` raises."""
    require_weights(path, config)  # before the model is imported and made
    model = new_model(config)
    load_weights(model, path)
    return model.to(device).eval()


def open_model(path: str | Path, given: Mapping[str, Given], tokenizer_path: str | None = None) -> Source:
    """All of the model that lies there.

    Args:
        given: fields that the user gave; see `agreed`.
        tokenizer_path: the directory of another tokenizer than its own; see vocabulary.py.

    Raises: what `describe`, `load_weights` and `tokenizer_of` raise.
    """
    path = Path(path)
    if not path.exists():
        raise not_found(path, "check the path")
    config, remarks = describe(path, given)
    tensors, layout = read_tensors(path, config)
    tokenizer = tokenizer_of(path, config.vocab_size, tokenizer_path)
    config = with_token_ids(config, tokenizer)
    kind = "mixture of experts" if config.use_moe else "dense"
    sizes = f"{kind}, dim {config.dim}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"
    found = f"{path}: {sizes}" + (f", layout {layout}" if layout else "")
    return Source(path, config, tensors, tokenizer, [found, *remarks])
