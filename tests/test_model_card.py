"""The README.md in an exported folder: valid for the hub, true, and nothing of the machine that it was trained on."""

import re

from huggingface_hub import ModelCard
from test_convert_model import random_model

from model.loading import load_tokenizer, save_weights
from model.model_card import model_card
from model.record import write_record
from scripts.convert_model import main

FACTS = {
    "stage": "full_sft",
    "started_from": {"weights": "/home/anna/out/pretrain_64.pth", "fingerprint": "0"},
    "data": {"path": "/home/anna/secret/sft.jsonl", "fingerprint": "1", "rows_trained_on": 1234, "rows_held_out": 56},
    "step": 4321,
    "tokens": 7654321,
    "heldout": {"heldout_loss": 2.125, "bits_per_byte": None},
}


def card_of(tmp_path, *flags, facts=FACTS, **fields) -> str:
    model = random_model(**fields)
    path = tmp_path / "full_sft_64.pth"
    save_weights(model.state_dict(), path)
    if facts is not None:
        write_record(path, model.config, **facts)
    main([str(path), str(tmp_path / "MiniMind2-Tiny"), *flags])
    return (tmp_path / "MiniMind2-Tiny" / "README.md").read_text(encoding="utf-8")


def test_the_hub_can_read_it_and_it_says_what_the_record_says(tmp_path):
    text = card_of(tmp_path)
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "language": ["zh", "en"],
        "pipeline_tag": "text-generation",
        "tags": ["minimind", "conversational"],
    }
    for told in (
        *("467,264 (dense)", "`LlamaForCausalLM`: 2 layers, width 64, 8/2 heads", "256 tokens", "| full_sft |"),
        *("`sft.jsonl`, 1,234 rows, 56 held out", "`pretrain_64.pth`", "| 4,321 |", "| 7,654,321 |"),
        *("heldout_loss 2.125 |", "<s>user\n你好</s>\n<s>assistant\n你好！</s>"),
    ):
        assert told in text
    assert "anna" not in text and "secret" not in text and str(tmp_path) not in text


def test_without_a_record_it_tells_no_figures(tmp_path):
    assert "## 训练" not in card_of(tmp_path, facts=None)


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    text = card_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    capsys.readouterr()
    exec(program.replace("max_new_tokens=256", "max_new_tokens=4"), {})  # noqa: S102
    assert capsys.readouterr().out


def test_our_own_class_is_said_to_need_its_code():
    config = random_model(use_moe=True).config
    text = model_card("Tiny", config, 1234, "MiniMindForCausalLM", "f32", {}, load_tokenizer())
    assert "custom_code" in ModelCard(text).data.tags and text.count("trust_remote_code=True") == 2
    assert "2 of 4 experts" in text and "vllm serve" not in text and "ollama create" not in text
