"""Which device computes, and in which precision."""

import torch
from toy import toy_model

from common.device import choose_device, choose_dtype
from training.processes import Run

CPU = torch.device("cpu")


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"


def test_a_cpu_without_bfloat16_instructions_trains_in_float32(monkeypatch):
    """Emulated bfloat16 is tens of times slower than float32."""
    monkeypatch.setattr("common.device.cpu_has_fast_bfloat16", lambda: False)
    dtype, remark = choose_dtype("bfloat16", CPU)
    assert dtype == torch.float32 and "float32" in remark
    monkeypatch.setattr("common.device.cpu_has_fast_bfloat16", lambda: True)
    assert choose_dtype("bfloat16", CPU) == (torch.bfloat16, "")


def test_dtype_on_other_devices(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert choose_dtype("float32", CPU) == (torch.float32, "")
    assert choose_dtype("float16", CPU)[0] == choose_dtype("float16", torch.device("mps"))[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_dtype("bfloat16", cuda)[0] == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_dtype("bfloat16", cuda) == (torch.bfloat16, "")


def test_autocast_really_switches_and_weights_stay_float32():
    """Upstream A1: --dtype only switched the gradient scaler."""
    model = toy_model()
    for dtype in (torch.bfloat16, torch.float32):
        with Run(CPU, dtype).autocast():
            logits = model(torch.arange(8)[None]).logits
        assert logits.dtype == dtype
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert Run(CPU, torch.bfloat16).make_scaler().is_enabled() is False
