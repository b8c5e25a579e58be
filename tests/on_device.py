"""One micro-batch and one step of every stage on a device: what a test looks on while it happens."""

import numpy as np
import torch
from torch import Tensor, nn
from toy import toy_model, toy_sequences

import train_distill_reason
import train_distillation
import train_dpo
from model.model_lora import LORA_TARGETS, apply_lora
from training.loop import add_gradients
from training.losses import next_token_loss
from training.optim import make_optimizer
from training.processes import Run
from training.stats import StepStats
from training.teacher import freeze
from training.updater import Updater

STAGES = ("next token", "lora", "dpo", "distillation", "reasoning")


def collate(ids: np.ndarray) -> dict[str, Tensor]:
    """A batch that suits every stage: for DPO, the first half of the rows is chosen and the second rejected."""
    return {**toy_sequences().collate(ids), "pairs": torch.arange(len(ids) // 2)}


def make_stage(name: str, run: Run, use_moe: bool) -> tuple[nn.Module, object]:
    """The model that a stage trains, on the device, and its loss function."""
    with run.device:
        model = toy_model(use_moe=use_moe).train()
        if name == "lora":
            apply_lora(model, 4, None, 0.0, LORA_TARGETS, None)
        if name == "dpo":
            return model, train_dpo.make_loss(torch.zeros(9, 2))
        if name == "distillation":
            return model, train_distillation.make_loss(freeze(toy_model(use_moe=use_moe), run.dtype))
    if name == "reasoning":
        return model, train_distill_reason.make_loss([[5], [6, 7]], tag_weight=10.0)
    return model, next_token_loss


def make_updater(run: Run, model: nn.Module, use_compile: bool = False, cls=Updater) -> Updater:
    """As in a run, with AdamW."""
    return cls(run, model, make_optimizer(model, 1e-3, 0.1), use_compile=use_compile, scale=0.01)


def make_step(run: Run, updater: Updater, loss_fn, batches: list) -> StepStats:
    """What the loop does in a step: micro-batches, update. Returns the step's numbers, still on the device."""
    stats = StepStats(run)
    add_gradients(run, updater, loss_fn, batches, stats)
    updater.step(stats, lr=1e-3)
    return stats
