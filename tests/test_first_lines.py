"""What a run says before its first step: how many parameters, how much padding, and of data that is too little."""

import re

import pytest

import train_distillation
import train_full_sft

ROW = {"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}


@pytest.fixture
def said(write_jsonl, tmp_path, capsys, monkeypatch):
    """said(rows, *flags) -> all that fine-tuning a small model on so many rows prints, in one line."""
    monkeypatch.setattr("training.report.plot_log", lambda *_: None)
    monkeypatch.setattr("training.evaluation.Evaluation.answers", lambda *_: [])

    def run(rows: int, *flags: str, stage=train_full_sft) -> str:
        data = write_jsonl([ROW] * rows)
        argv = f"--data_path {data} --out_dir {tmp_path / 'out'} --cache_dir {tmp_path / 'cache'} --from_weight none"
        argv += " --dim 16 --n_layers 1 --device cpu --dtype float32 --num_workers 0"
        stage.main([*argv.split(), *flags])
        return re.sub(r"\s+", " ", capsys.readouterr().out)

    return run


def test_padding_is_told_for_the_length_of_this_run(said):
    """It was told for 512 tokens, whatever --max_seq_len."""
    assert "--max_seq_len 64; 若像原版每行都补齐到这么长, 填充占 79.7%" in said(2, "--max_seq_len", "64")  # 13 tokens


def test_too_little_data_is_told_with_the_flags_that_help(said):
    text = said(3, "--batch_size", "32", "--accumulation_steps", "4", "--epochs", "2")
    assert "!!! 2 rows to train on and 1 held out: a held-out loss of so few may be chance" in text
    assert "!!! only 2 optimizer steps: 2 rows to train on" in text
    for flag in ("--epochs above 2", "--batch_size below 32", "--accumulation_steps below 4", "--heldout_share 0.005"):
        assert flag in text


def test_a_single_row_has_no_heldout_loss(said):
    assert "!!! 1 rows to train on and 0 held out: there is no held-out loss; raise" in said(1)
    assert "held out" not in said(1, "--heldout_share", "0", "--learning_rate", "1e-4")


def test_enough_data_is_not_remarked_upon(said):
    assert "!!!" not in said(60, "--batch_size", "2", "--heldout_share", "0.2")


def test_distillation_tells_each_model_once(said, tmp_path):
    said(3, "--dim", "32", "--n_layers", "2")
    text = said(3, "--teacher_dim", "32", "--teacher_n_layers", "2", stage=train_distillation)
    assert text.count("参数量") == 2
    assert re.search(r"教师模型\(LLM\)总参数量：0\.\d+ 百万 学生模型\(LLM\)总参数量：0\.\d+ 百万 cpu", text)
