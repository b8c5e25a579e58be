"""One line that says on what a figure was measured: processor, threads, software, date and commit."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> str:
    """E.g. ``Intel(R) Xeon(R) Processor, 2 threads, torch 2.13.0+cpu, 2026-01-31, commit 1a2b3c4``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}, "
        f"commit {commit.stdout.strip() or 'unknown'}"
    )
