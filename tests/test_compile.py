"""torch.compile: one graph for all shapes of batches, one more for those of a single row, and the same numbers."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from toy import toy_model, toy_run, toy_sequences

from model.model_lora import LORA_TARGETS, apply_lora
from training.losses import next_token_loss

BATCHES = ([0, 1], [3, 4, 5], [7, 8, 9, 10], [11], [1, 2, 5, 6, 20], [0, 3, 4], [8])


def dense():
    return toy_model()


def moe():
    return toy_model(use_moe=True)


def with_lora():
    model = toy_model()
    apply_lora(model, 4, None, 0.0, LORA_TARGETS, None)
    return model


def compiled(model, backend: str):
    """The model as `Run.compile` compiles it but for the backend, and a counter of the graphs. A break is an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    real = torch.compile
    with patch("torch.compile", lambda model, **options: real(model, backend=counter, fullgraph=True, **options)):
        return toy_run().compile(model, use_compile=True), counter


def loss_of(model, batch):
    with torch.autocast("cpu", torch.bfloat16):  # MoE compiles as a whole in this type only
        return next_token_loss(model, batch)[0]


@pytest.mark.parametrize("make", [dense, moe, with_lora])
def test_at_most_two_graphs_whatever_the_shapes(make):
    plain = make().train()
    model, counter = compiled(plain, "eager")
    for i, ids in enumerate([*BATCHES, *BATCHES[2:4]]):
        batch = toy_sequences().collate(np.array(ids))
        if i >= len(BATCHES):  # a single supervised token, in many rows and in one
            batch |= {name: batch[name][:1] for name in ("positions", "targets")}
        assert torch.equal(loss_of(model, batch), loss_of(plain, batch)), ids
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("use_moe", [False, True])
def test_compiled_code_gives_the_same_losses_and_gradients(use_moe):
    plain = toy_model(n_layers=1, use_moe=use_moe).train()
    model, counter = compiled(plain, "inductor")
    losses, gradients = [], []
    for which in (plain, model):
        losses.append([loss_of(which, toy_sequences().collate(np.array(ids))) for ids in BATCHES[:3]])
        sum(losses[-1]).backward()
        gradients.append([p.grad for p in plain.parameters()])
        plain.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    for measured, expected in zip(*gradients, strict=True):
        assert (measured - expected).norm() < 0.02 * expected.norm()
    assert counter.frame_count == 1
