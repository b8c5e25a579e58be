"""Mixture of experts: every token visits one shared expert and the best few of several routed ones.

Reading: DeepSeekMoE (arXiv 2401.06066) for the shared expert, Switch Transformer (arXiv 2101.03961) for load balance.
Shapes in comments: B batch, T tokens, D dim, E routed experts, k experts per token, N = B*T tokens, F expert width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .LMConfig import LMConfig


class Router(nn.Module):
    """One score per expert, logits = x W^T; in float32 even under autocast, because close scores decide."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., D) -> logits (..., E), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Experts(nn.Module):
    """The routed experts: as many SwiGLU layers, each weight stacked over the experts."""

    def __init__(self, config: LMConfig):
        super().__init__()
        n_experts, dim, width = config.n_routed_experts, config.dim, config.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(n_experts, width, dim))
        self.up_proj = nn.Parameter(torch.empty(n_experts, width, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, width))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x (M, D) sorted by expert -> (M, D); expert e takes rows offsets[e-1] to offsets[e], offsets (E,) int32.

        One grouped matrix product instead of a loop over experts with boolean masks: how many rows each expert gets
        stays on the device, so the host need not wait to learn it (but PyTorch does, inside, on GPUs older than H100,
        which have no grouped kernel).
        """
        gate, up = self.project("gate_proj", x, offsets), self.project("up_proj", x, offsets)
        return self.project("down_proj", F.silu(gate) * up, offsets)

    def project(self, name: str, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x (M, in) -> (M, out), by the stacked weight called `name`, in x's type."""
        return grouped_linear(x, getattr(self, name).to(x.dtype), offsets)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x (M, in), weight (E, out, in) -> (M, out): rows offsets[e-1] to offsets[e] of x times weight[e]^T."""
    if x.dtype == torch.bfloat16 or not torch.compiler.is_compiling():
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    from .uncompiled import grouped_mm  # and with it all of torch.compile, which takes a second

    return grouped_mm(x, weight.transpose(1, 2), offsets)


def block_for(x: torch.Tensor, n_visits: int) -> int:
    """Rows by which an expert's share grows: 64 in bfloat16 on a CPU, else 1.

    There, oneDNN compiles a program (milliseconds, 2 MB) for every number of rows that it has not seen lately, and
    without padding every expert of every layer would have a new one in every step.
    """
    return 64 if x.device.type == "cpu" and x.dtype == torch.bfloat16 and n_visits >= 2048 else 1


class MoEFeedForward(nn.Module):
    """Shared expert plus the top k routed experts, weighted by the router's softmax.

    Training and inference take the same differentiable path. No token is dropped: an expert takes what it is sent.
    """

    def __init__(self, config: LMConfig, shared_expert: nn.Module | None):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = shared_expert

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, D) -> y (B, T, D) and the router's logits (B, T, E)."""
        router_logits = self.gate(x)
        weights, chosen = router_logits.flatten(0, 1).softmax(-1).topk(self.top_k, dim=-1)  # (N, k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)

        if torch.is_autocast_enabled(x.device.type):  # autocast passes over the grouped product: cast here
            x = x.to(torch.get_autocast_dtype(x.device.type))
        source, place, offsets = group_visits(chosen, router_logits.shape[-1], block_for(x, chosen.numel()))
        visits = x.flatten(0, 1).index_select(0, source)  # (M, D), those to the same expert side by side
        y = self.experts(visits, offsets).index_select(0, place)  # (N*k, D) back in the tokens' order
        y = (y.unflatten(0, (-1, self.top_k)) * weights[..., None].to(y.dtype)).sum(1).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, router_logits


