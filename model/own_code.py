"""Our own class in a folder of transformers, with copies of its code: the folder then needs this repository no more.

    config.json    "auto_map": {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.MiniMindForCausalLM"}
    LMConfig.py    model.py    moe.py    ...

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` copies these files into a package of its own and
imports them from there. They must therefore import each other relatively, and else only packages that are installed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

CODE = ("LMConfig.py", "cache.py", "model.py", "moe.py", "rotary.py", "uncompiled.py")
AUTO_MAP = {
    "AutoConfig": "LMConfig.LMConfig",
    "AutoModel": "model.MiniMindModel",
    "AutoModelForCausalLM": "model.MiniMindForCausalLM",
}
# Run by a Python that sees the installed packages, and neither this repository nor the current directory.
_ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, ids, logits = sys.argv[1:]
model, found = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, local_files_only=True, output_loading_info=True
)
if any(found.values()):
    sys.exit(f"transformers reads other weights than were written: {found}")
with torch.no_grad():
    torch.save(model.eval()(torch.load(ids)).logits, logits)
"""


def write_code(folder: Path) -> None:
    """Copy the modules of the network. Raises OSError: the disk is full or not writable."""
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def logits_elsewhere(folder: Path, ids: Tensor) -> Tensor:
    """What the code in a folder computes in another process, which cannot import this repository: (B, T, V).

    Raises:
        ValueError: it cannot be loaded there; says why.
    """
    with tempfile.TemporaryDirectory() as place:
        files = Path(place, "ids.pt"), Path(place, "logits.pt")
        torch.save(ids, files[0])
        done = subprocess.run(
            [sys.executable, "-I", "-c", _ELSEWHERE, str(folder.resolve()), *map(str, files)],
            cwd=place, env={**os.environ, "HF_MODULES_CACHE": place}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"transformers cannot load {folder} with its code: {reason}")
        return torch.load(files[1], weights_only=True)
