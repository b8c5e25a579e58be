"""What Hugging Face's tools expect of the network: generate, save_pretrained, the auto classes."""

import json
from unittest.mock import patch

import pytest
import torch
from tiny_model import make_ids, make_model
from transformers import AutoModel, AutoModelForCausalLM

from model.auto import register_auto_classes
from model.cache import KVCache
from model.model import MiniMindForCausalLM


def greedy(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
def test_generate_with_and_without_cache():
    model, ids = make_model(), make_ids(B=2, T=7)
    expected = greedy(model, ids, 8)
    for use_cache in (True, False):
        generated = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache, eos_token_id=None)
        assert torch.equal(generated, expected)


@torch.no_grad()
def test_generate_left_padded_batch():
    model, ids = make_model(), make_ids(B=2, T=7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    generated = model.generate(ids, **options)
    assert torch.equal(generated[0], greedy(model, ids[:1], 8)[0])
    assert torch.equal(generated[1, 3:], greedy(model, ids[1:, 3:], 8)[0])
    assert torch.equal(model.generate(ids, **options, past_key_values=KVCache(model.config, 2, 16)), generated)
    static = model.generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generated)


@pytest.mark.parametrize("use_moe", [False, True])
def test_save_and_load_keep_the_tie(tmp_path, use_moe):
    """Upstream G11: saving failed on the tied tensor."""
    model = make_model(use_moe=use_moe, rope_scaling={"rope_type": "linear", "factor": 2.0})
    model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.to_dict() == model.config.to_dict() | {
        "_name_or_path": str(tmp_path),
        "architectures": ["MiniMindForCausalLM"],
        "dtype": "float32",
    }
    assert torch.equal(loaded(make_ids()).logits, model(make_ids()).logits)


def test_meta_device_model_needs_only_its_weights():
    """Upstream G10: the rotary table was a buffer that no weight file brings back."""
    model = make_model()
    with torch.device("meta"):
        empty = MiniMindForCausalLM(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.eval()(make_ids()).logits, model(make_ids()).logits)
    assert not list(model.buffers())


def test_bfloat16_weights_and_resized_vocabulary():
    model, ids = make_model(), make_ids()
    expected = model(ids).logits
    model.resize_token_embeddings(128)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits[..., :97], expected)
    assert model.bfloat16()(ids).logits.dtype == torch.bfloat16


def test_bfloat16_is_loaded_as_asked(tmp_path):
    model = make_model(use_moe=True)
    model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.isfinite(loaded(make_ids()).logits).all()


def test_attention_is_chosen_by_the_name_that_transformers_has_for_it(tmp_path):
    model, ids = make_model(), make_ids()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    eager = MiniMindForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with patch("torch.nn.functional.scaled_dot_product_attention") as fused:
        torch.testing.assert_close(eager(ids).logits, expected)
        assert not fused.called
        eager.set_attn_implementation("sdpa")
        fused.side_effect = LookupError
        with pytest.raises(LookupError):
            eager(ids)
    for other in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError)):
            eager.set_attn_implementation(other)


def test_registers_with_the_auto_classes(tmp_path):
    register_auto_classes()
    model = make_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MiniMindForCausalLM)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(make_ids()).last_hidden_state, model.model(make_ids()).last_hidden_state)
