"""On CUDA the host must not wait inside a step: every stage on pretended CUDA tensors, no GPU needed.

`FakeTensorMode` knows devices, types and shapes of tensors and computes nothing. It needs the CUDA build of torch
(`make test-extras`) and has no backward pass; tests/test_gpu.py is the test with a GPU.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from on_device import STAGES, collate, make_stage, make_step, make_updater
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import toy_model

from inference.batch import Batch
from inference.requests import Request
from inference.sampling import SamplingParams
from training.processes import Run
from training.updater import Updater

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of torch: make test-extras")
ATEN = torch.ops.aten
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)


class NobodyWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: copies that are not asynchronous, and whatever does them inside.

    `FakeTensorMode` itself refuses operations whose result Python must know, as `.item()` and `torch.bincount`.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is ATEN._local_scalar_dense.default and args[0].device.type == "cpu":
            return 1  # the host may read what it has, but a pretended tensor has no value
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in [*tensors, result] if isinstance(tensor, torch.Tensor)}
        if len(devices) > 1 and func is not ATEN.fill_.Tensor:  # reads the host's scalar, then starts a kernel
            assert func in COPIES, f"{func} takes tensors of {devices}: it copies, and waits for the copy"
            assert kwargs.get("non_blocking"), f"{func}: the host waits for this copy"
            assert tensors[0].device.type == "cuda" or hasattr(tensors[0], "in_pinned_memory"), "not pinned"
        return result


class ForwardOnly(Updater):
    """Gradients out of thin air: without a GPU autograd cannot start its thread for one."""

    def backward(self, loss):
        assert loss.device.type == "cuda" and loss.requires_grad
        for parameter in self.full_model().parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


@pytest.fixture
def fake(monkeypatch):
    """FakeTensorMode, and in the place of what asks the driver: a GPU with bfloat16."""

    def pin_memory(tensor):
        tensor.in_pinned_memory = True
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode() as mode:
        yield mode


def cuda_run() -> Run:
    return Run(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture
def batches() -> list[dict]:
    return [collate(np.arange(4)), collate(np.arange(4, 10))]


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_does_not_wait(stage, use_moe, batches, fake):
    run = cuda_run()
    model, loss_fn = make_stage(stage, run, use_moe)
    updater = make_updater(run, model, cls=ForwardOnly)
    make_batch = run.pinned(lambda i: {name: fake.from_tensor(tensor) for name, tensor in batches[i].items()})
    with NobodyWaits():
        stats = make_step(run, updater, loss_fn, [make_batch(0), make_batch(1)])
        stats.fetch()
        loss = stats["loss"]
    assert isinstance(loss, FakeTensor) and loss.device.type == "cuda" and loss.dtype == torch.float32


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2}]
)
def test_decoding_does_not_wait(params, use_moe, fake):
    with torch.device("cuda"):
        model = toy_model(use_moe=use_moe).eval()
    batch = Batch(model, 2)
    for prompt in ([1], [4]):  # nothing to read but the last token
        batch.add(Request(prompt, SamplingParams(**params)))
    with NobodyWaits(), torch.inference_mode(), cuda_run().autocast():
        tokens = [batch._next_tokens(model, [0, 1])[1] for _ in range(4)]
    assert {(tuple(t.shape), t.device.type) for t in tokens} == {((2,), "cuda")}


def test_what_waits_is_refused(fake):
    """The watchman himself: each of these once stood in a stage."""
    with torch.device("cuda"):
        x = torch.ones(3)
    cpu = torch.ones(3, device="cpu")
    for waits in (
        lambda: torch.tensor(1.0, device="cuda"),
        lambda: x.new_tensor([2]),
        lambda: cpu.to("cuda"),
        lambda: cpu.to("cuda", non_blocking=True),
        lambda: x.cpu(),
        lambda: x.sum().item(),
        lambda: torch.bincount(x.long(), minlength=3),
        lambda: x[x > 0],
        lambda: x + torch.tensor(1.0),
    ):
        with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)), NobodyWaits():
            waits()
