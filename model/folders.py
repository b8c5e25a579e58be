"""Model folders in the format of transformers: config.json, weights in safetensors or .bin, a tokenizer.

A folder is MiniMind if its config.json says so, in any form that was ever published, or if it describes another
architecture that computes the same (architectures.py). Nothing in a folder is executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from common.files import remove_leftovers
from common.tensor_files import (
    UnreadableFile,
    check_checksums,
    is_state_dict,
    map_torch_file,
    one_line,
    read_torch_file,
)

from .architectures import (
    ARCHITECTURES,
    LAYOUT_OF,
    NotMiniMind,
    check_model_type,
    from_transformers,
    to_transformers,
)
from .config_json import config_of_any_age
from .layouts import LAYOUTS, from_ours, recognise, to_ours
from .LMConfig import LMConfig
from .loading import check_finite, check_vocabulary, load_tokenizer
from .own_code import AUTO_MAP, write_code
from .sizes import misfits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_folder(path: str | Path) -> tuple[LMConfig, dict[str, Tensor]]:
    """The configuration and the tensors, in our layout and in the types that they have, of a MiniMind in a folder.

    Raises:
        FileNotFoundError: there is no config.json, or there are no weights.
        ValueError: it cannot be read, or is no MiniMind; says what differs.
    """
    return _understood(Path(path), read_tensors)


def folder_config(path: str | Path) -> LMConfig:
    """The configuration alone, in milliseconds: of the weights only names and shapes are read.

    Raises:
        NotMiniMind: it is the folder of another sound model. Else what `read_folder` raises.
    """
    return _understood(Path(path), read_shapes_of_folder)[0]


def _understood(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> tuple[LMConfig, dict[str, Tensor]]:
    """Configuration and tensors of a folder in our layout; `read` gets the tensors, whole or as mere shapes."""
    fields = _read_json(path / "config.json")
    tensors = read(path)
    try:
        if fields.get("model_type") == LMConfig.model_type:
            layout = recognise(tensors)
            config = config_of_any_age(fields, tensors, layout)
        else:
            check_model_type(fields.get("model_type"))
            config = from_transformers(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False))
            layout = LAYOUTS[LAYOUT_OF[fields["model_type"]]]
        tensors = to_ours(tensors, layout, config.head_dim)
        if differing := misfits(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            raise ValueError(f"its config.json says {differing}: take both from the same release")
        return config, tensors
    except ValueError as error:
        kind = NotMiniMind if isinstance(error, NotMiniMind) else ValueError
        raise kind(f"{path}: {error}") from error
    except Exception as error:  # of transformers, at a config.json with values that make no sense
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{path / 'config.json'}: {problem}: correct it, or copy the one of the release") from error


def load_foreign(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model that is no MiniMind, and its tokenizer, as transformers reads them. Runs no code from there.

    Raises:
        FileNotFoundError: the folder holds no config.json, no weights or no tokenizer.
        ValueError: its weights are damaged, hold NaN, or are not those of the model that config.json describes.
    """
    path = Path(path)
    _read_json(path / "config.json")
    try:
        for file in path.glob("*.bin"):
            check_checksums(file)
        # Sizes that differ are told below, in one message with names that differ.
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,  # without it, transformers asks at the terminal whether to run the folder's code
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # of transformers, and of the packages that a config.json may ask for
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {one_line(error)})") from error
    if any(found.values()):
        raise ValueError(_misfit(path, type(model).__name__, found))
    check_finite(path, model.state_dict(), make_with=None)
    tokenizer = load_tokenizer(path)
    check_vocabulary(path, tokenizer, model.get_input_embeddings().num_embeddings)
    return model, tokenizer


def _misfit(path: Path, architecture: str, found: dict[str, set]) -> str:
    """What transformers filled with random numbers, left out, or would not take, in one message.

    A tied output matrix and the tables that old files keep of rotary positions are not among it.
    """
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    sizes = [f"{name} is {tuple(has)}, not {tuple(wants)}" for name, has, wants in sorted(found["mismatched_keys"])]
    kinds = {"missing": missing, "not expected": unexpected, "of another size": sizes}
    parts = [f"{len(names)} {kind} ({', '.join(names[:2])})" for kind, names in kinds.items() if names]
    remedy = "take config.json and weights from the same release, or save the model again with save_pretrained"
    return f"{path} does not fit its config.json, a {architecture}: {'; '.join(parts or found['error_msgs'])}. {remedy}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from safetensors where there are any, else from .bin files; every byte is checked.

    Raises:
        FileNotFoundError: there are neither. ValueError: a file is damaged, or holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        with _reasons(file):
            tensors |= load_file(file) if file.suffix == ".safetensors" else _state_dict(read_torch_file(file))
    return tensors


