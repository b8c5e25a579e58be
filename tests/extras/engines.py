"""What the tests of other programs share: models to export, prompts, and the comparison of what a program answers.

Each of these programs needs packages that the project does not, so it runs in an environment of its own, which
`make test-extras` makes; a test whose environment is missing is skipped and says so.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from model.conversion import Source, convert_to_folder
from model.LMConfig import LMConfig
from model.loading import load_tokenizer
from model.model import MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent / "other_python"
QUICKSTART = ROOT / "out" / "quickstart" / "full_sft_256.pth"
NEW_TOKENS = 64

# The published models' shapes, narrower and with fewer layers.
_V3 = {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6}
_MOE = {"dim": 256, "n_layers": 3, "use_moe": True}
FIELDS = {
    "llama": {"dim": 256, "n_layers": 4},
    "qwen3": {"dim": 256, "n_layers": 4, **_V3},
    "ernie4_5_moe": _MOE,
    "granitemoeshared": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_moe": {**_MOE, **_V3, "n_shared_experts": False, "num_experts_per_tok": 1},
}


def make_model(kind: str) -> MiniMindForCausalLM:
    """Random weights, large enough for one token to stand out at each step; "quickstart" is what that trained."""
    if kind == "quickstart":
        if not QUICKSTART.exists():
            pytest.skip(f"{QUICKSTART.relative_to(ROOT)} is not there: make quickstart")
        model = MiniMindForCausalLM(LMConfig(dim=256, n_layers=4)).eval()
        model.load_state_dict(torch.load(QUICKSTART, weights_only=True))
        return model
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(**FIELDS[kind], max_seq_len=512)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 2.0 / parameter.shape[-1] ** 0.5)
    return model


def export(model: MiniMindForCausalLM, kind: str, path: Path, stored: str = "f32") -> Path:
    """The native folder, as scripts/convert_model.py writes it."""
    architecture = "llama" if kind == "quickstart" else kind
    source = Source(Path("m.pth"), model.config, model.state_dict(), load_tokenizer(), [])
    convert_to_folder(source, path, architecture, stored)
    return path


def prompts() -> list[list[int]]:
    """Token ids of questions as the chat format has them."""
    tokenizer = load_tokenizer()
    questions = (
        "法国的首都是哪里？",
        "What is the chemical symbol of gold?",
        "for i in range(3): 😀 12345",
        "你是谁？",
    )
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]


def greedy(model: torch.nn.Module, prompt: list[int], never: int | None = None) -> list[int]:
    """64 tokens, each the most probable one, `</s>` no end; `never` is a token that is passed over."""
    ids = torch.tensor([prompt])
    never_these = None if never is None else [never]
    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, suppress_tokens=never_these)
    out = model.generate(ids, attention_mask=torch.ones_like(ids))
    return out[0, len(prompt) :].tolist()


def rounded(model: MiniMindForCausalLM, dtype: torch.dtype) -> MiniMindForCausalLM:
    """The same model in float32, of numbers that `dtype` can hold: what an export stored in it is."""
    result = MiniMindForCausalLM(model.config).eval()
    result.load_state_dict({name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()})
    return result


@torch.no_grad()
def shortfall(model: torch.nn.Module, prompt: list[int], answer: list[int], never: int | None = None) -> float:
    """By how much (nats) the least fitting token of an answer is behind the best one, as `model` sees it.

    0 if all are the most probable. Two programs may round two nearly equal logits apart and go on with other words: the
    tokens after that are judged behind the answer's own beginning.
    """
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    if never is not None:
        logits[:, never] = -torch.inf
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.max(-1).values - chosen).max())


def ask(environment: str, script: str, *arguments: str) -> list[list[int]]:
    """Run a script of `other_python` in an environment; the token ids that it prints in a line of their own."""
    python = ROOT / environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (ROOT / environment / ".installed").exists():
        pytest.skip(f"{environment} is not there, or only in part: make test-extras")
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        [str(python), str(SCRIPTS / script), *arguments, json.dumps(prompts()), str(NEW_TOKENS)],
        capture_output=True,
        text=True,
        env=settings,
        cwd=ROOT.anchor,  # nothing of the project is to be found by import
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return next(json.loads(line) for line in result.stdout.splitlines() if line.startswith("[["))
