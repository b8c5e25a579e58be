"""trl's trainers and peft's adapters train our model and its native exports: 5 steps each."""

import copy
from pathlib import Path

import pytest
import torch
from engines import FIELDS, export
from transformers import AutoModelForCausalLM

from model.adapters import read_lora
from model.auto import register_auto_classes
from model.LMConfig import LMConfig
from model.loading import load_tokenizer
from model.model import MiniMindForCausalLM
from model.model_lora import load_lora, merge_lora

trl = pytest.importorskip("trl", reason="trl is not installed: pip install -r requirements-dev.txt")
datasets = pytest.importorskip("datasets", reason="comes with trl")

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
QUESTION = [{"role": "user", "content": "法国的首都是哪里？"}]
GOOD = [{"role": "assistant", "content": "法国的首都是巴黎。"}]
BAD = [{"role": "assistant", "content": "不知道。"}]
KINDS = ["ours", "ours, mixture", "llama", "qwen3", "ernie4_5_moe"]


@pytest.fixture(params=KINDS)
def ours_and_model(request, tmp_path):
    """A model of ours; and the same, or its export, as transformers reads it from a folder: trl does so again."""
    torch.manual_seed(0)
    kind = request.param
    fields = {"use_moe": kind == "ours, mixture", **FIELDS.get(kind, {}), **SMALL}
    ours = MiniMindForCausalLM(LMConfig(**fields))
    if kind in FIELDS:
        export(ours, kind, tmp_path / "folder")
    else:
        register_auto_classes()
        ours.save_pretrained(tmp_path / "folder")
    return ours, AutoModelForCausalLM.from_pretrained(tmp_path / "folder")


@pytest.fixture
def model(ours_and_model):
    return ours_and_model[1]


def options(tmp_path: Path) -> dict:
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def train(trainer) -> list[dict]:
    """Five steps; the lines of the log that hold a loss. The weights have changed, and are finite."""
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert changed and all(torch.isfinite(tensor).all() for tensor in after.values())
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 5
    return lines


def test_sft(model, tmp_path):
    """With assistant_only_loss, which needs the template's generation markers; the answers are learned by heart."""
    rows = datasets.Dataset.from_list([{"messages": QUESTION + GOOD}] * 16)
    config = trl.SFTConfig(**options(tmp_path), assistant_only_loss=True, max_length=64)
    trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=load_tokenizer())
    lines = train(trainer)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_dpo(model, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}] * 16)
    config = trl.DPOConfig(**options(tmp_path), max_length=64)
    lines = train(trl.DPOTrainer(model, args=config, train_dataset=rows, processing_class=load_tokenizer()))
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=3e-3)  # ln 2, and a native mixture's load-balance loss
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_grpo(model, tmp_path):
    def reward(completions, **kwargs) -> list[float]:
        return [float(len(completion[0]["content"]) % 7) for completion in completions]

    rows = datasets.Dataset.from_list([{"prompt": QUESTION}] * 16)
    config = trl.GRPOConfig(**options(tmp_path), num_generations=2, max_completion_length=8)
    trainer = trl.GRPOTrainer(model, reward, config, train_dataset=rows, processing_class=load_tokenizer())
    train(trainer)


def test_a_peft_adapter_trained_by_trl_and_merged_by_us(ours_and_model, tmp_path):
    """Our merge of peft's file gives the weights of peft's merge (more settings: tests/test_lora_peft.py)."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r requirements-dev.txt")
    ours, model = ours_and_model
    rows = datasets.Dataset.from_list([{"messages": QUESTION + GOOD}] * 16)
    config = trl.SFTConfig(**{**options(tmp_path), "learning_rate": 1e-2}, assistant_only_loss=True, max_length=64)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=load_tokenizer(), peft_config=lora)
    lines = train(trainer)
    assert lines[-1]["loss"] < lines[0]["loss"]

    trainer.model.save_pretrained(tmp_path / "adapter")
    merged = trainer.model.merge_and_unload().state_dict()
    if merged.keys() != ours.state_dict().keys():
        return  # a mixture under other names
    before = copy.deepcopy(ours.state_dict())
    load_lora(ours, read_lora(tmp_path / "adapter", ours.config))
    merge_lora(ours)
    torch.testing.assert_close(ours.state_dict(), merged)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert not torch.equal(before[name], merged[name])
