"""The network computes what trusted implementations compute: transformers' models, textbook formulas."""

import pytest
import torch
import torch.nn.functional as F
from tiny_model import make_ids, make_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.LMConfig import LMConfig
from model.model import RMSNorm, attend
from model.rotary import rotary_frequencies


def hf_kwargs(config: LMConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 4, "rope_theta": 1e4}, {"n_kv_heads": 1}, {"qk_norm": True, "norm_eps": 1e-6}],
)
def test_equals_llama_and_qwen3_with_the_same_tensors(changes):
    model = make_model(**changes)
    if model.config.qk_norm:
        reference = Qwen3ForCausalLM(Qwen3Config(**hf_kwargs(model.config)))
    else:
        reference = LlamaForCausalLM(LlamaConfig(**hf_kwargs(model.config)))
    reference.load_state_dict(model.state_dict(), strict=True)
    ids = make_ids()
    with torch.no_grad():
        ours, theirs = model(ids).logits, reference.eval()(ids).logits
    assert theirs.std() > 1  # not a comparison of near-zeros
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _hf_rope(kind: str, seq_len: int | None = None, **parameters) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 1e6, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=seq_len)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_type": "linear", "factor": 4.0}, ("linear", None, {"factor": 4.0})),
        # Hugging Face's "dynamic" grows theta with the length: at twice the trained one, factor 3 stretches by 4.
        ({"type": "ntk", "factor": 4.0}, ("dynamic", 1024, {"factor": 3.0})),
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
            ("yarn", None, {"factor": 8.0, "original_max_position_embeddings": 256}),
        ),
        (
            {"type": "yarn", "factor": 16, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.0},
            ("yarn", None, {"factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.0}),
        ),
    ],
)
def test_rope_scaling_equals_transformers(ours, theirs):
    kind, seq_len, parameters = theirs
    config = LMConfig(dim=256, n_heads=4, max_seq_len=512, rope_scaling=ours)
    frequencies, scale = rotary_frequencies(config, torch.device("cpu"))
    expected, expected_scale = _hf_rope(kind, seq_len, **parameters)
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)
    assert scale == pytest.approx(expected_scale)


def test_yarn_model_equals_llama():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = make_model(rope_scaling=scaling, rope_theta=1e4)
    kwargs = hf_kwargs(model.config) | {"rope_parameters": {**scaling, "rope_theta": 1e4}}
    reference = LlamaForCausalLM(LlamaConfig(**kwargs)).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    ids = make_ids(T=40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)


def test_fused_attention_equals_the_textbook_formula():
    fused, textbook = make_model(), make_model(flash_attn=False)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        for attention_mask in (None, mask):
            ours = fused(make_ids(), attention_mask=attention_mask).logits
            torch.testing.assert_close(ours, textbook(make_ids(), attention_mask=attention_mask).logits)


def test_attention_averages_what_it_may_see():
    """With equal keys every visible token weighs the same, so row t is the mean of the first t + 1 values."""
    v = torch.randn(1, 1, 6, 4)
    expected = v.cumsum(2) / torch.arange(1, 7)[:, None]
    for fused in (True, False):
        y = attend(torch.randn(1, 2, 6, 4), torch.ones(1, 1, 6, 4), v, mask=None, dropout=0.0, fused=fused)
        torch.testing.assert_close(y, expected.expand(1, 2, 6, 4))


def test_rms_norm_in_half_precision():
    """Upstream G9: squares of values above 256 overflow float16."""
    x = torch.randn(5, 32) * 1000
    norm = RMSNorm(32, 1e-5)
    expected = F.rms_norm(x, (32,), eps=1e-5)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.half()(x.half()).float(), expected, atol=2e-3, rtol=2e-3)
