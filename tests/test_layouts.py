"""model/layouts.py: every published layout is recognised, converts without loss, and computes the same."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from model.layouts import LAYOUTS, from_ours, recognise, split_granite, to_ours
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.rotary import rotary_frequencies, rotate

IDS = torch.arange(3, 43).reshape(2, 20)
SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 64},
    **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "attention_dropout": 0.0},
}
OURS = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 64}
ARCHITECTURES = {
    "LlamaForCausalLM": ("ours", {"intermediate_size": 48}, {}),
    "Qwen3ForCausalLM": ("ours", {"intermediate_size": 48, "head_dim": 8}, {"qk_norm": True}),
    "Ernie4_5ForCausalLM": ("ernie4_5", {"intermediate_size": 48, "head_dim": 8, "use_bias": False}, {}),
    "Qwen3MoeForCausalLM": (
        "2025-04",
        {
            **{"moe_intermediate_size": 48, "intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
            **{"norm_topk_prob": True, "decoder_sparse_step": 1, "head_dim": 8},
        },
        {"qk_norm": True, "use_moe": True, "n_shared_experts": False},
    ),
    "GraniteMoeSharedForCausalLM": (
        "granitemoeshared",
        {
            **{"intermediate_size": 48, "shared_intermediate_size": 48, "num_local_experts": 4},
            **{"num_experts_per_tok": 2, "attention_multiplier": 8**-0.5},
        },
        {"use_moe": True},
    ),
    "Ernie4_5_MoeForCausalLM": (
        "ernie4_5_moe",
        {
            **{"moe_intermediate_size": 48, "intermediate_size": 96, "moe_num_experts": 4, "moe_k": 2},
            **{"moe_num_shared_experts": 1, "moe_layer_start_index": 0, "moe_layer_end_index": 1, "use_bias": False},
        },
        {"use_moe": True},
    ),
    "Qwen2MoeForCausalLM": (
        "qwen2moe",
        {
            **{"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "intermediate_size": 96},
            **{"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1},
        },
        {"use_moe": True},
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Large random weights, so that a wrong order shows; norms away from one, so that each is seen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            if name.endswith(("_proj.bias", "shared_expert_gate.weight", "e_score_correction_bias")):
                parameter.zero_()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def foreign(request, tmp_path_factory):
    """A random model of another architecture: (layout name, our configuration, its file's tensors, its logits)."""
    layout, sizes, fields = ARCHITECTURES[request.param]
    cls = getattr(transformers, request.param)
    model = cls(cls.config_class(**SIZES, **sizes)).eval()
    randomize(model)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    with torch.no_grad():
        logits = model(IDS).logits
    return layout, LMConfig(**OURS, **fields), load_file(directory / "model.safetensors"), logits


def test_other_architectures_compute_the_same_here(foreign):
    name, config, tensors, logits = foreign
    layout = LAYOUTS[name]
    model = MiniMindForCausalLM(config).eval()
    model.load_state_dict(to_ours(tensors, layout, config.head_dim))
    with torch.no_grad():
        difference = (model(IDS).logits - logits).abs().max() / logits.abs().max()
    assert difference < 1e-5


def test_other_architectures_are_recognised(foreign):
    name, _, tensors, _ = foreign
    assert recognise(tensors).name == ("ours" if name == "ernie4_5" else name)
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in tensors.items()}
    assert recognise(wrapped) is recognise(tensors)


def test_conversion_there_and_back_loses_no_bit(foreign):
    name, config, tensors, _ = foreign
    back = from_ours(to_ours(tensors, LAYOUTS[name], config.head_dim), LAYOUTS[name], config.head_dim)
    back.pop("lm_head.weight")  # tied: these files leave it out
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype, key
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in back.values() if tensor.ndim > 1)


# MiniMind's own files


def our_tensors(**fields) -> tuple[LMConfig, dict[str, torch.Tensor]]:
    config = LMConfig(**OURS, **fields)
    model = MiniMindForCausalLM(config)
    randomize(model)
    return config, {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("name", ["2025-02", "2025-04"])
def test_minimind_files_of_all_ages_come_back_whole(name, use_moe):
    config, ours = our_tensors(use_moe=use_moe)
    theirs = from_ours(ours, LAYOUTS[name], config.head_dim)
    assert recognise(theirs).name == (name if use_moe or name == "2025-02" else "ours")
    again = to_ours(theirs, recognise(theirs), config.head_dim)
    assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)