def group_visits(chosen: torch.Tensor, n_experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table of all visits (a visit is one token at one expert) in which those to the same expert lie side by side.

    Each expert's rows are filled up to a multiple of `block`. The number of rows, M, follows from the shapes alone: the
    host need not wait for the router.

    Args: chosen: (N, k) the experts of each token.
    Returns:
        source: (M,) the token in each row; 0 in rows that fill up, whose results nobody reads.
        place: (N*k,) the row of each visit, token by token.
        offsets: (E,) int32, the row after each expert's last; the last expert takes all that is left.

    Three tokens that choose two of three experts each, in blocks of 2:

        chosen   [[2 0] [0 1] [0 2]]    visit 0 is token 0 at expert 2, visit 1 token 0 at expert 0, ...
        expert   0 0 0 1 2 2            sorted; `order` 1 2 4 3 0 5 are the visits, the token is visit // 2
        counts   3 1 2                  visits of each expert; `padded` 4 2 2
        source   0 1 2 - 1 - 0 2        row 3 fills up expert 0, row 5 expert 1, and four more rows the last expert
        place    6 0 1 4 2 7            the row of visit 0, visit 1, ...
        offsets  4 6 12
    """
    n_visits, top_k = chosen.numel(), chosen.shape[1]
    # Each expert's last block may be hardly begun: so many rows are enough, whatever the router says.
    n_rows = n_visits if block == 1 else (n_visits // block + n_experts) * block
    expert, order = chosen.flatten().sort(stable=True)
    # torch.bincount would count as well, but make the host wait to learn how long its result is.
    ends = torch.searchsorted(expert, torch.arange(n_experts, device=chosen.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    padded = (counts + block - 1) // block * block  # rounded up
    offsets = padded.cumsum(0)
    first_rows = offsets - padded  # of each expert, in the table: 0 4 6
    first_visits = ends - counts  # of each expert, in `order`: 0 3 4
    shift = first_rows - first_visits
    rows = torch.arange(n_visits, device=chosen.device) + shift[expert]  # 0 1 2 4 6 7
    source = rows.new_zeros(n_rows).scatter(0, rows, order // top_k)
    place = torch.empty_like(rows).scatter(0, order, rows)
    offsets = torch.cat((offsets[:-1], offsets.new_full((1,), n_rows)))
    return source, place, offsets.int()


def expert_share(router_logits: torch.Tensor, top_k: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Share of the visits that each expert gets: (..., T, E) logits -> (..., E), sums to one; 1/E each is balance.

    `real` (..., T) marks the tokens that count. Never waits for the device, so a training loop may keep the result
    and print it later.
    """
    used = torch.zeros_like(router_logits).scatter(-1, router_logits.topk(top_k, dim=-1).indices, 1.0 / top_k)
    return _mean_over_tokens(used, real)


def load_entropy(share: torch.Tensor) -> torch.Tensor:
    """How even the load is: entropy of expert shares (..., E), divided by log E: 1 is balance, 0 collapse to one."""
    return torch.special.entr(share).sum(-1) / math.log(share.shape[-1])


def load_balance_loss(
    router_logits: torch.Tensor, top_k: int, real: torch.Tensor | None = None, per_sequence: bool = True
) -> torch.Tensor:
    """E * sum_e share_e * probability_e (Switch Transformer eq. 4-6), summed over layers: 1 per layer at balance.

    Args:
        router_logits: (n_layers, B, T, E).
        top_k: experts per token.
        real: (B, T) bool, True for tokens that count; None for all.
        per_sequence: share and mean probability over each sequence (DeepSeek-V2 eq. 23), else over the whole batch.

    Returns:
        (B,) float32; with per_sequence=False the same number B times. Differentiable through the probabilities.
    """
    n_layers, B, T, n_experts = router_logits.shape
    real = torch.ones(B, T, device=router_logits.device, dtype=torch.bool) if real is None else real
    real = real.expand(n_layers, B, T)
    if not per_sequence:
        router_logits, real = router_logits.reshape(n_layers, 1, B * T, n_experts), real.reshape(n_layers, 1, B * T)
    share = expert_share(router_logits, top_k, real)  # (n_layers, B or 1, E)
    probability = _mean_over_tokens(router_logits.softmax(-1), real)
    return n_experts * (share * probability).sum((0, 2)).expand(B)


def _mean_over_tokens(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Mean over the second to last dimension of x (..., T, E), of the tokens that `real` (..., T) marks."""
    if real is None:
        return x.mean(-2)
    real = real.unsqueeze(-1).to(x.dtype)
    return (x * real).sum(-2) / real.sum(-2).clamp(min=1)
