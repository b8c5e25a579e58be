"""inference/models.py: what models a directory holds, and how each is loaded."""

import shutil

import pytest
import torch
from tiny_model import TINY

from inference.models import Choice, continues_text, find_models, inference_dtype, load_choice
from inference.sampling import SamplingParams
from inference.session import Session
from model.layouts import LAYOUTS, from_ours
from model.LMConfig import LMConfig
from model.loading import TOKENIZER_DIR, save_weights
from model.model import MiniMindForCausalLM
from model.model_lora import apply_lora, lora_state_dict
from model.record import write_record

CONFIG = LMConfig(dim=16, n_layers=1, n_heads=4, n_kv_heads=1)


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(CONFIG).eval()


@pytest.fixture
def out_dir(tmp_path, model):
    """Weights with and without a record, a folder of transformers, and what is no model."""
    for name, stage in (("full_sft_16.pth", "full_sft"), ("mine_16.pth", "pretrain")):
        save_weights(model.state_dict(), tmp_path / name)
        write_record(tmp_path / name, CONFIG, stage=stage)
    torch.save(from_ours(model.state_dict(), LAYOUTS["2025-02"], CONFIG.head_dim), tmp_path / "pretrain_16.pth")
    model.save_pretrained(tmp_path / "folder")
    shutil.copytree(TOKENIZER_DIR, tmp_path / "folder", dirs_exist_ok=True)
    (tmp_path / "lora").mkdir()
    (tmp_path / "damaged_16.pth").write_bytes(b"PK\x03\x04")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "notes.txt").write_text("pth")
    return tmp_path


def test_every_model_of_a_directory_is_found(out_dir):
    found = {choice.path.name: choice for choice in find_models(out_dir)}
    assert sorted(found) == ["folder", "full_sft_16.pth", "mine_16.pth", "pretrain_16.pth"]
    assert {name for name, choice in found.items() if choice.continue_text} == {"mine_16.pth", "pretrain_16.pth"}
    assert found["full_sft_16.pth"].config.n_heads == 4 and not found["full_sft_16.pth"].remarks
    assert "assumed: n_heads 8" in found["pretrain_16.pth"].remarks[0]
    assert find_models(out_dir / "nowhere") == []


def test_a_converted_model_is_what_its_name_says(out_dir, model):
    for name in ("pretrain_16.pth", "full_sft_16.pth"):
        save_weights(model.state_dict(), out_dir / name)
        write_record(out_dir / name, CONFIG, stage="convert_model", started_from="folder")
    assert continues_text(out_dir / "pretrain_16.pth") and not continues_text(out_dir / "full_sft_16.pth")
    write_record(out_dir / "full_sft_16.pth", CONFIG, stage="convert_model", before={"stage": "pretrain"})
    assert continues_text(out_dir / "full_sft_16.pth")


def test_each_is_loaded(out_dir, model):
    for choice in find_models(out_dir):
        loaded, tokenizer = load_choice(choice, "cpu")
        assert not loaded.training and loaded.dtype == torch.float32 and len(tokenizer) == 6400
        if choice.path.name != "pretrain_16.pth":  # whose heads were assumed
            assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_files_that_are_no_models_of_ours_are_left_out(tmp_path):
    config = LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=1, use_moe=True)
    tensors = MiniMindForCausalLM(config).state_dict()
    torch.save(from_ours(tensors, LAYOUTS["qwen2moe"], config.head_dim), tmp_path / "qwen2moe.pth")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.pth")
    torch.save(
        {"tok_embeddings.weight": torch.ones(9, 8), "layers.0.attention.wq.weight": torch.ones(8)}, tmp_path / "a.pth"
    )
    assert [choice.path.name for choice in find_models(tmp_path)] == ["qwen2moe.pth"]


def test_a_model_with_fewer_rows_than_the_tokenizer_has_tokens_is_told(tmp_path):
    config = LMConfig(**{**TINY, "vocab_size": 100})
    model = MiniMindForCausalLM(config)
    save_weights(model.state_dict(), tmp_path / "m.pth")
    model.save_pretrained(tmp_path / "folder")
    shutil.copytree(TOKENIZER_DIR, tmp_path / "folder", dirs_exist_ok=True)
    for choice in (Choice(tmp_path / "m.pth", config), Choice(tmp_path / "folder", config)):
        with pytest.raises(ValueError, match="has rows for 100 tokens, but the tokenizer in .* has 6400"):
            load_choice(choice)


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="full_sft_16.pth not found"):
        load_choice(Choice(tmp_path / "full_sft_16.pth", CONFIG))
    with pytest.raises(FileNotFoundError, match="config.json not found"):
        load_choice(Choice(tmp_path / "MiniMind2"))
    with pytest.raises(ValueError, match="gpu: no such device|'gpu': no such device"):
        load_choice(Choice(tmp_path / "full_sft_16.pth", CONFIG), device="gpu")


def test_auto_is_float32_on_a_cpu():
    cpu = torch.device("cpu")
    assert inference_dtype("auto", cpu) == torch.float32 and inference_dtype("bfloat16", cpu) == torch.bfloat16


def test_a_session_finds_the_adapters_beside_its_model(out_dir, model):
    choice = next(choice for choice in find_models(out_dir) if choice.path.name == "full_sft_16.pth")
    adapted = MiniMindForCausalLM(CONFIG)
    apply_lora(adapted, rank=2)
    for name in ("one", "two"):
        save_weights(lora_state_dict(adapted), out_dir / "lora" / f"{name}_16.pth")
    session = Session.open(choice, SamplingParams(3), lora_names=["two"])
    assert (session.adapters(), session.lora) == (["one", "two"], "two")
    session.use_lora("one")
    assert session.lora == "one"
    with pytest.raises(FileNotFoundError, match="three"):
        session.use_lora("three")
    assert (session.adapters(), session.lora) == (["one", "two"], "one")
    session.use_lora(None)
    assert session.lora is None
