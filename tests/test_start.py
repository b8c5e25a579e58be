"""``--help`` and mistakes are answered before the slow libraries are imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What takes a tenth of a second or more each, and seconds together.
SLOW = {
    "transformers.modeling_utils", "transformers.generation.utils",
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "accelerate", "deepspeed",
    "matplotlib", "pandas", "datasets", "sklearn", "scipy", "peft", "trl", "wandb", "swanlab", "tensorboard",
}  # fmt: skip
PROGRAM = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
SCRIPTS = sorted(path.name for path in [*ROOT.glob("train_*.py"), ROOT / "eval_model.py"])
MISTAKES = {
    "a flag": ("train_pretrain.py", "--dim", "many"),
    "the weights": ("train_full_sft.py", "--data_path", "dataset/sample/sft.jsonl"),
    "the data": ("train_pretrain.py", "--data_path", "missing.jsonl"),
    "the weights to talk to": ("eval_model.py", "--prompt", "hi"),
}


@pytest.fixture(scope="module")
def slow_tokenizer() -> set[str]:
    """The slow libraries that reading a tokenizer imports: none, but with transformers 5.17 most of them."""
    program = "import json, sys; from transformers import AutoTokenizer; print(json.dumps(sorted(sys.modules)))"
    return SLOW & set(json.loads(subprocess.check_output([sys.executable, "-c", program], text=True)))


@pytest.mark.parametrize("words", [(script, "--help") for script in SCRIPTS] + list(MISTAKES.values()), ids=" ".join)
def test_no_slow_library_is_imported_before_work(words, tmp_path, slow_tokenizer):
    script, *flags = words
    command = [sys.executable, "-c", PROGRAM, str(ROOT / script), *flags]
    done = subprocess.run(
        command if flags == ["--help"] else [*command, "--out_dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    *message, modules = done.stderr.strip().splitlines()
    assert done.returncode == 0 if flags == ["--help"] else done.returncode and message[-1:], done.stderr
    slow = SLOW & set(json.loads(modules))
    if flags != ["--help"]:  # a mistake is found with the tokenizer at hand
        slow -= slow_tokenizer
    assert not slow, (slow, message)
