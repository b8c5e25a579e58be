"""A model of 10^4 parameters, requests of all kinds for it, and the plainest ways to answer them."""

import random

import torch

from inference.batch import Batch
from inference.requests import Request
from inference.sampling import SamplingParams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.model_lora import adaptable_weights

V, EOS = 6400, 2
LONG = SamplingParams(100, temperature=0)


def make_model(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 160, "hidden_dim": 32}
    model = MiniMindForCausalLM(LMConfig(**{**sizes, **fields})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # sharper than a fresh model: near-ties would make tokens depend on rounding
    return model


def make_adapter(model, seed: int):
    random_numbers = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in adaptable_weights(model).items():
        *experts, outputs, inputs = weight.shape
        for side, shape in (("A", (*experts, 2, inputs)), ("B", (*experts, outputs, 2))):
            adapter[f"{name}.lora.{side}.weight"] = torch.randn(shape, generator=random_numbers) * 0.3
    return adapter


def ragged_requests(count: int, seed: int = 0, **fields) -> list[Request]:
    """Prompts of 1 to 60 tokens, answers of 1 to 20, every way of sampling."""
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        params = rng.choice(
            [
                {"temperature": 0},
                {"temperature": 0, "repetition_penalty": 1.3},
                {"temperature": 1.0, "top_p": 0.9, "seed": i},
                {"temperature": 0.8, "top_k": 7, "presence_penalty": 1.0, "top_p": 1.0, "seed": i},
                {"temperature": 1.2, "min_p": 0.05, "frequency_penalty": 0.5, "logit_bias": {7: 4.0}, "seed": i},
            ]
        )
        prompt = [1] + [rng.randrange(3, V) for _ in range(rng.randrange(60))]
        params = SamplingParams(max_new_tokens=rng.randrange(1, 21), **params)
        requests.append(Request(prompt, params, eos_token_ids=(EOS,), **fields))
    return requests


def run_batch(model, requests, max_rows: int = 8, joins: random.Random | None = None, **options):
    """All requests through one batch; `joins` lets them arrive at random moments."""
    batch, waiting, running = Batch(model, max_rows, **options), list(requests), {}
    while waiting or batch.running:
        while waiting and len(batch.running) < max_rows and (joins is None or joins.random() < 0.5):
            request = waiting.pop(0)
            running[id(request)] = batch.add(request)
        batch.step()
    results = [running[id(request)] for request in requests]
    for result in results:
        if result.error is not None:
            raise result.error
    return results


def alone(model, request, **options):
    return run_batch(model, [request], max_rows=1, **options)[0]
