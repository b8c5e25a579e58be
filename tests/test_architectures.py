"""model/architectures.py: configurations of other architectures that are MiniMind, there and back."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model.architectures import LAYOUT_OF, from_transformers, native_architecture, to_transformers
from model.layouts import LAYOUTS, from_ours, to_ours
from model.LMConfig import PUBLISHED, LMConfig, config_fields
from model.model import MiniMindForCausalLM

SIZES = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 64}
V3_MOE = {"use_moe": True, "qk_norm": True, "n_shared_experts": False, "num_experts_per_tok": 1}
CASES = {
    "llama": {},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6},
    "ernie4_5": {"rope_theta": 1e4},
    "ernie4_5_moe": {"use_moe": True},
    "granitemoeshared": {"use_moe": True, "n_routed_experts": 6, "num_experts_per_tok": 3},
    "qwen2_moe": {"use_moe": True},
    "qwen3_moe": V3_MOE,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, YARN])
@pytest.mark.parametrize("model_type", CASES)
def test_an_export_computes_the_same_and_comes_back(model_type, scaling, tmp_path):
    config = LMConfig(**SIZES, **CASES[model_type], rope_scaling=scaling)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    layout = LAYOUTS[LAYOUT_OF[model_type]]
    tensors = from_ours(model.state_dict(), layout, config.head_dim)
    other_config = to_transformers(config, model_type)
    other_config.save_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    other, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values())
    with torch.no_grad():
        ours, theirs = model(IDS).logits, other.eval()(IDS).logits
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5

    back = from_transformers(AutoConfig.from_pretrained(tmp_path))
    known = {**config_fields(config), "aux_loss_alpha": back.aux_loss_alpha, "seq_aux": back.seq_aux}
    assert config_fields(back) == known
    again = to_ours(tensors, layout, back.head_dim)
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_a_native_architecture(name):
    expected = {"minimind-3": "qwen3", "minimind-3-moe": "qwen3_moe"}
    config = LMConfig(**PUBLISHED[name])
    model_type = native_architecture(config)
    assert model_type == expected.get(name, "ernie4_5_moe" if config.use_moe else "llama")
    back = config_fields(from_transformers(to_transformers(config, model_type)))
    ours = config_fields(config)
    fields = [field for field in ours if field not in ("hidden_dim", "aux_loss_alpha", "seq_aux")]
    assert [back[field] for field in fields] == [ours[field] for field in fields]
    assert back["hidden_dim"] == config.intermediate_size


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"use_moe": True, "qk_norm": True}, "no norms of q and k"),
        ({"use_moe": True, "n_shared_experts": False}, "n_shared_experts is False"),
        ({"use_moe": True, "norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "ntk"),
    ],
)
def test_what_no_architecture_computes_is_told(fields, reason):
    with pytest.raises(ValueError, match=reason):
        native_architecture(LMConfig(**SIZES, **fields))


@pytest.mark.parametrize(
    "model_type, setting, reason",
    [
        ("llama", {"attention_bias": True}, "attention_bias is True, not False"),
        ("llama", {"head_dim": 16}, "head_dim is 16, not 8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ("llama", {"tie_word_embeddings": False}, "tie_word_embeddings is False, not True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, not 1"),
        ("granitemoeshared", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0, not 1.0"),
        ("granitemoeshared", {"attention_multiplier": 1.0}, "attention_multiplier is 1.0"),
        ("ernie4_5_moe", {"moe_layer_start_index": 1}, "moe_layer_start_index is 1, not 0"),
    ],
)
def test_a_model_with_parts_that_minimind_lacks_is_refused(model_type, setting, reason):
    other = to_transformers(LMConfig(**SIZES, **CASES[model_type]), model_type)
    for name, value in setting.items():
        setattr(other, name, value)
    with pytest.raises(ValueError, match=reason):
        from_transformers(other)


def test_other_kinds_of_models_are_refused():
    with pytest.raises(ValueError, match="'gpt2' are no MiniMind"):
        from_transformers(AutoConfig.for_model("gpt2"))