def test_the_names_of_2025_02():
    config, ours = our_tensors(use_moe=True)
    theirs = from_ours(ours, LAYOUTS["2025-02"], config.head_dim)
    assert {name.replace("layers.1.", "layers.0.") for name in theirs} == {
        *("tok_embeddings.weight", "norm.weight", "output.weight"),
        *(f"layers.0.attention.w{part}.weight" for part in "qkvo"),
        *("layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "layers.0.feed_forward.gate.weight"),
        *(f"layers.0.feed_forward.shared_experts.w{i}.weight" for i in (1, 2, 3)),
        *(f"layers.0.feed_forward.experts.{e}.w{i}.weight" for e in range(4) for i in (1, 2, 3)),
    }
    assert torch.equal(theirs["layers.1.feed_forward.w2.weight".replace("forward.", "forward.experts.3.")],
                       ours["model.layers.1.mlp.experts.down_proj"][3])  # fmt: skip


def turn_pairs(x: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE as MiniMind of 2025-02 has it: channels (2i, 2i+1) are a complex number. x (T, heads, C)."""
    T, _, C = x.shape
    angles = torch.arange(T)[:, None] * theta ** (-torch.arange(0, C, 2) / C)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def test_the_files_of_2025_02_turn_neighbouring_channels():
    """Scores q k^T by complex numbers and the file's rows equal ours by halves and converted rows."""
    config, ours = our_tensors()
    theirs = from_ours(ours, LAYOUTS["2025-02"], config.head_dim)
    x, C = torch.randn(20, 32), config.head_dim
    q = turn_pairs((x @ theirs["layers.0.attention.wq.weight"].T).unflatten(-1, (4, C)), config.rope_theta)
    k = turn_pairs((x @ theirs["layers.0.attention.wk.weight"].T).unflatten(-1, (2, C)), config.rope_theta)
    expected = torch.einsum("thc,shc->hts", q, k.repeat_interleave(2, dim=1))

    frequencies, _ = rotary_frequencies(config, x.device)
    angles = torch.arange(20)[None, :, None, None] * frequencies
    q = (x @ ours["model.layers.0.self_attn.q_proj.weight"].T).unflatten(-1, (4, C))
    k = (x @ ours["model.layers.0.self_attn.k_proj.weight"].T).unflatten(-1, (2, C))
    q, k = (rotate(heads[None], angles.cos(), angles.sin())[0] for heads in (q, k))
    scores = torch.einsum("thc,shc->hts", q, k.repeat_interleave(2, dim=1))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_constants_in_old_files_are_left_out():
    config, ours = our_tensors()
    theirs = from_ours(ours, LAYOUTS["2025-02"], config.head_dim)
    theirs |= {"pos_cis": torch.zeros(3), "layers.0.attention.mask": torch.zeros(1, 1, 4, 4)}
    assert to_ours(theirs, LAYOUTS["2025-02"], config.head_dim).keys() == ours.keys()


def test_what_fits_no_layout_is_refused_with_names():
    with pytest.raises(ValueError, match="begin with transformer.h.0.attn.weight"):
        recognise(["transformer.h.0.attn.weight", "transformer.wte.weight"])
    with pytest.raises(ValueError, match="nothing"):
        recognise([])
    config, ours = our_tensors(qk_norm=True, use_moe=True)
    with pytest.raises(ValueError, match="no place for model.layers.0.self_attn.q_norm.weight"):
        from_ours(ours, LAYOUTS["2025-02"], config.head_dim)
    theirs = from_ours(ours, LAYOUTS["2025-04"], config.head_dim)
    with pytest.raises(ValueError, match="1 names .* first model.layers.0.self_attn.sinks"):
        to_ours({**theirs, "model.layers.0.self_attn.sinks": torch.zeros(4)}, LAYOUTS["2025-04"], config.head_dim)
    del theirs["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ValueError, match=r"experts \[0, 1, 3\] are there, not 0 to 2"):
        to_ours(theirs, LAYOUTS["2025-04"], config.head_dim)


def test_tensors_that_are_no_matrices_and_names_twice_are_refused():
    for name, tensor, reason in (
        ("layers.0.attention.wq.weight", torch.ones(64), "where a matrix is needed"),
        ("layers.0.attention.wk.weight", torch.tensor(1.0), "where a matrix is needed"),
        ("module.norm.weight", torch.ones(32), "both module.norm.weight and norm.weight"),
    ):
        config, ours = our_tensors()
        theirs = from_ours(ours, LAYOUTS["2025-02"], config.head_dim)
        with pytest.raises(ValueError, match=reason):
            to_ours({**theirs, name: tensor}, LAYOUTS["2025-02"], config.head_dim)
    with pytest.raises(ValueError, match="gate and up are two matrices"):
        split_granite({"model.layers.0.block_sparse_moe.input_linear.weight": torch.tensor(1.0)})


def test_parts_that_minimind_does_not_have_are_refused():
    for name, part in (
        ("ernie4_5_moe", "mlp.moe_statics.e_score_correction_bias"),
        ("qwen2moe", "self_attn.q_proj.bias"),
        ("qwen2moe", "mlp.shared_expert_gate.weight"),
    ):
        config, ours = our_tensors(use_moe=True)
        theirs = from_ours(ours, LAYOUTS[name], config.head_dim)
        theirs[f"model.layers.1.{part}"] += 0.5
        with pytest.raises(ValueError, match=f"{part} is not zero"):
            to_ours(theirs, LAYOUTS[name], config.head_dim)


def test_a_wrong_number_of_heads_is_told():
    config, ours = our_tensors()
    with pytest.raises(ValueError, match="32 rows, which are no whole heads of 12"):
        from_ours(ours, LAYOUTS["2025-02"], 12)
