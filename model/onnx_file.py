"""MiniMind as one ONNX file: token ids in, logits out, for onnxruntime and whatever else reads the format.

Only batch and length vary. There is no cache in it: each token of an answer computes the whole text again, which for a
model of this size and a short dialogue is fast enough, and keeps a caller's code at ten lines. Rows of a batch are
padded on the right; causality hides the padding from the tokens before it. The packages `onnx`, `onnxscript` and
`onnxruntime` are imported only here.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .LMConfig import LMConfig
from .model import MiniMindForCausalLM
from .moe import MoEFeedForward

LARGEST = 2**31 - 1  # bytes of a protobuf, in which the weights are


class EveryExpert(MoEFeedForward):
    """The mixture of experts computed by all experts for all tokens: the weights of those not chosen are zero.

    ONNX has no grouped matrix product. This costs as many times the work of the chosen experts as there are more.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D) and the router's logits (B, T, E)."""
        router_logits = self.gate(x)
        weights, chosen = router_logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        of_expert = torch.zeros_like(router_logits).scatter(-1, chosen, weights)  # (B, T, E)
        gate = torch.einsum("btd,efd->btef", x, self.experts.gate_proj)
        up = torch.einsum("btd,efd->btef", x, self.experts.up_proj)
        y = torch.einsum("btef,edf->bted", F.silu(gate) * up, self.experts.down_proj)
        y = (y * of_expert[..., None]).sum(2)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, router_logits


class LogitsOnly(nn.Module):
    """The function that is written: input_ids (B, T) int64 -> logits (B, T, V) float32."""

    def __init__(self, model: MiniMindForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def write_onnx(path: Path, config: LMConfig, tensors: dict[str, Tensor]) -> None:
    """Write one file.

    Args:
        tensors: in our layout, float32.

    Raises:
        ValueError: the model is larger than what one file may hold. OSError: the disk is full or not writable.
    """
    model = MiniMindForCausalLM(config).eval()
    model.load_state_dict(tensors)
    if (size := sum(4 * parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise ValueError(f"{path}: an ONNX file holds 2 GB, and these weights are {size / 1e9:.1f} GB: write a folder")
    for layer in model.model.layers:
        if config.use_moe:
            every = EveryExpert(config, layer.mlp.shared_experts)
            every.load_state_dict(layer.mlp.state_dict())
            layer.mlp = every
    vary = torch.export.Dim.DYNAMIC
    with _quietly():
        program = torch.onnx.export(
            LogitsOnly(model).eval(),
            (torch.zeros(2, 8, dtype=torch.int64),),  # any: both sizes vary
            dynamic_shapes=({0: vary, 1: vary},),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    program.save(path)


def onnx_logits(path: Path) -> Callable[[Tensor], Tensor]:
    """What onnxruntime computes with a file, on the CPU: ids (B, T) -> logits (B, T, V)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says to its developers: that torchvision is missing, and a name that will change."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        log.setLevel(level)
