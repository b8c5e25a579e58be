"""docs/deviations.md is complete: a row for each default that is not upstream's, the same rows in both languages."""

import importlib
from pathlib import Path

import pytest

DOCS = [Path(__file__).resolve().parents[1] / "docs" / name for name in ("deviations.md", "deviations_en.md")]

# The defaults of upstream's scripts at 04b56ea. Where a value stands in the code and is no flag, it counts too.
SHARED = {
    "out_dir": "out", "epochs": 1, "batch_size": 32, "learning_rate": 5e-5, "device": "cuda:0", "dtype": "bfloat16",
    "use_wandb": False, "wandb_project": "MiniMind-Full-SFT", "num_workers": 1, "accumulation_steps": 1,
    "grad_clip": 1.0, "warmup_iters": 0, "log_interval": 100, "save_interval": 100, "dim": 512, "n_layers": 8,
    "max_seq_len": 512, "use_moe": False, "weight_decay": 0.01, "seed": 1337,
}  # fmt: skip
UPSTREAM = {
    "train_pretrain": {
        "learning_rate": 5e-4, "accumulation_steps": 8, "data_path": "dataset/pretrain_hq.jsonl",
        "wandb_project": "MiniMind-Pretrain",
    },
    "train_full_sft": {"data_path": "dataset/sft_mini_512.jsonl"},
    "train_lora": {
        "epochs": 50, "batch_size": 16, "save_interval": 1, "data_path": "dataset/lora_identity.jsonl",
        "wandb_project": "MiniMind-LoRA-SFT", "lora_name": "lora_identity", "lora_rank": 16,
    },
    "train_dpo": {
        "epochs": 2, "batch_size": 8, "learning_rate": 1e-8, "max_seq_len": 3000, "data_path": "dataset/dpo.jsonl",
        "wandb_project": "MiniMind-RLHF-SFT", "beta": 0.1,
    },
    "train_distillation": {
        "epochs": 6, "learning_rate": 5e-6, "data_path": "dataset/sft_data.jsonl", "teacher_dim": 768,
        "teacher_n_layers": 16, "alpha": 0.0, "temperature": 1.0,
    },
    "train_distill_reason": {
        "batch_size": 8, "learning_rate": 1e-6, "log_interval": 1, "save_interval": 50, "max_seq_len": 1024,
        "data_path": "dataset/r1_mix_1024.jsonl", "tag_weight": 10,
    },
}  # fmt: skip
EVAL = {
    "lora_name": "None", "out_dir": "out", "temperature": 0.85, "top_p": 0.85, "device": "cuda", "dim": 512,
    "n_layers": 8, "max_position_embeddings": 8192, "use_moe": False, "history_cnt": 0, "stream": True, "load": ["0"],
    "model_mode": 1,
}  # fmt: skip
DEFAULTS = {name: {**SHARED, **own} for name, own in UPSTREAM.items()} | {"eval_model": EVAL}


def rows(doc: Path) -> list[list[str]]:
    lines = doc.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines if line.startswith("| ")]


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
@pytest.mark.parametrize("script", DEFAULTS)
def test_every_default_that_differs_has_a_row(script, doc, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # weights in out/ would say other sizes
    ours = vars(importlib.import_module(script).parse_args([]))
    told = {(row[0].strip("`"), row[1].strip("`")) for row in rows(doc) if len(row) == 5}
    everywhere = {flag for where, flag in told if where in ("all", "全部")}
    differing = {f"--{name}" for name, value in DEFAULTS[script].items() if ours[name] != value}
    listed = {flag for where, flag in told if where == f"{script}.py"}
    assert differing - everywhere == listed
    assert "--device" in differing and everywhere == {"--device", "--weight_decay"}


def test_both_languages_have_the_same_rows():
    chinese, english = map(rows, DOCS)
    assert [len(row) for row in chinese] == [len(row) for row in english]
    numbers = [[row[0].replace("、", ", ") for row in table if row[0][1:2].isdigit()] for table in (chinese, english)]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 70
