"""MiniMindForCausalLM and the Auto classes of transformers, in this process. Folders with our code: own_code.py."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .LMConfig import LMConfig
from .model import MiniMindForCausalLM, MiniMindModel


def register_auto_classes() -> None:
    """From now on AutoModelForCausalLM.from_pretrained reads folders of our own class; trl's trainers need it."""
    AutoConfig.register(LMConfig.model_type, LMConfig, exist_ok=True)
    AutoModel.register(LMConfig, MiniMindModel, exist_ok=True)
    AutoModelForCausalLM.register(LMConfig, MiniMindForCausalLM, exist_ok=True)
