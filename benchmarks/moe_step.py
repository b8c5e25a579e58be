"""Training steps of the mixture of experts: one grouped product, a loop over experts with masks, and a dense model.

    python -m benchmarks.moe_step                                # 512 wide, 8 layers, 1 shared + 4 routed, top 2
    python -m benchmarks.moe_step --dim 640 --batch_size 32 --seq_len 512 --rounds 7 --compile

    grouped     model/moe.py
    mask loop   the same weights; the tokens of each expert are picked with a boolean mask, as MiniMind does in training
                (on a GPU the host waits, once per expert and layer, to learn how many there are)
    dense       as many parameters per token: its feed-forward is as wide as the shared and the chosen experts together

Every arm takes whole optimizer steps, as training/loop.py makes them, on the same random tokens, in turn.
Prints tokens per second, the median of the rounds and their range, and their ratio to `grouped`, round by round.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.rounds import Step, add_timing_flags, print_rates, time_rounds
from model.LMConfig import LMConfig
from model.model import FeedForward, MiniMindForCausalLM
from model.moe import MoEFeedForward
from training.loop import add_gradients
from training.losses import next_token_loss
from training.optim import Updater
from training.runtime import TORCH_DTYPES, Run, choose_device


class MaskLoop(MoEFeedForward):
    """The textbook way: one expert after the other, each on the tokens that a boolean mask picks."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As MoEFeedForward: x (B, T, D) -> y (B, T, D) and the router's logits (B, T, E)."""
        router_logits = self.gate(x)
        weights, chosen = router_logits.flatten(0, 1).softmax(-1).topk(self.top_k, dim=-1)  # (N, k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        visits, expert = x.flatten(0, 1).repeat_interleave(self.top_k, dim=0), chosen.flatten()
        y = torch.zeros_like(visits)
        for i in range(router_logits.shape[-1]):
            mask = expert == i
            gate, up, down = (w[i] for w in (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj))
            mine = visits[mask]
            y[mask] = F.linear(F.silu(F.linear(mine, gate)) * F.linear(mine, up), down).to(y.dtype)
        y = (y.unflatten(0, (-1, self.top_k)) * weights[..., None].to(y.dtype)).sum(1).view_as(x)
        return (y if self.shared_experts is None else y + self.shared_experts(x)), router_logits


def make_models(config: LMConfig) -> dict[str, MiniMindForCausalLM]:
    """The three arms' models; the first two have the same weights."""
    torch.manual_seed(0)
    grouped, looped = MiniMindForCausalLM(config), MiniMindForCausalLM(config)
    for layer in looped.model.layers:
        layer.mlp = MaskLoop(config, FeedForward(config) if config.n_shared_experts else None)
    looped.load_state_dict(grouped.state_dict())
    active = (config.num_experts_per_tok + bool(config.n_shared_experts)) * config.intermediate_size
    sizes = {"dim": config.dim, "n_layers": config.n_layers, "vocab_size": config.vocab_size}
    return {"grouped": grouped, "mask loop": looped, "dense": MiniMindForCausalLM(LMConfig(**sizes, hidden_dim=active))}


def make_step(run: Run, model: MiniMindForCausalLM, batch: dict[str, Tensor], use_compile: bool) -> Step:
    """One optimizer step; returns the tokens it trained on."""
    flags = argparse.Namespace(learning_rate=1e-4, weight_decay=0.1, grad_clip=1.0, use_compile=use_compile)
    updater, tokens = Updater(run, flags, model.to(run.device)), batch["input_ids"].numel()

    def step() -> int:
        _, sums = add_gradients(run, updater, next_token_loss, iter([batch]), scale=1 / tokens)
        updater.step(sums, 1 / tokens, flags.learning_rate)
        return tokens

    return step


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="width of the model")
    parser.add_argument("--n_layers", type=int, default=8, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=4, help="rows")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a row")
    parser.add_argument("--dtypes", nargs="+", choices=TORCH_DTYPES, default=["float32", "bfloat16"], help="to measure")
    add_timing_flags(parser, rounds=5, steps=1)
    args = parser.parse_args(argv)

    device = choose_device(args.device)
    shape, positions = (args.batch_size, args.seq_len), args.batch_size * args.seq_len
    tokens = torch.randint(16, 6400, (2, *shape), generator=torch.Generator().manual_seed(0))
    lengths, places = torch.full((args.batch_size,), args.seq_len), torch.arange(positions)
    batch = {"input_ids": tokens[0], "lengths": lengths, "positions": places, "targets": tokens[1].flatten()}
    print(describe_machine(device))
    print(f"dim {args.dim}, {args.n_layers} layers, {args.batch_size} x {args.seq_len} tokens\n")
    for dtype in args.dtypes:
        run = Run(device, TORCH_DTYPES[dtype])
        models = make_models(LMConfig(dim=args.dim, n_layers=args.n_layers, use_moe=True, aux_loss_alpha=0.01))
        arms = {name: make_step(run, model, batch, args.compile) for name, model in models.items()}
        print(dtype)
        print_rates(time_rounds(arms, args.rounds, args.steps, device), "tokens", baseline="grouped")


if __name__ == "__main__":
    main()
