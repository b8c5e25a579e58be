"""Find a model and load it: a stage's weights, any .pth file, a folder of transformers, a GGUF file. Prints nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from common.device import DTYPES, choose_device, fast_dtype
from model.LMConfig import LMConfig
from model.loading import STAGE_SCRIPTS
from model.opening import describe, is_foreign, load_model
from model.record import of_training, read_record, read_shapes
from model.vocabulary import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_STAGE = "pretrain"  # its weights continue raw text instead of answering


@dataclass(frozen=True)
class Choice:
    """A model that is known, but not loaded yet.

    Attributes:
        path: of a .pth file, a folder, or a GGUF file.
        config: of the model there; None for a folder of transformers that holds another model than MiniMind.
        continue_text: it continues raw text, as after pretraining, instead of answering.
        out_dir: where adapters lie, in `lora/`.
        remarks: how its configuration is known, for the user.
        tokenizer_path: the directory of another tokenizer than the model's own.
    """

    path: Path
    config: LMConfig | None = None
    continue_text: bool = False
    out_dir: str = "out"
    remarks: tuple[str, ...] = ()
    tokenizer_path: str | None = None


def load_choice(
    choice: Choice, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode on its device, and its tokenizer.

    Raises:
        FileNotFoundError: weights or folder are missing; names the command that makes them.
        ValueError: they do not fit, or the device is not there.
    """
    where = choose_device(device)
    if choice.config is None:
        from model.folders import load_foreign  # and with it a table of every architecture, seldom needed

        model, tokenizer = load_foreign(choice.path)
    else:
        model = load_model(choice.config, choice.path)
        tokenizer = tokenizer_of(choice.path, choice.config.vocab_size, choice.tokenizer_path)
    return model.to(where, inference_dtype(dtype, where)).eval(), tokenizer


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of weights and arithmetic that `name` means; "auto" is what the device is fast at.

    On a CPU that is float32: for one row at a time PyTorch's bfloat16 matrix products are no faster there.
    """
    if name != "auto":
        return DTYPES[name]
    return fast_dtype(device) if device.type == "cuda" else torch.float32


def find_models(directory: str | Path) -> list[Choice]:
    """Every model in a directory: .pth files, folders of transformers, GGUF files; by name.

    What cannot be read, or is no model (adapters, states), is left out.
    """
    found = []
    for path in sorted(Path(directory).glob("*")):
        is_file = path.suffix in (".pth", ".gguf") and path.is_file()
        if not is_file and not (path / "config.json").is_file():
            continue
        if is_foreign(path):
            found.append(Choice(path, out_dir=str(directory)))
            continue
        try:
            if path.suffix == ".pth" and read_shapes(path) is None:
                continue
            config, remarks = describe(path, {})
        except (ValueError, OSError):
            continue
        found.append(Choice(path, config, continues_text(path), str(directory), tuple(remarks)))
    return found


def continues_text(path: Path) -> bool:
    """Whether weights continue raw text: a stage's record says so, also where they were converted; else the name."""
    record, _ = read_record(path)
    stage = record and of_training(record).get("stage")
    if stage in STAGE_SCRIPTS:
        return stage == TEXT_STAGE
    return re.fullmatch(TEXT_STAGE + r"_\d+(_moe)?\.pth", path.name) is not None
