"""Tokens per second of generation, against `transformers.generate` on the same weights in `LlamaForCausalLM`.

    python -m benchmarks.decode_speed                       # the 26M model, one prompt, this machine's default threads
    python -m benchmarks.decode_speed --batch 32 --device cuda --dtype bfloat16
    python -m benchmarks.decode_speed --batch 32 --ragged   # prompts and answers of different lengths

With `--ragged`, lengths are a quarter to the whole of what the flags say, and transformers, which has no such batches
in `generate`, answers one after the other.

The arms run in turn, several rounds; medians of wall-clock and of CPU time per token. On a machine that is busy with
other things the second is the one to compare. Weights are random, and no answer ends early.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe_machine
from common.device import DTYPES
from inference.batch import Batch
from inference.generation import generate
from inference.requests import Request
from inference.sampling import SamplingParams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM

NO_EOS = -1


def as_llama(model: MiniMindForCausalLM) -> LlamaForCausalLM:
    """The same tensors in Hugging Face's own class."""
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    )
    llama.load_state_dict(model.state_dict())
    return llama.eval()


def make_models(args: argparse.Namespace) -> tuple[MiniMindForCausalLM, LlamaForCausalLM]:
    """Ours, and the same weights in transformers' class."""
    torch.manual_seed(0)
    ours = MiniMindForCausalLM(LMConfig(dim=args.dim, n_layers=args.n_layers)).eval()
    with torch.no_grad():
        ours.model.norm.weight.mul_(10)  # peaked like a trained model, which is what top-p meets in practice
    llama = as_llama(ours).to(args.device, DTYPES[args.dtype])
    return ours.to(args.device, DTYPES[args.dtype]), llama


def make_arms(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Name -> a function that generates `args.new_tokens` tokens for each of `args.batch` prompts."""
    ours, llama = make_models(args)
    batch = torch.randint(16, 6400, (args.batch, args.prompt_tokens))
    prompts, batch = batch.tolist(), batch.to(args.device)
    fixed = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "pad_token_id": 0}
    greedy = SamplingParams(args.new_tokens, temperature=0)
    sampled = SamplingParams(args.new_tokens, temperature=0.85, top_p=0.85, seed=0)
    how = {"do_sample": True, "temperature": 0.85, "top_p": 0.85, "top_k": 0}
    return {
        "greedy, ours": lambda: generate(ours, prompts, greedy, NO_EOS),
        "greedy, transformers": lambda: llama.generate(batch, do_sample=False, **fixed).tolist(),
        "top-p 0.85, ours": lambda: generate(ours, prompts, sampled, NO_EOS),
        "top-p 0.85, transformers": lambda: llama.generate(batch, **how, **fixed).tolist(),
    }


def make_ragged_arms(args: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], int]:
    """The same for prompts and answers of different lengths, and how many tokens each arm generates."""
    ours, llama = make_models(args)
    rng, requests = random.Random(0), []
    for _ in range(args.batch):
        prompt = [rng.randrange(16, 6400) for _ in range(rng.randint(args.prompt_tokens // 4 + 1, args.prompt_tokens))]
        new = rng.randint(args.new_tokens // 4 + 1, args.new_tokens)
        requests.append(Request(prompt, SamplingParams(new, temperature=0)))

    def run_ours() -> None:
        batch = Batch(ours, args.batch)
        for request in requests:
            batch.add(request)
        while batch.running:
            batch.step()

    def run_theirs() -> None:
        for request in requests:
            new, prompt = request.params.max_new_tokens, torch.tensor([request.prompt], device=args.device)
            llama.generate(prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)

    arms = {"greedy ragged, ours": run_ours, "one by one, transformers": run_theirs}
    return arms, sum(request.params.max_new_tokens for request in requests)


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="width of the model")
    parser.add_argument("--n_layers", type=int, default=8, help="number of blocks")
    parser.add_argument("--batch", type=int, default=1, help="prompts continued together")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each arm")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and arithmetic")
    parser.add_argument("--ragged", action="store_true", help="prompts and answers of different lengths")
    args = parser.parse_args()
    arms, tokens = make_ragged_arms(args) if args.ragged else (make_arms(args), args.batch * args.new_tokens)
    wall, cpu = {name: [] for name in arms}, {name: [] for name in arms}
    for name in list(arms) * (args.rounds + 1):  # the first round warms up
        started, cpu_started = time.perf_counter(), time.process_time()
        arms[name]()
        wall[name].append(time.perf_counter() - started)
        cpu[name].append(time.process_time() - cpu_started)
    print(f"{describe_machine(torch.device(args.device))}; {args.dtype}, batch {args.batch}")
    for name in arms:
        seconds = statistics.median(wall[name][1:])
        cpu_ms = statistics.median(cpu[name][1:]) / tokens * 1e3
        print(f"{name:26s}{tokens / seconds:9.1f} tokens/s   {cpu_ms:7.2f} CPU ms per token")


if __name__ == "__main__":
    main()
