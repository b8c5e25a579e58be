"""The README.md in an exported folder: valid for the hub, true, and nothing of the machine that it was trained on."""

import re

import pytest
from huggingface_hub import ModelCard
from test_convert_model import random_model

from model.hub import address_of
from model.loading import load_tokenizer, save_weights
from model.model_card import Address, model_card
from model.record import write_record
from scripts.convert_model import main, parse_args

FACTS = {
    "stage": "full_sft",
    "started_from": {"weights": "/home/anna/out/pretrain_64.pth", "fingerprint": "0"},
    "data": {
        "path": "/home/anna/secret/sft.jsonl",
        "fingerprint": "1",
        "rows_trained_on": 1234,
        "rows_held_out": 56,
        "max_seq_len": 128,
    },
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
        *("467,264 (dense)", "`LlamaForCausalLM`: 2 layers, width 64, 8/2 heads", "| 256 tokens，", "| full_sft |"),
        *("`sft.jsonl`, 1,234 rows, 56 held out", "`pretrain_64.pth`", "| 4,321 |", "| 7,654,321 |"),
        *("训练时每条至多 trained on sequences of at most 128 |", "figures on other data are not comparable"),
        *("heldout_loss 2.125 |", "<s>user\n你好</s>\n<s>assistant\n你好！</s>"),
    ):
        assert told in text
    assert "anna" not in text and "secret" not in text and str(tmp_path) not in text


def test_without_a_record_it_tells_no_figures(tmp_path):
    text = card_of(tmp_path, facts=None)
    assert "## 训练" not in text and "trained on sequences" not in text and "not comparable" not in text


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    text = card_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    capsys.readouterr()
    exec(program.replace("max_new_tokens=256", "max_new_tokens=4"), {})  # noqa: S102
    assert capsys.readouterr().out


def test_it_names_the_folder_as_seen_from_here(tmp_path, monkeypatch):
    """A card in out/hf said from_pretrained("hf"), which is found only from inside of out."""
    monkeypatch.chdir(tmp_path)
    save_weights(random_model().state_dict(), tmp_path / "m_64.pth")
    for target in ("out/hf", str(tmp_path / "out" / "same")):
        main(["m_64.pth", target])
    text = (tmp_path / "out" / "hf" / "README.md").read_text(encoding="utf-8")
    assert 'AutoTokenizer.from_pretrained("out/hf")' in text and "vllm serve out/hf\n" in text and "# hf\n" in text
    assert "convert_model.py out/hf hf-f16.gguf" in text and "ollama create hf -f hf-f16.Modelfile" in text
    assert 'from_pretrained("out/same")' in (tmp_path / "out" / "same" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("hub", "name", "download"),
    [
        ("huggingface", "me/Tiny", "hf download me/Tiny --local-dir Tiny"),
        ("modelscope", "Tiny", "modelscope download --model me/Tiny --local_dir Tiny"),
    ],
)
def test_a_card_to_be_uploaded_names_the_repository_and_the_license(hub, name, download):
    args = parse_args(["m.pth", "out/hf", "--push", "me/Tiny", "--hub", hub, "--license", "cc-by-4.0"])
    text = model_card(address_of(args), random_model().config, 1, "LlamaForCausalLM", "f32", {}, load_tokenizer())
    assert ModelCard(text).data.license == "cc-by-4.0" and "out/hf" not in text
    assert f'AutoTokenizer.from_pretrained("{name}")' in text and f"vllm serve {name}\n" in text
    assert f"\n{download}\n" in text and "convert_model.py Tiny Tiny-f16.gguf" in text


def test_our_own_class_is_said_to_need_its_code():
    config = random_model(use_moe=True).config
    text = model_card(Address("Tiny"), config, 1234, "MiniMindForCausalLM", "f32", {}, load_tokenizer())
    assert "custom_code" in ModelCard(text).data.tags and text.count("trust_remote_code=True") == 2
    assert "2 of 4 experts" in text and "vllm serve" not in text and "ollama create" not in text


def test_converted_weights_keep_what_is_known_of_their_training(tmp_path):
    text = card_of(tmp_path)
    main([str(tmp_path / "full_sft_64.pth"), str(tmp_path / "copy.pth")])
    main([str(tmp_path / "copy.pth"), str(tmp_path / "again.pth")])
    main([str(tmp_path / "again.pth"), str(tmp_path / "folder")])
    again = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    for told in ("| full_sft |", "`sft.jsonl`, 1,234 rows", "| 4,321 |", "at most 128 |", "heldout_loss 2.125 |"):
        assert told in text and told in again
    assert "| convert_model |" in again and "figures on other data are not comparable" in again
