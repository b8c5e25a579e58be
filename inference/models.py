"""Find a model and load it: a stage's weights, any .pth file, or a folder of transformers. Prints nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from common.device import DTYPES, choose_device, fast_dtype
from model.LMConfig import LMConfig
from model.loading import STAGE_SCRIPTS, check_vocabulary, load_model, load_tokenizer
from model.record import config_for, read_record, read_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_STAGE = "pretrain"  # its weights continue raw text instead of answering


@dataclass(frozen=True)
class Choice:
    """A model that is known, but not loaded yet.

    Attributes:
        path: of a .pth file, or of a folder.
        config: of the model in a .pth file; None for a folder, which says it itself.
        continue_text: it continues raw text, as after pretraining, instead of answering.
        out_dir: where adapters lie, in `lora/`.
        remarks: how its configuration is known, for the user.
    """

    path: Path
    config: LMConfig | None = None
    continue_text: bool = False
    out_dir: str = "out"
    remarks: tuple[str, ...] = ()


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
        from model.folders import load_directory  # and with it every architecture of transformers, seldom needed

        model, tokenizer = load_directory(choice.path)
    else:
        model, tokenizer = load_model(choice.config, choice.path), load_tokenizer()
        check_vocabulary(choice.path, tokenizer, choice.config.vocab_size)
    return model.to(where, inference_dtype(dtype, where)).eval(), tokenizer


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of weights and arithmetic that `name` means; "auto" is what the device is fast at.

    On a CPU that is float32: for one row at a time PyTorch's bfloat16 matrix products are no faster there.
    """
    if name != "auto":
        return DTYPES[name]
    return fast_dtype(device) if device.type == "cuda" else torch.float32


def find_models(directory: str | Path) -> list[Choice]:
    """Every model in a directory: .pth files, and folders of transformers; by name.

    Files that cannot be read, or are no models (adapters, states), are left out.
    """
    directory, found = Path(directory), []
    for path in sorted(directory.glob("*")):
        if path.suffix == ".pth" and path.is_file():
            try:
                if read_shapes(path) is None:
                    continue
                config, remarks = config_for(path, {})
            except ValueError:
                continue
            found.append(Choice(path, config, continues_text(path), str(directory), tuple(remarks)))
        elif (path / "config.json").is_file():
            found.append(Choice(path, out_dir=str(directory)))
    return found


def continues_text(path: Path) -> bool:
    """Whether weights continue raw text: a stage's record says so; of others, such as converted ones, the name."""
    record, _ = read_record(path)
    if record and record.get("stage") in STAGE_SCRIPTS:
        return record["stage"] == TEXT_STAGE
    return re.fullmatch(TEXT_STAGE + r"_\d+(_moe)?\.pth", path.name) is not None
