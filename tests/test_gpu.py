"""With a CUDA device: the same numbers as on the CPU, and a host that never waits inside a step or a decoded token."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from on_device import STAGES, collate, make_stage, make_step, make_updater
from toy import toy_model

from inference.batch import Batch
from inference.requests import Request
from inference.sampling import SamplingParams
from training.processes import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def gpu_run(dtype=torch.bfloat16) -> Run:
    return Run(torch.device("cuda", 0), dtype)


def skip_without_grouped_product() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("PyTorch has a grouped matrix product that does not wait on H100 and B200 only")


@contextlib.contextmanager
def nobody_waits():
    """An error where PyTorch makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@MODELS
@pytest.mark.parametrize("use_compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_does_not_wait(stage, use_compile, use_moe):
    if use_moe:
        skip_without_grouped_product()
    if use_compile and stage not in ("next token", "lora"):
        pytest.skip("the same compiled forward pass as `next token`")
    torch._dynamo.reset()
    run = gpu_run()
    model, loss_fn = make_stage(stage, run, use_moe)
    updater = make_updater(run, model, use_compile)
    make_batch = run.pinned(collate)
    steps = [[make_batch(np.arange(i, i + 4)), make_batch(np.arange(i + 4, i + 10))] for i in range(3)]
    for batches in steps[:2]:  # libraries that start, code that is compiled
        make_step(run, updater, loss_fn, batches)
    with nobody_waits():
        read = make_step(run, updater, loss_fn, steps[2]).fetch()
    numbers = read()
    assert np.isfinite(list(numbers.values())).all() and numbers["grad_norm"] > 0 and numbers["skipped"] == 0


@MODELS
@pytest.mark.parametrize("stage", ["next token", "lora", "reasoning"])  # whose losses hold no tensors
def test_a_step_gives_the_numbers_of_the_cpu(stage, use_moe):
    cpu, gpu = Run(torch.device("cpu"), torch.float32), gpu_run(torch.float32)
    model, loss_fn = make_stage(stage, cpu, use_moe)
    results = []
    for run, replica in ((cpu, copy.deepcopy(model)), (gpu, model.to(gpu.device))):
        make_batch = run.pinned(collate)
        batches = [make_batch(np.arange(4)), make_batch(np.arange(4, 10))]
        results.append(make_step(run, make_updater(run, replica), loss_fn, batches).so_far())
    assert results[1] == pytest.approx(results[0], rel=1e-3, abs=1e-3)


@MODELS
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2, "seed": 1}]
)
def test_decoding_does_not_wait(params, use_moe):
    if use_moe:
        skip_without_grouped_product()
    with torch.device("cuda"):
        model = toy_model(use_moe=use_moe).bfloat16().eval()
    answers = []
    for waiting in (contextlib.nullcontext, nobody_waits):  # the first time libraries start
        batch = Batch(model, 2)
        for prompt in ([1, 2, 3], [4]):
            batch.add(Request(prompt, SamplingParams(**params)))
        batch.step()  # reads the prompts
        with waiting(), torch.inference_mode():
            tokens = [batch._next_tokens(model, [0, 1])[1] for _ in range(4)]
        answers.append(torch.stack(tokens).tolist())
    assert answers[0] == answers[1]
