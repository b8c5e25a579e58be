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

from .checkpoint import check_weights_and_optimizer
from .optim import set_lr
from .stats import StepStats

DECIDED_BY_FLAGS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "train_batch_size")
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroUpdater:
    """The counterpart of training.updater.Updater, see there for what the methods promise. For AdamW alone.

    Args: config: what `complete_config` returned.
    """

    equal_shares = True  # ZeRO exchanges weights and gradients in every micro-batch, so all ranks need as many

    def __init__(self, run, model: nn.Module, optimizer: torch.optim.AdamW, config: dict, *, scale: float = 1.0):
        os.environ.setdefault("DS_ACCELERATOR", run.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")
        import deepspeed

        if run.device.type == "cpu":  # its only extension here, another all-reduce, would be compiled at the start
            deepspeed.ops.__compatible_ops__ = {}
        self.run, self._module, self._deepspeed, self.scale = run, model, deepspeed, scale
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._plain = copy.deepcopy(model)
        if not dist.is_initialized():  # one process without a launcher
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._kind = type(optimizer).__name__
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._groups = optimizer.state_dict()["param_groups"]
        self.model, self._zero, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._make_moments()

    def backward(self, loss: Tensor) -> None:
        self._zero.override_loss_scale(1.0)
        self.model.backward(loss * self.scale)

    def step(self, stats: StepStats, lr: float) -> None:
        set_lr(self._zero.optimizer, lr)
        stats.unpack(self.run.sum_over_ranks(stats.pack()))
        weight = float(stats["weight"]) or 1.0  # nothing supervised: gradient 0, not 0 / 0
        # DeepSpeed averages over the ranks, then divides by its loss scale: make that the mean over the step's weight.
        self._zero.override_loss_scale(weight * self.scale / self.run.world_size)
        self.model.step()
        skipped = float(self._zero.overflow)
        norm = float("inf") if skipped else float(self.model.get_global_grad_norm())
        device = self.run.device
        stats.finish(torch.tensor(norm, device=device), torch.tensor(skipped, device=device))

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
        moments = {}
        for i, parameter in enumerate(self._parameters):
            # A counter for each: fused AdamW adds 1 to every parameter's, so one for all would count n a step.
            moments[i] = {"step": step.clone()}
            for name in MOMENTS:
                moments[i][name] = get(parameter, name)
        return {
            "kind": self._kind,
            "model": self.full_model().state_dict(),
            "optimizer": {"state": moments, "param_groups": self._groups},
            "scaler": {},
        }

    def check_state(self, state: dict) -> None:
        check_weights_and_optimizer(state, self.shapes, self._kind, self._groups)

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


def check_config(path: str, batch_size: int, grad_clip: float, device: torch.device) -> None:
    """Raises ValueError, before any work, for a file of ``--deepspeed`` that DeepSpeed or this project cannot use."""
    config = complete_config(path, batch_size, grad_clip, torch.float32)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when the package is imported
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:  # it has no error of its own
        raise ValueError(f"{path} is refused by DeepSpeed: {error}") from error


def complete_config(path: str, batch_size: int, grad_clip: float, dtype: torch.dtype) -> dict:
    """The user's DeepSpeed configuration, with everything that our flags decide. Raises ValueError on bad JSON.

    Args: path: the file of ``--deepspeed``; batch_size, grad_clip: the flags of that name.
    """
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise ValueError(f"{path} must be a JSON object with an object zero_optimization in it")
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {zero.get('stage')!r}, must be 1, 2 or 3")
    if ours := [key for key in DECIDED_BY_FLAGS if key in config]:
        raise ValueError(
            f"{path}: leave out {', '.join(ours)}: the flags --learning_rate, --lr_schedule, --dtype and "
            "--batch_size say that"
        )
    return {
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        **config,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # we call step() when a step is complete
        "gradient_clipping": grad_clip,
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
    }
