"""One process' device: its precision, batches and numbers on their way to it and back, compiling for it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Compute:
    """The device that computes, and the dtype of its matrix products."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Matrix products in ``dtype``; weights, optimizer and reductions stay float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def make_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16, whose smallest number is 6e-8; bfloat16 has float32's range and needs none."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def pinned(self, collate: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        """``collate`` with its batches in pinned memory, from where a GPU copies while the host goes on.

        Pinning takes time, so let `prefetch`'s thread do it. Without a GPU there is nothing to pin for.
        """
        if self.device.type != "cuda":
            return collate

        def collate_pinned(ids: np.ndarray) -> dict[str, Tensor]:
            torch.cuda.set_device(self.device)  # each thread starts on GPU 0, where rank 1 has no business
            return {name: tensor.pin_memory() for name, tensor in collate(ids).items()}

        return collate_pinned

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch made by a `pinned` collate; nobody waits for the copy, the device takes work in order."""
        return {name: tensor.to(self.device, non_blocking=self.device.type == "cuda") for name, tensor in batch.items()}

    def stack(self, numbers: Iterable[Tensor | float]) -> Tensor:
        """Scalar tensors and Python's numbers (K) as one tensor (K,) float32 on the device, without waiting for it.

        The device fills in what Python knows; ``torch.tensor`` would make the host wait for a copy.
        """
        tensors = (n if isinstance(n, Tensor) else torch.full((), n, device=self.device) for n in numbers)
        return torch.stack([tensor.detach().float() for tensor in tensors])

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """Start copying numbers to the host; calling the result waits for what the device had to do before, not for
        what it was told later, as ``values.tolist()`` then would."""
        if self.device.type != "cuda":
            return values.tolist
        copy, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()

        def read() -> list[float]:
            arrived.synchronize()
            return copy.tolist()

        return read

    def compile(self, model: nn.Module, use_compile: bool | None) -> nn.Module:
        """torch.compile where it pays (CUDA) or is asked for: two graphs, one for batches of a single row.

        A mixture of experts breaks into pieces in other types than bfloat16, see model/moe.py.
        """
        wanted = self.device.type == "cuda" if use_compile is None else use_compile
        if not wanted:
            return model
        compiled = torch.compile(model)
        compiled.register_forward_pre_hook(declare_varying_sizes, with_kwargs=True)
        return compiled


def declare_varying_sizes(model: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> None:
    """Tell torch.compile which sizes differ from batch to batch, before each forward pass of `supervised_forward`.

    `dynamic=True` would say it of every number, dropout and the norms' epsilon included, and those cost kernels.
    """
    (input_ids,) = args
    torch._dynamo.maybe_mark_dynamic(input_ids, [0, 1])
    torch._dynamo.maybe_mark_dynamic(kwargs["lengths"], 0)
    # Sizes of 1 get a graph of their own otherwise: of rows they come, of supervised tokens next to never.
    torch._dynamo.decorators.mark_unbacked(kwargs["supervised"], 0)
