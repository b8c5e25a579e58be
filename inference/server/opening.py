"""From files to an engine: the model, and every adapter that fits it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from inference.engine import Engine
from inference.models import Choice
from model.adapters import lora_path, read_lora, saved_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choice: Choice,
    lora_names: Sequence[str] = (),
    **settings,
) -> tuple[Engine, str | None]:
    """An engine that knows the adapters in `{out_dir}/lora`, and those that are named; and the first of the latter.

    Args:
        lora_names: adapters that must be there and fit; those that just lie there are left out otherwise.
        settings: of the engine.

    Raises:
        FileNotFoundError, ValueError: a named adapter is missing, damaged, or does not fit.
    """
    engine = Engine(model, tokenizer, **settings)
    try:
        names = [add_adapter(engine, model, choice, name) for name in lora_names]
        for name in [] if choice.config is None else saved_adapters(choice.out_dir, choice.config):
            if name in engine.adapters:
                continue
            try:
                add_adapter(engine, model, choice, name)
            except (ValueError, OSError) as error:
                logging.getLogger("minimind.server").warning("adapter %s is left out: %s", name, error)
    except BaseException:
        engine.close(timeout=0)
        raise
    return engine, names[0] if names else None


def add_adapter(engine: Engine, model: PreTrainedModel, choice: Choice, name: str) -> str:
    """Let an engine know an adapter; returns its name, without the directories of a path."""
    path = lora_path(choice.out_dir, name, model.config)
    short = Path(name).stem if name.endswith(".pth") else Path(name).name
    engine.add_adapter(short, read_lora(path, model.config))
    return short
