"""The network: parity with trusted implementations, invariances, and what Hugging Face's tools expect of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.cache import KVCache
from model.LMConfig import PUBLISHED, LMConfig
from model.loading import count_parameters
from model.model import MiniMindForCausalLM, RMSNorm, attend
from model.rotary import rotary_frequencies

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97, "max_seq_len": 64}


def make_model(seed: int = 0, **changes) -> MiniMindForCausalLM:
    """A tiny model whose weights are large enough for attention and logits to be far from uniform."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(LMConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_ids(B: int = 3, T: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


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


# --- Sizes and initial weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("MiniMind2-Small", 25_829_888),
        ("MiniMind2", 104_030_976),
        ("MiniMind2-MoE", 145_029_760),
        ("minimind-v1-small", 26_878_464),
        ("minimind-v1", 108_749_568),
        ("minimind-3", 63_912_192),
        ("minimind-3-moe", 198_416_640),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        assert count_parameters(MiniMindForCausalLM(LMConfig(**PUBLISHED[name]))) == parameters


def test_first_loss_of_a_fresh_26M_model_is_that_of_a_uniform_guess():
    """Upstream G17: it has no initialisation of its own and starts at 8.93 instead of ln 6400 = 8.76."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(**PUBLISHED["MiniMind2-Small"]))
    ids = torch.randint(0, 6400, (2, 257))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(6400)) < 0.1


def test_initial_weights():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(dim=256, n_layers=8, use_moe=True))
    block = model.model.layers[3]
    assert model.lm_head.weight.std().item() == pytest.approx(0.3 / math.sqrt(256), rel=0.02)
    for weight in (block.self_attn.q_proj.weight, block.mlp.shared_experts.up_proj.weight, block.mlp.experts.gate_proj):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    for weight in (
        block.self_attn.o_proj.weight,
        block.mlp.shared_experts.down_proj.weight,
        block.mlp.experts.down_proj,
    ):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.02)
    assert torch.equal(model.model.norm.weight, torch.ones(256))


# --- Parity -------------------------------------------------------------------------------------------------------


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


# --- Invariances: causality, padding, cache -----------------------------------------------------------------------


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_future_and_right_padding_change_nothing(use_moe):
    model, ids = make_model(use_moe=use_moe), make_ids()
    changed = ids.clone()
    changed[:, 9:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :9], model(changed).logits[:, :9], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(ids).logits[:, 9:], model(changed).logits[:, 9:])


def cached_logits(model, ids, chunks, cache, attention_mask=None):
    parts, start = [], 0
    for chunk in chunks:
        part_mask = None if attention_mask is None else attention_mask[:, : start + chunk]
        output = model(ids[:, start : start + chunk], attention_mask=part_mask, past_key_values=cache, use_cache=True)
        parts.append(output.logits)
        start += chunk
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("chunks", [[17], [1] * 17, [6, 1, 7, 3], [8, 8, 1]])
@pytest.mark.parametrize(
    "make_cache", [lambda config: KVCache(config, 3, 20), lambda config: DynamicCache(config=config)]
)
def test_cached_and_chunked_prefill_equal_the_plain_forward(chunks, make_cache, use_moe):
    """Upstream G1: several new tokens on top of a cache saw a mask aligned top-left."""
    model, ids = make_model(use_moe=use_moe), make_ids()
    with torch.no_grad():
        logits = cached_logits(model, ids, chunks, make_cache(model.config))
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("chunks", [None, [17], [6, 1, 7, 3]])
def test_left_padded_rows_equal_single_rows(chunks, use_moe):
    """Upstream G2: the attention mask was swallowed, so tokens attended to padding."""
    model, ids = make_model(use_moe=use_moe), make_ids()
    padding = [0, 4, 11]
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    with torch.no_grad():
        if chunks is None:
            batch = model(ids, attention_mask=mask).logits
        else:
            batch = cached_logits(model, ids, chunks, KVCache(model.config, 3, 17), mask)
        assert batch.isfinite().all()  # also where there is only padding to look at
        for row, n in enumerate(padding):
            torch.testing.assert_close(batch[row, n:], model(ids[row : row + 1, n:]).logits[0], atol=1e-4, rtol=1e-4)


def test_cache_crop_reset_and_capacity():
    model, ids = make_model(), make_ids(B=1)
    cache = KVCache(model.config, 1, capacity=12)
    with torch.no_grad():
        first = model(ids[:, :10], past_key_values=cache).logits
        cache.crop(-4)
        assert cache.get_seq_length() == 6
        torch.testing.assert_close(model(ids[:, 6:10], past_key_values=cache).logits, first[:, 6:])
        cache.crop(3)
        assert cache.get_seq_length() == 3
        cache.reset()
        torch.testing.assert_close(model(ids[:, :10], past_key_values=cache).logits, first)
        with pytest.raises(ValueError, match="13 tokens.*capacity of 12"):
            model(ids[:, :3], past_key_values=cache)


def test_mask_of_the_wrong_length_is_refused():
    model, ids = make_model(), make_ids()
    with pytest.raises(ValueError, match="covers 5 tokens, but the cache holds 0 and 17 are new"):
        model(ids, attention_mask=torch.ones(3, 5))


# --- The output head ----------------------------------------------------------------------------------------------


def test_supervised_positions_and_logits_to_keep():
    model, ids = make_model(), make_ids()
    full = model(ids).logits
    positions = torch.tensor([2, 20, 50, 17])
    torch.testing.assert_close(model(ids, supervised=positions).logits, full.flatten(0, 1)[positions])
    assert model(ids, supervised=positions[:0]).logits.shape == (0, 97)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    with pytest.raises(ValueError, match="not both"):
        model(ids, labels=ids, supervised=positions)


def test_labels_give_the_mean_cross_entropy_of_the_next_token():
    model, ids = make_model(), make_ids()
    labels = ids.clone()
    labels[:, :6] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_outputs_do_not_share_state():
    """Upstream G6: one output object was reused, so the second call changed the first result."""
    model = make_model()
    first = model(make_ids(seed=1))
    kept = first.logits.clone()
    second = model(make_ids(seed=2))
    assert first is not second
    assert torch.equal(first.logits, kept)
    assert first.aux_loss.tolist() == [0, 0, 0]


def test_hidden_states_and_tuple_output():
    model, ids = make_model(), make_ids()
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[1], output.logits)
    assert torch.equal(model.base_model(ids).last_hidden_state, output.hidden_states[-1])


# --- Training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_moe", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_moe):
    def gradients(model):
        model.train()
        output = model(make_ids())
        (output.logits.square().mean() + output.aux_loss.sum()).backward()
        return [parameter.grad for parameter in model.parameters()]

    plain, checkpointed = make_model(use_moe=use_moe), make_model(use_moe=use_moe)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_only_while_training():
    model, ids = make_model(dropout=0.3), make_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("use_moe", [False, True])
def test_bfloat16_autocast_stays_close(use_moe):
    torch.manual_seed(0)
    model, ids = MiniMindForCausalLM(LMConfig(**TINY, use_moe=use_moe)), make_ids()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), model(ids).logits, atol=0.02, rtol=0)
    (output.logits.float().square().mean() + output.aux_loss.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- Hugging Face's tools -----------------------------------------------------------------------------------------


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
