"""model/folders.py: a MiniMind folder of any age, or of an architecture that computes the same, is read whole."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from model.architectures import LAYOUT_OF, to_transformers
from model.folders import folder_config, new_files, read_folder
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
        (
            {**TODAY, "inference_rope_scaling": True},
            "2025-04",
            {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6, "rope_scaling": {
             "rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "attention_factor": 1.0}},
        ),
        (
            {**V2504, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default", "partial_rotary_factor": 1.0}},
            "2025-04",
            {"rope_theta": 1e5},
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
        ({"rope_parameters": 5}, "rope_parameters is 5, not a table"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], not a table"),
        ({"rope_parameters": {"full": {"rope_type": "yarn"}}}, "rope_theta alone, and no full"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "no partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}}, "rope_theta alone, and no factor"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, not False"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', not 'softmax'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, not True"),
        ({"head_dim": 64}, "head_dim is 64, not 4"),
        ({"inference_rope_scaling": "yes"}, "inference_rope_scaling is 'yes', not True or False"),
        ({"model_type": "llama", "tie_word_embeddings": 0.5}, "tie_word_embeddings.* expected bool.*0.5.*correct it"),
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


class Code:
    def __reduce__(self):
        return os.system, ("exit 0",)


@pytest.mark.parametrize("read", [read_folder, folder_config])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_told_with_a_remedy(name, read, tmp_path):
    """Reading shapes alone repeated PyTorch's advice to let the file's code run."""
    model = random_model()
    is_bin = name.endswith(".bin")
    write(tmp_path, to_transformers(model.config, "llama").to_dict(), model.state_dict(), safetensors=not is_bin)
    whole = (tmp_path / name).read_bytes()
    contents = {whole[: len(whole) // 2]: "is cut off or damaged"}
    if is_bin:
        torch.save({"x": Code()}, tmp_path / "code")
        torch.save(model.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
        torch.save([1], tmp_path / "list")
        contents |= {
            (tmp_path / "code").read_bytes(): "holds more than tensors and was not opened",
            (tmp_path / "old").read_bytes(): "is a bare pickle, as torch.save wrote it before PyTorch 1.6",
            pickle.dumps(Code()): "is a bare pickle",
            (tmp_path / "list").read_bytes(): "is not a state dict",
            b"": "is empty",
            b"text": "is not a PyTorch file",
        }
    for content, reason in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {reason}.*: copy or make it again") as refused:
            read(tmp_path)
        assert "weights_only" not in str(refused.value) and "mmap" not in str(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "extra.safetensors", "pytorch_model.bin"])
def test_a_pipe_among_the_weights_is_refused_at_once(name, tmp_path):
    """Whoever opened it waited forever."""
    model = random_model()
    write(tmp_path, to_transformers(model.config, "llama").to_dict(), model.state_dict())
    if name != "extra.safetensors":
        (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a folder, a pipe"):
        read_folder(tmp_path)


def test_new_files_take_no_place_that_was_taken_meanwhile(tmp_path):
    """They replaced what another program had written in between."""
    weights, beside = tmp_path / "m.pth", tmp_path / "m.json"
    with pytest.raises(FileExistsError, match="m.pth exists since a moment ago"):
        with new_files(weights, beside) as written:
            for file in written:
                file.write_text("ours")
            weights.write_text("theirs")
    assert weights.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_two_that_write_the_same_do_not_remove_each_others_files(tmp_path):
    """The second to start removed the directory of the first, which then failed."""
    running = tmp_path / f".m.pth.{os.getppid()}.tmp"
    killed = tmp_path / f".m.pth.{2**31 - 1}.tmp"
    running.mkdir()
    killed.mkdir()
    with new_files(tmp_path / "m.pth") as written:
        written[0].write_text("ours")
    assert running.is_dir() and not killed.exists() and (tmp_path / "m.pth").read_text() == "ours"
