"""A model so small that the tests of the network take no time, and tokens for it."""

import torch

from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97, "max_seq_len": 64}


def make_model(seed: int = 0, **changes) -> MiniMindForCausalLM:
    """A tiny model whose weights are large enough for attention and logits to be far from uniform."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(LMConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_ids(B: int = 3, T: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))
