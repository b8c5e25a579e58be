"""Rotary position embedding (RoPE, arXiv 2104.09864): positions as angles, and their stretching to long contexts."""

import math

import torch

from .LMConfig import LMConfig


def rotary_frequencies(config: LMConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """Angle per token of each pair of channels (C/2,) in radians, float32, and a factor for cos and sin.

    Pair i turns by theta^(-2i/C) per token (RoPE, arXiv 2104.09864 eq. 15). `config.rope_scaling` stretches this to
    contexts longer than the model was trained on: "linear" slows every pair down (arXiv 2306.15595), "ntk" raises theta
    so that the fastest pair keeps its speed and the slowest takes the whole stretch, "yarn" leaves the fast pairs,
    slows the slow ones and blends in between (arXiv 2309.00071 section 3.2).
    """
    C, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor", 1.0)
    pairs = torch.arange(0, C, 2, device=device, dtype=torch.float32) / C  # 2i/C
    if kind == "ntk":
        theta = theta * factor ** (C / (C - 2))
    frequencies = 1.0 / theta**pairs
    if kind == "linear":
        frequencies = frequencies / factor
    if kind != "yarn":
        return frequencies, 1.0

    def pair_turning(turns: float) -> float:  # the (fractional) pair that makes so many turns in the trained context
        return C * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    trained = scaling.get("original_max_position_embeddings", config.max_seq_len)
    low = max(math.floor(pair_turning(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_turning(scaling.get("beta_slow", 1))), C - 1)
    blend = (torch.arange(C // 2, device=device, dtype=torch.float32) - low) / max(high - low, 1e-3)
    blend = blend.clamp(0, 1)  # 0: fast pair, kept; 1: slow pair, stretched
    attention_factor = scaling.get("attention_factor", 0.1 * math.log(factor) + 1.0)
    return frequencies * (1 - blend) + frequencies / factor * blend, attention_factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the channel pairs (i, i + C/2) of x (B, T, heads, C) by the angles behind cos and sin (B, T, 1, C/2)."""
    first, second = x.chunk(2, dim=-1)
    # cos and sin are float32, so the products are too: angles in bfloat16 would blur positions.
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
