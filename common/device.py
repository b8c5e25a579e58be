"""Which device computes, and in which precision."""

import os

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """The device called ``name``; 'auto' takes CUDA, then MPS, then the CPU. Raises ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r}: no such device; use auto, cpu, cuda, cuda:0 or mps") from error
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in available or not available[device.type]() or (device.index or 0) >= count:
        raise ValueError(f"--device {name}: not available here; use --device auto or --device cpu")
    if device.type == "cuda":
        device = torch.device(
            "cuda", device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        )
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The autocast dtype of training, and a remark when it is not the one asked for ('' otherwise).

    bfloat16 only where the device is fast at it; MPS and CPU have no loss scaling for float16.
    """
    if name == "bfloat16":
        fast = fast_dtype(device)
        if fast == torch.float32:
            return fast, "this CPU has no bfloat16 instructions: training in float32"
        if fast == torch.float16:
            return fast, "this GPU has no bfloat16 units: training in float16 with loss scaling"
    if name == "float16" and device.type != "cuda":
        return torch.float32, f"float16 training needs a CUDA device, not {device.type}: training in float32"
    return DTYPES[name], ""


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type of two bytes for which the device has hardware; float32 where there is none.

    A CPU without AVX512-BF16 or AMX emulates bfloat16 tens of times slower than float32 (pytorch#146508); a GPU older
    than Ampere has no bfloat16 units, but float16.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and not cpu_has_fast_bfloat16():
        return torch.float32
    return torch.bfloat16


def cpu_has_fast_bfloat16() -> bool:
    """True where the CPU multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
