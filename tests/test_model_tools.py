"""What Hugging Face's tools expect of the network: generate, save_pretrained, the auto classes."""

import pytest
import torch
from tiny_model import make_ids, make_model
from transformers import AutoModelForCausalLM

from model.cache import KVCache
from model.LMConfig import LMConfig
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


def test_registers_with_the_auto_classes(tmp_path):
    from transformers import AutoConfig

    AutoConfig.register("minimind", LMConfig, exist_ok=True)
    AutoModelForCausalLM.register(LMConfig, MiniMindForCausalLM, exist_ok=True)
    make_model().save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MiniMindForCausalLM)
