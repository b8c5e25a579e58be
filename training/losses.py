"""Losses that two or more stages use. All are sums over the micro-batch: the loop divides once, by the step's weight.

A micro-batch is a dict (see dataset/batching.py):
    input_ids (B, T) int64    right-padded rows
    lengths   (B,)   int64    real tokens of each row
    positions (N,)   int64    flat places b*T + t whose next token is supervised
    targets   (N,)   int64    that next token
"""

import torch
from torch import Tensor

from model.moe import expert_share, load_entropy

CHUNK = 512  # rows of logits that are float32 at the same time: 13 MB of our vocabulary


def supervised_forward(model, batch: dict[str, Tensor]):
    """The forward pass of every stage: logits (N, V) at the supervised positions, aux_loss (B,), router logits."""
    return model(batch["input_ids"], lengths=batch["lengths"], supervised=batch["positions"], output_router_logits=True)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target. logits (N, V) any dtype, targets (N,) -> (N,) float32, in nats."""
    return TokenNLL.apply(logits, targets)


class TokenNLL(torch.autograd.Function):
    """logsumexp(logits) - logits[target] of each row; its derivative is softmax(logits) - one_hot(target).

    Goes through the rows in chunks, so the (N, V) tables in float32 that `F.cross_entropy` makes, three at a time,
    never exist: between the two passes only the logits are kept, and one number a row.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        log_total, chosen = logits.new_empty(2, len(logits), dtype=torch.float32)
        for rows in chunks(len(logits)):
            log_total[rows] = logits[rows].float().logsumexp(-1)
            chosen[rows] = logits[rows].gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(logits, targets, log_total)
        return log_total - chosen

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_total = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in chunks(len(logits)):
            softmax = (logits[rows].float() - log_total[rows, None]).exp_()
            one_hot = torch.ones_like(softmax[:, :1])
            difference = softmax.scatter_add_(1, targets[rows, None], -one_hot)
            result[rows] = difference.mul_(gradient[rows, None])
        return result, None


def chunks(count: int) -> list[slice]:
    """``count`` rows in slices of CHUNK."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def sum_per_row(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B,): the sum over each row of a number per supervised token, (N,).

    The numbers first take their places in a table (B, T) of zeros. Every place occurs once, so that is deterministic on
    every device, which adding up by row would not be; and torch.bincount would make the host wait for the device to
    learn how long its result is.
    """
    rows, width = batch["input_ids"].shape  # rows 2, width 4, positions 1 2 6, values a b c:
    table = values.new_zeros(rows * width).scatter(0, batch["positions"], values)  # 0 a b 0  0 0 c 0
    return table.view(rows, width).sum(1)  # a + b, c


def supervised_per_row(batch: dict[str, Tensor]) -> Tensor:
    """(B,) int64: how many supervised tokens each row of the batch holds."""
    return sum_per_row(torch.ones_like(batch["positions"]), batch)


def answer_logprobs(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B,) float32: the log-probability of each row's supervised tokens, summed.

    Args: logits: (N, V) at the supervised positions.
    """
    return sum_per_row(-token_nll(logits, batch["targets"]), batch)


def balance_loss(aux_loss: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The MoE load-balancing loss as a sum over supervised tokens: each row's value counts once per token.

    Weighting by tokens makes the step's gradient independent of how rows are grouped into micro-batches.
    aux_loss: (B,) per row, zeros for a dense model.
    """
    return (aux_loss * supervised_per_row(batch)).sum()


def moe_metrics(model, output, batch: dict[str, Tensor], row_weights: Tensor) -> dict[str, Tensor]:
    """Balance loss of a mixture of experts and how evenly it uses them, as metric sums; nothing for a dense model.

    ``aux_loss``: the part of the loss that asks for balance. ``expert_0``, ``expert_1``, ...: share of the visits, mean
    over layers. ``expert_entropy``: of a layer's shares, mean over layers; 1 is balance, 0 a router that knows one
    expert only. ``expert_min``: the smallest share in any layer; near 0 an expert is dying. The last two are of the
    micro-batch. Nothing here waits for the device.
    Args: row_weights: (B,) how much each row counts; they add up to the loss's weight.
    """
    if not output.router_logits:
        return {}
    config = getattr(model, "module", model).config  # DeepSpeed's engine has a config of its own
    rows, width = batch["input_ids"].shape
    real = torch.arange(width, device=row_weights.device) < batch["lengths"][:, None]
    logits = torch.stack(output.router_logits).detach().unflatten(1, (rows, width))  # (layers, B, T, E)
    share = expert_share(logits, config.num_experts_per_tok, real.expand(len(logits), rows, width))
    sums = (share * row_weights[:, None]).sum(1)  # (layers, E)
    weight = row_weights.sum().float()
    share = sums / weight.clamp(min=1e-6)
    figures = {f"expert_{i}": value for i, value in enumerate(sums.mean(0).unbind())}
    return {
        "aux_loss": (output.aux_loss.detach() * row_weights).sum(),
        **figures,
        "expert_entropy": load_entropy(share).mean() * weight,
        "expert_min": share.min() * weight,
    }


def next_token_loss(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Next-token cross-entropy over the supervised positions of a micro-batch: pretraining, SFT and LoRA.

    Returns: (loss sum, weight = number of supervised tokens, metric sums over the same weight).
    A batch without supervised tokens gives 0, weight 0 and zero gradients, never NaN.
    """
    output = supervised_forward(model, batch)
    nll = token_nll(output.logits, batch["targets"]).sum()
    aux = balance_loss(output.aux_loss, batch)
    weight = nll.new_full((), len(batch["targets"]))
    return nll + aux, weight, {"nll": nll.detach(), **moe_metrics(model, output, batch, supervised_per_row(batch))}
