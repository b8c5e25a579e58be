"""Training steps of the mixture of experts: one grouped product, a loop over experts with masks, and a dense model.

    python -m benchmarks.moe_step                                # 512 wide, 8 layers, 1 shared + 4 routed, top 2
    python -m benchmarks.moe_step --dim 640 --batch_size 32 --seq_len 512 --rounds 7 --compile

    grouped     model/moe.py
    mask loop   the same experts as separate modules; a boolean mask picks each one's tokens, as MiniMind does in
                training (on a GPU the host waits, once per expert and layer, to learn how many there are)
    dense       as many parameters per token: its feed-forward is as wide as the shared and the chosen experts together

Every arm takes whole optimizer steps, as training/loop.py makes them, on the same random tokens, in turn. On a CPU
MiniMind computes in float32, so `mask loop float32` is what its users run there.
Prints tokens per second, the median of the rounds and their range, and the ratios, round by round.
"""

import argparse

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.rounds import Step, add_timing_flags, print_rates, time_rounds
from common.device import DTYPES, choose_device
from common.memory import keep_fewer_kernels, keep_freed_memory
from model.LMConfig import LMConfig
from model.model import FeedForward, MiniMindForCausalLM
from model.moe import MoEFeedForward
from training.loop import add_gradients
from training.losses import next_token_loss
from training.optim import make_optimizer
from training.processes import Run
from training.stats import StepStats
from training.updater import Updater


class MaskLoop(MoEFeedForward):
    """The textbook way: one expert after the other, each on the tokens that a boolean mask picks."""

    def __init__(self, config: LMConfig):
        super().__init__(config, FeedForward(config))
        self.experts = nn.ModuleList([FeedForward(config) for _ in range(config.n_routed_experts)])

    def copy_from(self, grouped: MoEFeedForward) -> None:
        """Take the weights of ``grouped``, so that both compute the same."""
        stacked = grouped.experts.state_dict()
        for i, expert in enumerate(self.experts):
            expert.load_state_dict({f"{name}.weight": weight[i] for name, weight in stacked.items()})
        self.gate.load_state_dict(grouped.gate.state_dict())
        self.shared_experts.load_state_dict(grouped.shared_experts.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As MoEFeedForward: x (B, T, D) -> y (B, T, D) and the router's logits (B, T, E)."""
        router_logits = self.gate(x)
        weights, chosen = router_logits.flatten(0, 1).softmax(-1).topk(self.top_k, dim=-1)  # (N, k)
        weights = weights / weights.sum(-1, keepdim=True)
        visits, chosen = x.flatten(0, 1).repeat_interleave(self.top_k, dim=0), chosen.flatten()
        y = torch.zeros_like(visits)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            y[mask] = expert(visits[mask]).to(y.dtype)
        y = (y.unflatten(0, (-1, self.top_k)) * weights[..., None]).sum(1).view_as(x)
        return y + self.shared_experts(x), router_logits


def make_models(config: LMConfig) -> dict[str, MiniMindForCausalLM]:
    """The three arms' models; the first two have the same weights."""
    torch.manual_seed(0)
    grouped, looped = MiniMindForCausalLM(config), MiniMindForCausalLM(config)
    looped.load_state_dict(grouped.state_dict())
    for layer in looped.model.layers:
        mask_loop = MaskLoop(config)
        mask_loop.copy_from(layer.mlp)
        layer.mlp = mask_loop
    active = (config.num_experts_per_tok + 1) * config.intermediate_size
    sizes = {"dim": config.dim, "n_layers": config.n_layers, "vocab_size": config.vocab_size}
    return {"grouped": grouped, "mask loop": looped, "dense": MiniMindForCausalLM(LMConfig(**sizes, hidden_dim=active))}


def make_step(run: Run, model: MiniMindForCausalLM, batch: dict[str, Tensor], use_compile: bool) -> Step:
    """One optimizer step; returns the tokens it trained on."""
    tokens = batch["input_ids"].numel()
    optimizer = make_optimizer(model.to(run.device), 1e-4, weight_decay=0.1)
    updater = Updater(run, model, optimizer, use_compile=use_compile, scale=1 / tokens)
    stats = StepStats(run)

    def step() -> int:
        stats.begin()
        add_gradients(run, updater, next_token_loss, [batch], stats)
        updater.step(stats, lr=1e-4)
        return tokens

    return step


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="width of the model")
    parser.add_argument("--n_layers", type=int, default=8, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=16, help="rows")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a row")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="to measure")
    add_timing_flags(parser, rounds=5, steps=1)
    args = parser.parse_args(argv)

    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as in a run, and for all arms
        keep_fewer_kernels()
    shape, positions = (args.batch_size, args.seq_len), args.batch_size * args.seq_len
    tokens = torch.randint(16, 6400, (2, *shape), generator=torch.Generator().manual_seed(0))
    lengths, places = torch.full((args.batch_size,), args.seq_len), torch.arange(positions)
    batch = {"input_ids": tokens[0], "lengths": lengths, "positions": places, "targets": tokens[1].flatten()}
    print(describe_machine(device))
    print(f"dim {args.dim}, {args.n_layers} layers, {args.batch_size} x {args.seq_len} tokens\n")
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, use_moe=True, aux_loss_alpha=0.01)
    arms = {
        f"{name} {dtype}": make_step(Run(device, DTYPES[dtype]), model, batch, args.compile)
        for dtype in args.dtypes
        for name, model in make_models(config).items()
    }
    rounds = time_rounds(arms, args.rounds, args.steps, device)
    for dtype in args.dtypes:
        same = [{arm: rate for arm, rate in rates.items() if arm.endswith(dtype)} for rates in rounds]
        print_rates(same, "tokens", baseline=f"mask loop {dtype}")
        print_rates(same, "tokens", baseline=f"dense {dtype}")
    if len(args.dtypes) > 1:
        print_rates(rounds, "tokens", baseline=f"mask loop {args.dtypes[0]}")


if __name__ == "__main__":
    main()
