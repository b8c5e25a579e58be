"""The life of a model on a few rows of the sample data: every stage reads what the one before wrote, dense and MoE.

pretrain -> SFT (a student, and a larger teacher) -> DPO -> LoRA -> distillation -> reasoning -> eval_model.py
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import eval_model
import train_distill_reason
import train_distillation
import train_dpo
import train_full_sft
import train_lora
import train_pretrain
from model.LMConfig import LMConfig, config_fields
from model.model_lora import LORA_TARGETS
from model.opening import load_model
from model.record import fingerprint, read_record

SAMPLE = Path(__file__).resolve().parents[1] / "dataset" / "sample"
STUDENT, TEACHER = {"dim": 32, "n_layers": 2}, {"dim": 48, "n_layers": 3}


@dataclass
class Life:
    """What one run through all stages left behind."""

    out_dir: Path
    suffix: str  # of its files: '' or '_moe'
    commands: list  # (script, flags) of every stage that was run

    @property
    def use_moe(self) -> bool:
        return self.suffix != ""

    def steps(self, name: str) -> list[dict]:
        """The log records of the stage that wrote this name, one a step."""
        (log,) = self.out_dir.glob(f"logs/{name}{self.suffix}-*.jsonl")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        return [record for record in records if "tokens_per_s" in record]

    def heldout(self, name: str) -> dict:
        """The last held-out figures of that stage."""
        (log,) = self.out_dir.glob(f"logs/{name}{self.suffix}-*.jsonl")
        return [r for r in map(json.loads, log.read_text().splitlines()) if "heldout_loss" in r][-1]


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def life(request, tmp_path_factory) -> Life:
    """All stages, one after the other, as their commands would run them."""
    folder = tmp_path_factory.mktemp("moe" if request.param else "dense")
    shared = (
        f"--out_dir {folder / 'out'} --cache_dir {folder / 'cache'} --use_moe {request.param} --device cpu "
        "--num_workers 0 --batch_size 8 --max_seq_len 128 --log_interval 1 --save_interval 0 --eval_interval 0 "
        "--heldout_share 0.1 --dtype float32"
    )

    def run(stage, file: str, rows: int, flags: str, size: dict = STUDENT) -> None:
        some = folder / file
        lines = (SAMPLE / file).read_text(encoding="utf-8").splitlines()
        some.write_text("\n".join(lines[:: len(lines) // rows][:rows]) + "\n", encoding="utf-8")
        sizes = f"--dim {size['dim']} --n_layers {size['n_layers']}"
        commands.append((stage, f"{shared} {sizes} --data_path {some} {flags}".split()))
        stage.main(commands[-1][1])

    commands = []
    run(train_pretrain, "pretrain.jsonl", 100, "--epochs 3 --learning_rate 3e-3 --accumulation_steps 1")
    run(train_full_sft, "sft.jsonl", 40, "--epochs 3 --learning_rate 3e-3")
    run(train_full_sft, "sft.jsonl", 40, "--epochs 8 --learning_rate 5e-3 --from_weight none", TEACHER)
    run(train_dpo, "dpo.jsonl", 16, "--epochs 3 --learning_rate 1e-3")
    run(train_lora, "lora_identity.jsonl", 60, "--epochs 8 --learning_rate 1e-2")
    teacher = f"--teacher_dim 48 --teacher_n_layers 3 --teacher_use_moe {request.param}"
    run(train_distillation, "sft.jsonl", 40, f"--epochs 3 --learning_rate 3e-3 {teacher}")
    run(train_distill_reason, "reason.jsonl", 20, "--epochs 3 --learning_rate 3e-3")
    return Life(folder / "out", "_moe" if request.param else "", commands)


STAGES = ["pretrain", "full_sft", "rlhf", "lora/lora_identity", "full_dist", "reason"]


def test_every_stage_writes_its_file_where_the_readme_says(life):
    written = {path.relative_to(life.out_dir).as_posix() for path in life.out_dir.glob("**/*.pth")}
    expected = {f"{stage}_32{life.suffix}.pth" for stage in STAGES} | {f"full_sft_48{life.suffix}.pth"}
    assert {path for path in written if "checkpoints" not in path} == expected
    for stage in STAGES:
        if "lora" not in stage:
            path = life.out_dir / f"{stage}_32{life.suffix}.pth"
            load_model(LMConfig(**STUDENT, use_moe=life.use_moe), path)


def test_every_stage_says_what_its_weights_are_and_where_they_come_from(life):
    """From the reasoning model one can follow the records back to the pretraining data."""
    parents = {"pretrain": None, "full_sft": "pretrain", "rlhf": "full_sft", "lora/lora_identity": "full_sft",
               "full_dist": "full_sft", "reason": "rlhf"}  # fmt: skip
    for stage, parent in parents.items():
        path = life.out_dir / f"{stage}_32{life.suffix}.pth"
        record, remark = read_record(path)
        assert remark == "" and record["stage"] == ("lora" if "lora" in stage else stage)
        assert config_fields(record["config"]) == config_fields(LMConfig(**STUDENT, use_moe=life.use_moe))
        started_from = record["started_from"] and record["started_from"]["fingerprint"]
        assert started_from == (parent and fingerprint(life.out_dir / f"{parent}_32{life.suffix}.pth"))
        steps, measured = life.steps(f"{Path(stage).name}_32"), life.heldout(f"{Path(stage).name}_32")
        assert (record["step"], record["tokens"]) == (steps[-1]["step"], steps[-1]["tokens"])
        assert record["heldout"]["step"] == record["step"]
        assert record["heldout"]["heldout_loss"] == pytest.approx(measured["heldout_loss"], rel=1e-5)
        assert record["data"]["rows_trained_on"] > 4 * record["data"]["rows_held_out"] > 0
        assert len(record["tokenizer"]) == 64 and set(record["versions"]) == {"python", "torch", "transformers"}
    adapter = json.loads((life.out_dir / "lora" / f"lora_identity_32{life.suffix}.json").read_text("utf-8"))
    assert adapter["lora"] == {"rank": 16, "alpha": 16, "targets": list(LORA_TARGETS)}
    taught = json.loads((life.out_dir / f"full_dist_32{life.suffix}.json").read_text("utf-8"))
    assert taught["teacher"]["fingerprint"] == fingerprint(life.out_dir / f"full_sft_48{life.suffix}.pth")


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls(life, stage):
    """From the first epoch to the last: the same rows, so the means can be compared."""
    steps = life.steps(f"{Path(stage).name}_32")
    first, last = ([step["loss"] for step in steps if step["epoch"] == epoch] for epoch in (1, steps[-1]["epoch"]))
    assert len(first) == len(last) >= 2
    assert sum(last) < 0.98 * sum(first)


def test_each_stage_learns_what_it_is_for(life):
    dpo, distillation = life.steps("rlhf_32"), life.steps("full_dist_32")
    assert dpo[0]["loss"] - dpo[0].get("aux_loss", 0.0) == pytest.approx(0.6931, abs=1e-3)  # policy == reference: log 2
    assert dpo[-1]["reward_margin"] > 0
    assert distillation[-1]["kl"] < 0.8 * distillation[0]["kl"]
    assert distillation[-1]["loss"] == pytest.approx(
        distillation[-1]["nll"] + 1.5**2 * distillation[-1]["kl"] + distillation[-1].get("aux_loss", 0.0), rel=1e-4
    )
    assert 0 <= life.heldout("reason_32")["tag_obedience"] <= 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_says_how_evenly_the_experts_are_used(life, stage):
    """Of a mixture of experts, in every stage: no expert dies on the sample data (and a dense model logs nothing)."""
    for record, prefix in (
        (life.steps(f"{Path(stage).name}_32")[-1], ""),
        (life.heldout(f"{Path(stage).name}_32"), "heldout_"),
    ):
        shares = [record[name] for name in record if name.startswith(f"{prefix}expert_") and name[-1].isdigit()]
        assert len(shares) == (4 if life.use_moe else 0)
        assert (f"{prefix}aux_loss" in record) == life.use_moe
        if life.use_moe:
            assert sum(shares) == pytest.approx(1, abs=1e-3)
            # The shares are means over the layers; within a layer, after so few rows, one expert may still be idle.
            assert min(shares) > 0.03 and 0 <= record[f"{prefix}expert_min"] <= min(shares)
            assert 0.8 < record[f"{prefix}expert_entropy"] <= 1  # three of four experts alone would give 0.79


def test_no_stage_replaces_its_file_by_weights_that_exploded(life, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.lr_at", lambda *args: 1e5)
    out_dir = shutil.copytree(life.out_dir, tmp_path / "out")
    before = {path: path.read_bytes() for path in out_dir.rglob("*.pt*")}
    for stage, flags in life.commands:
        with pytest.raises(SystemExit, match="this run is broken"):
            stage.main([*flags, "--out_dir", str(out_dir), "--max_steps", "2"])
    assert {path: path.read_bytes() for path in out_dir.rglob("*.pt*")} == before


def ask(life: Life, capsys, *flags: str) -> str:
    sizes = ["--dim", "32", "--out_dir", str(life.out_dir)]  # there is a teacher of another width; all else is read
    short = ["--device", "cpu", "--max_new_tokens", "8", "--temperature", "0", "--show_speed", "False"]
    assert eval_model.main([*sizes, *short, *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--model_mode 0", "--model_mode 1", "--model_mode 2", "--model_mode 3",
                                   "--weight full_dist", "--lora_name lora_identity"])  # fmt: skip
def test_eval_answers_with_every_stages_weights(life, capsys, flags):
    output = ask(life, capsys, *flags.split(), "--prompt", "你好")
    assert "👶: 你好" in output and "🤖️: " in output


def test_eval_scores_the_reasoning_model(life, capsys, tmp_path):
    questions = tmp_path / "some.jsonl"
    lines = (SAMPLE / "reason_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    questions.write_text("\n".join(lines[:3]), encoding="utf-8")
    assert "held-out score: " in ask(life, capsys, "--model_mode", "3", "--score", str(questions)).splitlines()[-1]
