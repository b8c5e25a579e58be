"""The operation that torch.compile leaves out of its graphs. Imported only inside a compiled model."""

import torch
import torch.nn.functional as F


@torch.compiler.disable  # torch.compile knows this operation's output shape for bfloat16 only (torch 2.11 to 2.13)
def grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x (M, in), weight (E, in, out) -> (M, out), see moe.grouped_linear."""
    return F.grouped_mm(x, weight, offs=offsets)
