"""ZeRO with DeepSpeed: every rank keeps a part of the optimizer (stage 1), gradients (2) and weights (3).

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. The package is imported only for ``--deepspeed FILE``. The
file is DeepSpeed's own (https://www.deepspeed.ai/docs/config-json); what our flags already say is filled in here.
States and weights have the same format as without DeepSpeed, so a run may continue with it or without it.
"""

import copy
import json
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .optim import make_optimizer, set_lr

DECIDED_BY_FLAGS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "train_batch_size")
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroUpdater:
    """The counterpart of training.optim.Updater, see there for what the methods promise."""

    equal_shares = True  # ZeRO exchanges weights and gradients in every micro-batch, so all ranks need as many

    def __init__(self, run, args, model: nn.Module):
        os.environ.setdefault("DS_ACCELERATOR", run.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")
        import deepspeed

        if run.device.type == "cpu":  # its only extension here, another all-reduce, would be compiled at the start
            deepspeed.ops.__compatible_ops__ = {}
        self.run, self._module, self._deepspeed = run, model, deepspeed
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._plain = copy.deepcopy(model)
        if not dist.is_initialized():  # one process without a launcher
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._groups = optimizer.state_dict()["param_groups"]
        self.model, self._zero, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=complete_config(args, run.dtype), dist_init_required=False
        )
        self._make_moments()

    def backward(self, loss: Tensor) -> None:
        self._zero.override_loss_scale(1.0)
        self.model.backward(loss)

    def step(self, sums: Tensor, scale: float, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        set_lr(self._zero.optimizer, lr)
        sums = self.run.sum_over_ranks(sums)
        # DeepSpeed averages over the ranks, then divides by its loss scale: make that the mean over the step's weight.
        self._zero.override_loss_scale((float(sums[1]) or 1.0) * scale / self.run.world_size)
        self.model.step()
        skipped = float(self._zero.overflow)
        norm = float("inf") if skipped else float(self.model.get_global_grad_norm())
        return sums, torch.tensor(norm, device=sums.device), torch.tensor(skipped, device=sums.device)

    def full_model(self) -> nn.Module:
        with torch.no_grad():
            for shard, whole in zip(self._module.parameters(), self._plain.parameters(), strict=True):
                whole.copy_(self._gather(shard))
        return self._plain

    def _gather(self, shard: nn.Parameter) -> Tensor:
        """A whole float32 weight, from all ranks."""
        if shard.requires_grad:
            return self._deepspeed.utils.safe_get_full_fp32_param(shard)
        with self._deepspeed.zero.GatheredParameters([shard]):  # frozen weights are sharded by stage 3 alone
            return shard.detach().clone()

    def state(self) -> dict:
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        step = next(iter(self._zero.optimizer.state.values()))["step"]
        moments = {
            i: {"step": step.clone(), **{name: get(parameter, name) for name in MOMENTS}}
            for i, parameter in enumerate(self._parameters)
        }
        optimizer = {"state": moments, "param_groups": self._groups}
        return {"model": self.full_model().state_dict(), "optimizer": optimizer, "scaler": {}}

    def load_state(self, state: dict) -> None:
        put = self._deepspeed.utils
        self._plain.load_state_dict(state["model"])
        for shard, whole in zip(self._module.parameters(), self._plain.parameters(), strict=True):
            with torch.no_grad(), self._deepspeed.zero.GatheredParameters([shard], modifier_rank=0):
                shard.copy_(whole)  # what the forward pass uses
            if shard.requires_grad:
                put.safe_set_full_fp32_param(shard, whole.detach())  # what the optimizer updates
        moments = state["optimizer"]["state"]
        for i, parameter in enumerate(self._parameters):
            for name in MOMENTS:
                put.safe_set_full_optimizer_state(parameter, moments[i][name].to(self.run.device), name)
        for entry in self._zero.optimizer.state.values():
            entry["step"].copy_(moments[0]["step"])

    def _make_moments(self) -> None:
        """Make the optimizer's tensors now instead of in its first step, for all groups of parameters.

        DeepSpeed 0.19 links them to the weights after the first step of the first group, and finds the others missing.
        """
        flat = getattr(self._zero, "fp32_partitioned_groups_flat", None)  # stage 3
        for shard in flat or self._zero.single_partition_of_fp32_groups:
            entry = {name: torch.zeros_like(shard, requires_grad=False) for name in MOMENTS}
            self._zero.optimizer.state[shard] = {**entry, "step": torch.zeros((), device=shard.device)}
        if not flat:
            self._zero._lazy_init_hp_params_optimizer_state()


def check_config(args, device: torch.device) -> None:
    """Raises ValueError, before any work, for a file of ``--deepspeed`` that DeepSpeed or this project cannot use."""
    config = complete_config(args, torch.float32)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when the package is imported
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:  # it has no error of its own
        raise ValueError(f"{args.deepspeed} is refused by DeepSpeed: {error}") from error


def complete_config(args, dtype: torch.dtype) -> dict:
    """The user's DeepSpeed configuration, with everything that our flags decide. Raises ValueError on bad JSON."""
    with open(args.deepspeed, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{args.deepspeed} is not JSON: {error}") from error
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise ValueError(f"{args.deepspeed} must be a JSON object with an object zero_optimization in it")
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        raise ValueError(f"{args.deepspeed}: zero_optimization.stage is {zero.get('stage')!r}, must be 1, 2 or 3")
    if ours := [key for key in DECIDED_BY_FLAGS if key in config]:
        raise ValueError(
            f"{args.deepspeed}: leave out {', '.join(ours)}: the flags --learning_rate, --lr_schedule, --dtype and "
            "--batch_size say that"
        )
    return {
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        **config,
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # we call step() when a step is complete
        "gradient_clipping": args.grad_clip,
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
    }
