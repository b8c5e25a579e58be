"""The network: sizes and initial weights, invariances, the output head, training."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_model import TINY, make_ids, make_model
from transformers import DynamicCache

from model.cache import KVCache
from model.LMConfig import PUBLISHED, LMConfig
from model.loading import count_parameters
from model.model import MiniMindForCausalLM

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
