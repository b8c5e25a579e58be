"""Broken weights never replace good ones: what is about to be saved is asked first whether it is still a model."""

import numpy as np
import torch
from torch import Tensor, nn

from .losses import answer_logprobs, supervised_forward, supervised_per_row

PROBED_UNITS = 8
MAX_WEIGHT = 100.0  # those of trained models stay below 10; from some hundred on, activations overflow
MAX_RISE = 4.0  # nats per token; training may forget, but the data does not become e^4 = 55 times less likely by that


class WeightGuard:
    """Compares weights with those that training started from, on a few units of the training data.

    The likelihood of the supervised tokens means the same in every stage, where losses have scales of their own (DPO's
    starts at ln 2, IPO's at (1 / 2 beta)^2, a KL at anything). From random weights training starts at ln(vocabulary).
    All ranks make it, and ask it, together.

    Args:
        model: the whole model as it is before the first step.
        units: the training data, with ``collate(ids) -> micro-batch``.
    """

    def __init__(self, run, model: nn.Module, units):
        self.run = run
        ids = np.linspace(0, len(units) - 1, min(PROBED_UNITS, len(units))).astype(int)  # from all over the file
        self.batch = units.collate(ids)
        self._before = self._nll(model)
        self._max_weight = max(MAX_WEIGHT, 10 * float(largest(model)))

    def problem(self, model: nn.Module) -> str:
        """Why these weights are broken; '' while they are not.

        The median over the rows, because DPO may well make rejected answers, half of its rows, as unlikely as it likes:
        of an even number, torch takes the lower of the two in the middle.
        """
        rise = (self._nll(model) - self._before).median()
        weight, rise = self.run.from_main((float(largest(model)), float(rise)))
        if not weight <= self._max_weight:  # NaN is not
            return f"the largest weight is {weight:.3g}"
        if not rise <= MAX_RISE:
            return f"the training data costs {rise:.3g} nats per token more than before the first step"
        return ""

    @torch.no_grad()
    def _nll(self, model: nn.Module) -> Tensor:
        """(rows,): mean negative log-likelihood of each row's supervised tokens, in nats."""
        was_training = model.training
        batch = self.run.to_device(self.batch)
        model.eval()
        with self.run.autocast():
            logits = supervised_forward(model, batch).logits
        model.train(was_training)
        return -answer_logprobs(logits, batch) / supervised_per_row(batch).clamp(min=1)


def largest(model: nn.Module) -> Tensor:
    """The largest absolute value of all weights, a scalar on their device; NaN if there is one."""
    return torch.stack([parameter.detach().abs().max().float() for parameter in model.parameters()]).max()
