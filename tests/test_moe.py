"""Mixture of experts: equal to the naive loop and to a trusted model, balanced, and free of host syncs."""

import math

import pytest
import tiny_model
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model.LMConfig import PUBLISHED
from model.loading import count_parameters
from model.model import MiniMindForCausalLM
from model.moe import block_for, expert_share, group_visits, load_balance_loss, load_entropy

TINY = {**tiny_model.TINY, "use_moe": True}


def make_model(**changes) -> MiniMindForCausalLM:
    """A tiny model with large weights, so that its router has clear opinions."""
    return tiny_model.make_model(**{"use_moe": True, **changes})


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def naive_moe(moe, x):
    """One token at a time, one expert at a time."""
    rows = []
    for token in x.flatten(0, 1):
        scores = (moe.gate.weight @ token).softmax(0)
        best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: moe.top_k]
        total = sum(scores[e] for e in best) if moe.norm_topk_prob else 1.0
        experts = moe.experts
        y = sum(
            scores[e] / total * swiglu(token, experts.gate_proj[e], experts.up_proj[e], experts.down_proj[e])
            for e in best
        )
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            y = y + swiglu(token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"n_shared_experts": False},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 4},
        {"n_routed_experts": 7, "num_experts_per_tok": 3},
    ],
)
def test_equals_a_loop_over_tokens_with_its_gradients(changes):
    moe = make_model(**changes).model.layers[0].mlp
    x = torch.randn(2, 9, 32, requires_grad=True)
    direction = torch.randn(2, 9, 32)
    inputs = [x, *moe.parameters()]
    results = []
    for forward in (lambda: moe(x)[0], lambda: naive_moe(moe, x)):
        y = forward()
        results.append((y, *torch.autograd.grad((y * direction).sum(), inputs, allow_unused=True)))
    for ours, naive in zip(*results, strict=True):
        if ours is not None or naive is not None:  # one expert with weight 1: the router gets no gradient
            torch.testing.assert_close(ours, naive, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [1, 4, 64])
@given(data=st.data())
def test_each_experts_visits_lie_side_by_side_in_whole_blocks(block, data):
    n_experts = data.draw(st.integers(1, 6))
    tokens = data.draw(st.lists(st.permutations(range(n_experts)), min_size=1, max_size=40))
    chosen = torch.tensor(tokens)[:, : data.draw(st.integers(1, n_experts))]
    source, place, offsets = group_visits(chosen, n_experts, block)
    starts = [0, *offsets.tolist()[:-1]]
    assert offsets[-1] == len(source) and offsets.dtype == torch.int32
    assert all(start % block == 0 for start in starts) and len(source) % block == 0
    assert len(set(place.tolist())) == chosen.numel()
    for visit, row in enumerate(place.tolist()):
        expert = chosen.flatten()[visit]
        assert source[row] == visit // chosen.shape[1]
        assert starts[expert] <= row < offsets[expert]


def test_rows_that_fill_up_a_block_change_nothing(monkeypatch):
    def output_and_gradients(block):
        monkeypatch.setattr("model.moe.block_for", lambda x, n_visits: block)
        model = make_model()
        logits = model(make_ids()).logits
        logits.square().sum().backward()
        return [logits, *(parameter.grad for parameter in model.parameters())]

    for plain, padded in zip(output_and_gradients(1), output_and_gradients(8), strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-4)


def test_only_bfloat16_on_a_cpu_is_padded():
    assert block_for(torch.zeros(1, dtype=torch.bfloat16), n_visits=4096) == 64
    assert block_for(torch.zeros(1, dtype=torch.bfloat16), n_visits=2) == 1
    assert block_for(torch.zeros(1), n_visits=4096) == 1
    assert block_for(torch.zeros(1, dtype=torch.bfloat16, device="meta"), n_visits=4096) == 1