def read_shapes_of_folder(path: Path) -> dict[str, Tensor]:
    """The same tensors without their numbers (on the device "meta"); raises what `read_tensors` raises."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(path):
        with _reasons(file):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
            else:
                shapes |= {name: tuple(tensor.shape) for name, tensor in _state_dict(map_torch_file(file)).items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _state_dict(value: object) -> dict[str, Tensor]:
    if not is_state_dict(value):
        raise UnreadableFile("is not a state dict, a table from names to tensors")
    return value


@contextlib.contextmanager
def _reasons(file: Path) -> Iterator[None]:
    """Raises ValueError, with the file and a remedy, for what the libraries say of a file that they cannot read."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off or damaged ({one_line(error)}): copy or make it again") from error
    except UnreadableFile as error:
        raise ValueError(f"{file} {error}: copy or make it again") from error


def _weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's tensors. Raises FileNotFoundError if there are none, or one is missing."""
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{path} holds no weights: *.safetensors or pytorch_model*.bin are needed")
    if missing := _named_in_index(path, files[0].suffix) - {file.name for file in files}:
        raise FileNotFoundError(f"{path} lacks {', '.join(sorted(missing))}, which its index names: copy it whole")
    if others := [file for file in files if not file.is_file()]:
        raise ValueError(f"{others[0]} is a folder, a pipe, a device or a broken link, no file: copy the file itself")
    return files


def write_folder(
    path: Path,
    config: LMConfig,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that transformers (4.57 and 5), vLLM, SGLang, trl and peft load without our code, or with it.

    Args:
        path: an empty directory.
        tensors: in our layout; stored as `dtype`.
        model_type: the architecture, see `architectures.native_architecture`; "minimind" is our own class, whose code
            comes with it (own_code.py), for transformers 5 alone.

    Raises:
        ValueError: the architecture does not compute the same. OSError: the disk is full or not writable.
    """
    if model_type == LMConfig.model_type:
        layout = LAYOUTS["ours"]
        fields = {**config.to_dict(), "architectures": ["MiniMindForCausalLM"], "auto_map": AUTO_MAP}
        write_code(path)
    else:
        layout = LAYOUTS[LAYOUT_OF[model_type]]
        fields = to_transformers(config, model_type).to_dict()
        rope = fields["rope_parameters"]
        fields |= {
            "architectures": [ARCHITECTURES[model_type]],
            # Written twice: transformers 5 reads `rope_parameters`, 4 the older names.
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
        }
        if model_type == "qwen3_moe":
            fields["num_experts"] = config.n_routed_experts
    # So is the type: `dtype` and `torch_dtype`.
    fields |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    named = from_ours(tensors, layout, config.head_dim)
    del named["lm_head.weight"]  # tied: it is the embedding
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in named.items()}
    try:
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # what the disk said, in another type
        raise OSError(f"{path.parent}: {error}; make room there or pass another place") from error
    shutil.copymode(path / "config.json", path / "model.safetensors")  # which safetensors lets its owner alone read
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.85,
        top_p=0.85,
        max_new_tokens=1024,
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    _name_tokenizer_class(path / "tokenizer_config.json")


def _name_tokenizer_class(path: Path) -> None:
    """By the name that transformers 4 knows too, instead of 5's own; and nothing of how this one was loaded."""
    fields = _read_json(path)
    for name in ("backend", "is_local", "local_files_only"):
        fields.pop(name, None)
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Without this, transformers 4 returns token_type_ids too, which generate() refuses.
    fields["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `path` when the block has ended well, and is removed when not.

    Raises:
        FileExistsError: there is something of that name.
    """
    if not path.name:
        raise ValueError(f"{path} has no name: say what the new folder is to be called")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists: remove it, or choose another name")
    with _temporary_directory(path) as temporary:
        yield temporary
        if path.is_dir():
            path.rmdir()  # empty
        temporary.rename(path)


@contextlib.contextmanager
def new_files(*paths: Path) -> Iterator[list[Path]]:
    """Two files or more of one directory to write, under the same names in a temporary one.

    They get their places when the block has ended well, the first of `paths` last: where it is, the others are.

    Raises:
        FileExistsError: there is something of one of these names.
    """
    for path in paths:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists: choose another name, or remove it")
    with _temporary_directory(paths[0]) as temporary:
        written = [temporary / path.name for path in paths]
        yield written
        placed: list[Path] = []
        try:
            for file, path in reversed(list(zip(written, paths, strict=True))):
                _place(file, path)
                placed.append(path)
        except OSError:
            for path in placed:
                path.unlink()
            raise


def _place(file: Path, path: Path) -> None:
    """Give a file another name, which os.replace would take from whatever got it while this one was written.

    Raises:
        FileExistsError: there is something of that name.
    """
    try:
        os.link(file, path)
    except OSError as error:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists since a moment ago: choose another name, or remove it") from error
        file.rename(path)  # no hard links here, as on memory sticks


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path`, removed when the block ends, or by the next that is made for this path."""
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _named_in_index(path: Path, suffix: str) -> set[str]:
    """The files among which the index of a large model distributes its tensors; none for a model in one file."""
    names: set[str] = set()
    for index in path.glob(f"*{suffix}.index.json"):
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{index} has no weight_map from names of tensors to names of files: copy it again")
        names |= set(files.values())
    return names


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a folder in the format of transformers is needed here")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return fields
