"""Mixture of experts: each token visits one shared expert and the best few of several routed ones.

Reading: DeepSeekMoE (arXiv 2401.06066) for shared experts, Switch Transformer (arXiv 2101.03961) for load balance.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .LMConfig import LMConfig


class Router(nn.Module):
    """A linear score per expert; computed in float32, because close scores decide between experts."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., D) -> logits (..., experts)."""
        return F.linear(x, self.weight).float()


class Experts(nn.Module):
    """The routed experts, SwiGLU layers stacked in two tensors."""

    def __init__(self, config: LMConfig):
        super().__init__()
        E, D, F_ = config.n_routed_experts, config.dim, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))


class MoEFeedForward(nn.Module):
    """Shared expert plus the top-k routed experts, weighted by the router's softmax."""

    def __init__(self, config: LMConfig, feed_forward: type[nn.Module]):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = feed_forward(config) if config.n_shared_experts else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, D) -> y (B, T, D), router logits (B, T, experts)."""
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        dense = torch.zeros_like(logits).scatter(-1, chosen, weights)  # (B, T, E)
        gate, up = torch.einsum("btd,efd->btef", x, self.experts.gate_up_proj).chunk(2, dim=-1)
        h = F.silu(gate) * up * dense[..., None].to(gate.dtype)
        y = torch.einsum("btef,edf->btd", h, self.experts.down_proj)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, logits


def load_balance_loss(
    router_logits: torch.Tensor, top_k: int, real: torch.Tensor | None, per_sequence: bool
) -> torch.Tensor:
    """Loss (B,) from router logits (L, B, T, E), 1 per layer when all experts are equally used; `real` (B, T) bool."""
    L, B, T, E = router_logits.shape
    probabilities = router_logits.softmax(-1)
    used = F.one_hot(probabilities.topk(top_k, dim=-1).indices, E).sum(-2).float()  # (L, B, T, E)
    weight = (torch.ones(B, T, device=router_logits.device) if real is None else real.float())[None, :, :, None]
    over = (2,) if per_sequence else (1, 2)
    tokens = weight.sum(over, keepdim=True).clamp(min=1)
    share = (used * weight).sum(over, keepdim=True) / tokens / top_k
    mean_probability = (probabilities * weight).sum(over, keepdim=True) / tokens
    return (E * share * mean_probability).sum((0, 2, 3)).expand(B)
