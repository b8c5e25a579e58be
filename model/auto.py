"""MiniMindForCausalLM and the Auto classes of transformers: in this process, and in folders that carry their code."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from .LMConfig import LMConfig
from .model import MiniMindForCausalLM, MiniMindModel


def register_auto_classes() -> None:
    """From now on AutoModelForCausalLM.from_pretrained reads folders of our own class; trl's trainers need it."""
    AutoConfig.register(LMConfig.model_type, LMConfig, exist_ok=True)
    AutoModel.register(LMConfig, MiniMindModel, exist_ok=True)
    AutoModelForCausalLM.register(LMConfig, MiniMindForCausalLM, exist_ok=True)


def save_with_code(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """A folder that transformers 5 reads with trust_remote_code=True where this project is not: it holds the code.

    For who wants our own class elsewhere. Native folders (scripts/convert_model.py) need no code and run in more
    places.
    """
    LMConfig.register_for_auto_class()
    MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    # transformers writes down one class, and engines that bring their own head ask for the backbone.
    model.config.auto_map = {"AutoModel": "model.MiniMindModel"}
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
