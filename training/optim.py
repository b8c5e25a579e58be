"""The arithmetic of an update: AdamW with the right parameter groups, learning rates, and a step that survives NaNs."""

import math

import torch
from torch import Tensor, nn


def lr_at(step: int, total_steps: int, peak: float, warmup: int = 0, schedule: str = "cosine") -> float:
    """Learning rate of optimizer step ``step`` (0-based).

    Linear warm-up over ``warmup`` steps, then
      cosine    peak * (0.1 + 0.45 * (1 + cos(pi * t)))       from peak to peak / 10
      upstream  peak / 10 + 0.5 * peak * (1 + cos(pi * t))    MiniMind 2025-02: from 1.1 peak to peak / 10
      constant  peak
    with t the share of the remaining steps that is done (t = 1 at the last step).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(1, total_steps - 1 - warmup)
    cosine = 1 + math.cos(math.pi * min(t, 1.0))
    if schedule == "cosine":
        return peak * (0.1 + 0.45 * cosine)
    if schedule == "upstream":
        return peak / 10 + 0.5 * peak * cosine
    if schedule == "constant":
        return peak
    raise ValueError(f"lr_schedule {schedule!r}: must be cosine, upstream or constant")


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) over the trainable parameters.

    Decay pulls matrices towards 0. Norm gains must stay near 1, and embedding rows of rare tokens get hardly any
    gradient to answer the pull with, so neither is decayed. beta2 = 0.95 forgets old gradients soon enough for short
    runs.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim >= 2 and id(parameter) not in embeddings:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=device in ("cuda", "cpu"),  # one kernel instead of ~10 per tensor
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_and_step(
    optimizer: torch.optim.Optimizer, scaler, grad_factor: Tensor, grad_clip: float
) -> tuple[Tensor, Tensor]:
    """Multiply the gradients by ``grad_factor``, clip their global norm, update the weights, clear the gradients.

    A step with a non-finite gradient changes nothing: fused AdamW takes the decision on the device (``found_inf``, the
    protocol that GradScaler uses), so nobody waits for it. For an optimizer without that the host looks, and waits.

    Args:
        scaler: torch.amp.GradScaler, disabled unless the dtype is float16.
        grad_factor: scalar tensor, e.g. 1 / (supervised tokens of the step).
        grad_clip: largest norm, 0 for none.
    Returns: (gradient norm before clipping, skipped = 1.0 if the step was dropped), scalar float32 tensors.
    """
    scaler.unscale_(optimizer)  # float16 only: the loss scale is divided out before the norm is taken
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    norm = torch.nn.utils.get_total_norm(gradients) * grad_factor  # that of the multiplied gradients
    factor = grad_factor
    if grad_clip > 0:
        # A norm of 4 with grad_clip 1 is multiplied by 1/4, one of 0.5 by 1.
        factor = factor * torch.clamp(grad_clip / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, factor)  # both factors in one pass over the gradients
    skipped = 1.0 - torch.isfinite(norm).float()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf, optimizer.grad_scale = skipped, None
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
    elif not skipped:
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