def test_training_and_inference_take_the_same_differentiable_path():
    """Upstream G15: evaluation mode ran another code path, under no_grad."""
    model, ids = make_model(), make_ids()
    gradients = []
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_equals_granite_moe_shared_with_the_same_tensors():
    model = make_model()
    config = model.config
    reference = GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.intermediate_size,
            shared_intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            num_local_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            attention_multiplier=config.head_dim**-0.5,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    state = {}
    for name, tensor in model.state_dict().items():
        state[
            name.replace("mlp.gate.", "block_sparse_moe.router.").replace("mlp.experts", "block_sparse_moe.experts")
        ] = tensor
    for layer in range(config.n_layers):
        experts, shared = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.shared_experts"
        gate, up = state.pop(f"{experts}.gate_proj"), state.pop(f"{experts}.up_proj")
        state[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        gate, up = state.pop(f"{shared}.gate_proj.weight"), state.pop(f"{shared}.up_proj.weight")
        state[f"model.layers.{layer}.shared_mlp.input_linear.weight"] = torch.cat([gate, up])
        state[f"model.layers.{layer}.shared_mlp.output_linear.weight"] = state.pop(f"{shared}.down_proj.weight")
    reference.load_state_dict(state, strict=True)
    with torch.no_grad():
        ours, theirs = model(make_ids()).logits, reference.eval()(make_ids()).logits
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_routing_of_minimind_3_equals_qwen3_moe():
    """The best expert only, weighted by 1, and no shared one: MiniMind's mixture of today is exported as Qwen3's."""
    routing = {name: value for name, value in PUBLISHED["minimind-3-moe"].items() if name not in TINY}
    model = make_model(**{**routing, "hidden_dim": 48, "max_seq_len": 64})
    config = model.config
    reference = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{name: getattr(config, name) for name in ("num_key_value_heads", "rms_norm_eps", "vocab_size")},
            **{"moe_intermediate_size": 48, "intermediate_size": 48, "head_dim": config.head_dim},
            **{"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True, "tie_word_embeddings": True},
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    tensors = dict(model.state_dict())
    for i in range(config.n_layers):
        experts = f"model.layers.{i}.mlp.experts."
        gate_and_up = tensors.pop(f"{experts}gate_proj"), tensors.pop(f"{experts}up_proj")
        tensors[f"{experts}gate_up_proj"] = torch.cat(gate_and_up, dim=1)
    reference.load_state_dict(tensors)
    ids = make_ids()
    with torch.no_grad():
        ours, theirs = model(ids).logits, reference(ids).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_no_shared_expert_when_switched_off():
    """Upstream G12: n_shared_experts=False still built one."""
    with_shared, without = make_model(), make_model(n_shared_experts=False)
    assert without.model.layers[0].mlp.shared_experts is None
    assert (
        count_parameters(with_shared) - count_parameters(without) == 2 * 3 * 32 * with_shared.config.intermediate_size
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    model, ids = make_model(), make_ids()
    expected = model(ids).logits
    output = model.to(dtype)(ids)
    assert output.logits.dtype == dtype
    assert output.aux_loss.dtype == torch.float32
    close = (output.logits.float() - expected).abs() < 0.15 * expected.std()
    assert close.float().mean() > 0.8  # a token at the border between two experts may change sides


def test_an_expert_without_tokens_is_no_problem():
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2:] = layer.mlp.gate.weight[:2] * 1e-3
            layer.mlp.gate.weight[:2] = 0
            layer.post_attention_layernorm.weight.zero_()  # all scores equal: the same experts take every token
    output = model(make_ids(), output_router_logits=True)
    assert (expert_share(output.router_logits[0], 2) == 0).sum() == 2
    output.logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class NoHostSync(TorchDispatchMode):
    """Fails on operations that make the host wait for the device: reading a number, or a size that depends on data."""

    forbidden = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "unique2",
        "_unique2",
        "bincount",
        "is_nonzero",
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, name
        if name in ("index", "index_put_", "index_put"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "indexing with a mask"
        return func(*args, **(kwargs or {}))


def test_no_host_syncs():
    model, ids = make_model().train(), make_ids()
    with NoHostSync():
        output = model(ids, lengths=torch.tensor([17, 3, 9]), output_router_logits=True)
        (output.logits.square().mean() + output.aux_loss.sum()).backward()
        load_entropy(expert_share(torch.stack(output.router_logits), 2))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSync():
        output.logits.sum().item()


# --- Load balance -------------------------------------------------------------------------------------------------


def naive_balance(logits, top_k):
    """E * sum_e (share of visits to e) * (mean probability of e), for logits (T, E), one token at a time."""
    T, E = logits.shape
    visits, probability = [0] * E, [0.0] * E
    for token in logits:
        scores = token.softmax(0)
        for e in sorted(range(E), key=lambda e: -scores[e].item())[:top_k]:
            visits[e] += 1 / (T * top_k)
        for e in range(E):
            probability[e] += scores[e].item() / T
    return E * sum(v * p for v, p in zip(visits, probability, strict=True))


def test_auxiliary_loss_equals_the_naive_count_and_ignores_padding():
    model, lengths = make_model(aux_loss_alpha=0.1), torch.tensor([17, 5, 11])
    output = model(make_ids(), lengths=lengths, output_router_logits=True)
    logits = torch.stack(output.router_logits).view(2, 3, 17, 4)
    expected = [0.1 * sum(naive_balance(layer[b, :n], 2) for layer in logits) for b, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(output.aux_loss, torch.tensor(expected))

    balance_of_batch = make_model(aux_loss_alpha=0.1, seq_aux=False)
    real = torch.arange(17) < lengths[:, None]
    expected = 0.1 * sum(naive_balance(layer[real], 2) for layer in logits)
    aux_loss = balance_of_batch(make_ids(), lengths=lengths).aux_loss
    torch.testing.assert_close(aux_loss, torch.full((3,), expected))


def test_auxiliary_loss_does_not_depend_on_the_rest_of_the_batch():
    model, ids = make_model(), make_ids()
    together = model(ids, lengths=torch.tensor([17, 5, 11])).aux_loss
    torch.testing.assert_close(together[1:2], model(ids[1:2, :5]).aux_loss)
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    left_padded = ids.clone()
    left_padded[1, 12:] = ids[1, :5]
    torch.testing.assert_close(model(left_padded, attention_mask=mask).aux_loss[1], together[1])


@pytest.mark.parametrize("per_sequence", [True, False])
def test_auxiliary_loss_at_balance_and_collapse(per_sequence):
    balanced = 1e-3 * torch.eye(4).repeat(2, 3, 5, 1)[:, :, :8]  # tokens prefer the experts in turn, 2 layers
    loss = load_balance_loss(balanced, 1, per_sequence=per_sequence)
    torch.testing.assert_close(loss, torch.full((3,), 2.0), atol=1e-3, rtol=0)
    collapsed = torch.tensor([50.0, 0, 0, 0]).expand(2, 3, 8, 4)
    torch.testing.assert_close(load_balance_loss(collapsed, 1, per_sequence=per_sequence), torch.full((3,), 8.0))


def test_auxiliary_loss_spreads_the_tokens():
    """Following its gradient alone must even out a lopsided router."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 64, 8)
    weight = torch.randn(8, 4, requires_grad=True)
    bias = torch.tensor([6.0, 4.0, 0, 0], requires_grad=True)
    before = load_entropy(expert_share((x @ weight + bias).flatten(1, 2), 2))
    for _ in range(200):
        loss = load_balance_loss(x @ weight + bias, 2).mean()
        for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            parameter.data -= gradient
    after = load_entropy(expert_share((x @ weight + bias).flatten(1, 2), 2))
    assert before < 0.9 < 0.98 < after


def test_balance_figures():
    logits = torch.tensor([[3.0, 2, 0, 0], [3, 0, 2, 0], [9, 9, 9, 9]])  # the third token does not count
    share = expert_share(logits, 2, torch.tensor([True, True, False]))
    torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.25, 0]))
    assert load_entropy(share).item() == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert load_entropy(torch.full((4,), 0.25)).item() == pytest.approx(1)
    assert load_entropy(torch.tensor([0, 1.0, 0, 0])).item() == 0


def test_loss_with_labels_adds_the_auxiliary_loss_while_training_only():
    model, ids = make_model(), make_ids()
    evaluated, trained = model(ids, labels=ids), model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, evaluated.loss + evaluated.aux_loss.mean())
    assert evaluated.router_logits is None
