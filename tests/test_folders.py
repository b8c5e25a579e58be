"""model/folders.py: a MiniMind folder of any age, or of an architecture that computes the same, is read whole."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from model.architectures import LAYOUT_OF, to_transformers
from model.folders import read_folder
from model.layouts import LAYOUTS, from_ours
from model.LMConfig import LMConfig, config_fields
from model.model import MiniMindForCausalLM

SIZES = {"vocab_size": 64, "dim": 32, "n_layers": 2, "hidden_dim": 48}
IDS = torch.arange(3, 43).reshape(2, 20)


def random_model(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(**SIZES, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def write(path, fields: dict, tensors: dict, *, safetensors: bool = True) -> None:
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    if safetensors:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    else:
        torch.save(tensors, path / "pytorch_model.bin")


def assert_reads(path, model: MiniMindForCausalLM) -> None:
    """The folder holds this very model."""
    config, tensors = read_folder(path)
    read = MiniMindForCausalLM(config).eval()
    read.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, model(IDS).logits)


# What config.json said at each time, for the sizes above; the rest follows from the tensors.
V1 = {"model_type": "minimind", "dim": 32, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 64,
      "hidden_dim": 48, "multiple_of": 64, "norm_eps": 1e-5, "max_seq_len": 512, "dropout": 0.0, "flash_attn": True,
      "auto_map": {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.Transformer"}}  # fmt: skip
V2502 = {**V1, "n_heads": 8, "n_kv_heads": 2, "rope_theta": 1e6, "max_seq_len": 8192}
MOE = {"use_moe": True, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": True}
V2504 = {"model_type": "minimind", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 64, "intermediate_size": 48, "rms_norm_eps": 1e-5,
         "rope_theta": 1e6, "max_position_embeddings": 32768, "hidden_act": "silu"}  # fmt: skip
TODAY = {**V2504, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "head_dim": 4, "inference_rope_scaling": False}


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize(
    "fields, layout, ours",
    [
        (V1, "2025-02", {"n_heads": 16, "n_kv_heads": 8, "rope_theta": 1e4}),
        ({**V1, **MOE}, "2025-02", {"n_heads": 16, "n_kv_heads": 8, "rope_theta": 1e4, "use_moe": True}),
        (V2502, "2025-02", {}),
        ({**V2502, **MOE}, "2025-02", {"use_moe": True}),
        (V2504, "2025-04", {}),
        ({**V2504, **MOE, "n_shared_experts": 1}, "2025-04", {"use_moe": True}),
        (TODAY, "2025-04", {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6}),
        (
            {**TODAY, "use_moe": 1, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 48},
            "2025-04",
            {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6, "use_moe": True, "num_experts_per_tok": 1,
             "n_shared_experts": False},
        ),
        (
            {**TODAY, "rope_theta": None, "rope_parameters": {"rope_theta": 1e5, "rope_type": "yarn", "factor": 16,
             "original_max_position_embeddings": 2048, "attention_factor": 1.0}},
            "2025-04",
            {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e5, "rope_scaling": {
             "rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "attention_factor": 1.0}},
        ),
    ],
)  # fmt: skip
def test_minimind_folders_of_every_age(fields, layout, ours, safetensors, tmp_path):
    model = random_model(**ours)
    tensors = from_ours(model.state_dict(), LAYOUTS[layout], model.config.head_dim)
    write(tmp_path, fields, tensors, safetensors=safetensors)
    assert_reads(tmp_path, model)


def test_a_folder_that_we_saved(tmp_path):
    model = random_model(use_moe=True, n_routed_experts=3)
    model.save_pretrained(tmp_path)
    assert_reads(tmp_path, model)


@pytest.mark.parametrize("model_type", LAYOUT_OF)
def test_folders_of_architectures_that_compute_the_same(model_type, tmp_path):
    extra = {"qk_norm": model_type.startswith("qwen3"), "use_moe": "moe" in model_type}
    if model_type == "qwen3_moe":
        extra["n_shared_experts"] = False
    model = random_model(**extra)
    tensors = from_ours(model.state_dict(), LAYOUTS[LAYOUT_OF[model_type]], model.config.head_dim)
    write(tmp_path, to_transformers(model.config, model_type).to_dict(), tensors)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)  # as transformers itself writes it
    assert_reads(tmp_path, model)


def test_a_model_in_several_files_needs_them_all(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert_reads(tmp_path, model)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"n_layers": 10**9}, "says n_layers 1000000000, but its tensors show 2"),
        ({"rope_parameters": 5}, "int"),
        ({"model_type": "llama", "num_hidden_layers": [1]}, "num_hidden_layers"),
        ({"model_type": ["llama"]}, "unhashable"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_before_a_model_is_built(changes, reason, tmp_path):
    model = random_model()
    write(tmp_path, {**config_fields(model.config), "model_type": "minimind", **changes}, model.state_dict())
    with pytest.raises(ValueError, match=f"{tmp_path}.*{reason}"):
        read_folder(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"a": 5}}])
def test_an_index_that_is_none_is_refused(index, tmp_path):
    model = random_model()
    write(tmp_path, {**config_fields(model.config), "model_type": "minimind"}, model.state_dict())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no weight_map"):
        read_folder(tmp_path)


def test_what_is_no_minimind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_folder(tmp_path)
    model = random_model()
    fields = to_transformers(model.config, "llama").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_folder(tmp_path)
    write(tmp_path, {**fields, "attention_bias": True}, model.state_dict())
    with pytest.raises(ValueError, match="attention_bias is True, not False"):
        read_folder(tmp_path)
    write(tmp_path, AutoConfig.for_model("gpt2").to_dict(), model.state_dict())
    with pytest.raises(ValueError, match="'gpt2' are no MiniMind"):
        read_folder(tmp_path)
    write(tmp_path, V2502, {"transformer.wte.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="no layout of MiniMind"):
        read_folder(tmp_path)
    for text, reason in (("{", "no JSON"), ("[]", "must hold a JSON object"), ("[" * 100000, "no JSON")):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=reason):
            read_folder(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    model = random_model()
    for safetensors in (True, False):
        write(tmp_path, to_transformers(model.config, "llama").to_dict(), model.state_dict(), safetensors=safetensors)
        file = next(tmp_path.glob("*.safetensors" if safetensors else "*.bin"))
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
            read_folder(tmp_path)
        file.unlink()
