"""Model directories of transformers: which are read, and why others are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy import same_weights
from transformers import LlamaConfig, LlamaForCausalLM

from model.chat_format import ChatFormat
from model.folders import load_foreign
from model.layouts import LAYOUTS, from_ours
from model.LMConfig import LMConfig
from model.loading import TOKENIZER_DIR, load_tokenizer, save_weights
from model.model import MiniMindForCausalLM
from model.opening import open_model

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6400}


def make_model(**changes) -> MiniMindForCausalLM:
    return MiniMindForCausalLM(LMConfig(**{**TINY, **changes})).eval()


def save_directory(path: Path, model=None, tensors: dict | None = None, **changes) -> Path:
    """A directory of transformers with everything in it; `tensors` replace the model's, `changes` go to config.json."""
    model = model or make_model()
    model.save_pretrained(path)
    shutil.copytree(TOKENIZER_DIR, path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    if tensors is not None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def llama(**changes) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, vocab_size=6400, **changes))


def test_a_directory_in_the_layout_of_early_2025_is_read(tmp_path):
    """It loaded with random weights, and the model babbled."""
    model = make_model()
    tensors = from_ours(model.state_dict(), LAYOUTS["2025-02"], model.config.head_dim)
    tensors["output.weight"] = tensors["output.weight"].clone()  # safetensors stores no tensor twice
    path = save_directory(tmp_path / "MiniMind2", model, tensors)
    loaded = open_model(path, {}).model()
    assert same_weights(loaded.state_dict(), model.state_dict())
    del tensors["layers.1.ffn_norm.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="MiniMind2 does not fit .*post_attention_layernorm.weight missing"):
        open_model(path, {}).model()


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("model.norm.weight", None, r"1 missing \(model.norm.weight\).*same release"),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(8), r"1 not expected \(model.layers.0.self_attn.q_norm"),
        ("model.norm.weight", torch.ones(16), r"1 of another size \(model.norm.weight is \(16,\), not \(32,\)\)"),
        (
            "model.norm.weight",
            torch.full((32,), torch.nan),
            "holds NaN or infinity in 1 tensors, first model.norm.weight",
        ),
    ],
)
def test_a_directory_that_does_not_fit_its_config_is_refused(tmp_path, name, change, problem):
    tensors = {**llama().state_dict(), name: change}
    path = save_directory(tmp_path / "x", llama(), {key: value for key, value in tensors.items() if value is not None})
    with pytest.raises(ValueError, match=problem):
        load_foreign(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"rope_scaling": [1]},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path, changes):
    """Each of them was a stack trace."""
    path = save_directory(tmp_path / "x", llama(), **changes)
    with pytest.raises(ValueError, match="x cannot be read"):
        load_foreign(path)


def test_code_in_a_directory_does_not_run_and_nobody_is_asked_to_let_it(tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    path = save_directory(tmp_path / "x", llama(), model_type="own", auto_map=names)
    (path / "own.py").write_text(f"open({str(trap)!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(ValueError, match="contains custom code"):
        load_foreign(path)
    assert not trap.exists()


def test_a_tokenizer_without_ends_is_refused(tmp_path):
    path = save_directory(tmp_path / "x", llama())
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"x names no beginning .bos_token. or no end"):
        ChatFormat(load_tokenizer(path))


def test_what_a_sound_directory_may_lack_or_hold(tmp_path):
    """A tied output matrix is not stored; tables of rotary positions are, in old files."""
    tied = llama(tie_word_embeddings=True)
    tensors = {name: tensor for name, tensor in tied.state_dict().items() if name != "lm_head.weight"}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    loaded, _ = load_foreign(save_directory(tmp_path / "x", tied, tensors))
    assert same_weights(loaded.state_dict(), tied.state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_directory_is_refused(tmp_path, name):
    model = make_model()
    path = save_directory(tmp_path / "x", model)
    if name == "pytorch_model.bin":
        (path / "model.safetensors").unlink()
        save_weights(model.state_dict(), path / name)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:9000])
    with pytest.raises(ValueError, match=f"{name} is cut off or damaged"):
        open_model(path, {})
    if name == "pytorch_model.bin":
        (path / name).write_bytes(content[:9000] + bytes([content[9000] ^ 1]) + content[9001:])
        with pytest.raises(ValueError, match="the checksum of .* is wrong"):
            open_model(path, {})
