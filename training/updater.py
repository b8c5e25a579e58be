"""Gradients in, new weights out: the backward pass, one exchange between the processes, one optimizer step.

`Updater` keeps the whole optimizer on every process, `ZeroUpdater` (training/deepspeed.py) a part of it on each; both
have the same methods. An updater owns its state: who saves it stores a dict and hands it back, and need not know which
optimizer it is of.
"""

import torch
from torch import Tensor, nn

from .checkpoint import check_weights_and_optimizer
from .optim import clip_and_step, make_optimizer, set_lr
from .stats import StepStats


class Updater:
    """Updates one model, a replica of which is on every process, with any optimizer of PyTorch's kind.

    Args:
        run: this process (training.processes.Run).
        model: already on the device.
        optimizer: over the parameters of ``model``.
        grad_clip: largest norm of the gradient; 0 for none.
        use_compile: whether to compile the forward pass; None: where it pays (`Run.compile`).
        scale: factor of the loss sums in the backward pass, about 1 / (tokens of a micro-batch): float16 could not hold
            the gradient of a sum. The update divides it out again.
    """

    equal_shares = False  # whether every rank must compute the same number of micro-batches in a step

    def __init__(
        self,
        run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_clip: float = 1.0,
        use_compile: bool | None = False,
        scale: float = 1.0,
    ):
        self.run, self._model, self.optimizer = run, model, optimizer
        self.grad_clip, self.scale = grad_clip, scale
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.scaler = run.make_scaler()
        self.model = run.compile(model, use_compile)  # what the forward pass goes through

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss sum."""
        self.scaler.scale(loss * self.scale).backward()

    def step(self, stats: StepStats, lr: float) -> None:
        """Update the weights with the gradient of the mean over the step, of all ranks; one all-reduce.

        ``stats`` holds this rank's numbers of the step, and then those of all ranks with the outcome.
        """
        set_lr(self.optimizer, lr)
        stats.unpack(self.run.sum_gradients(self._model, stats.pack()))
        weight = stats["weight"]
        weight = torch.where(weight > 0, weight, 1.0)  # nothing supervised: gradient 0, not 0 / 0
        norm, skipped = clip_and_step(self.optimizer, self.scaler, 1 / (self.scale * weight), self.grad_clip)
        stats.finish(norm, skipped)

    def full_model(self) -> nn.Module:
        """The model with all its weights, to evaluate and to save. All ranks must call it."""
        return self._model

    def state(self) -> dict:
        """What continues this exactly; tensors are not copied. All ranks must call it."""
        return {
            "kind": type(self.optimizer).__name__,
            "model": self._model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def check_state(self, state: dict) -> None:
        """Raises CheckpointError unless ``state`` is of such a model with such an optimizer."""
        groups = self.optimizer.state_dict()["param_groups"]
        check_weights_and_optimizer(state, self.shapes, type(self.optimizer).__name__, groups)

    def load_state(self, state: dict) -> None:
        """Go on from what ``state()`` returned, on any number of ranks."""
        self._model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def make_updater(run, args, model: nn.Module, scale: float):
    """AdamW on every rank, or DeepSpeed with the shards that the file of ``--deepspeed`` asks for."""
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    if not args.deepspeed:
        return Updater(run, model, optimizer, grad_clip=args.grad_clip, use_compile=args.use_compile, scale=scale)
    from .deepspeed import ZeroUpdater, complete_config  # a package that only this flag needs

    config = complete_config(args.deepspeed, args.batch_size, args.grad_clip, run.dtype)
    return ZeroUpdater(run, model, optimizer, config, scale=scale)
