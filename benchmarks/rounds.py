"""Timing several arms in turn (A B C A B C ...): a machine that gets slower meanwhile does so for all of them."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], int]  # makes one step and returns how many units (tokens, pairs) it worked through


def add_timing_flags(parser: argparse.ArgumentParser, rounds: int, steps: int) -> None:
    """The flags that every throughput benchmark has."""
    parser.add_argument("--rounds", type=int, default=rounds, help="counted rounds after one for warm-up")
    parser.add_argument("--steps", type=int, default=steps, help="steps of each arm in a round")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile our arms")


def time_rounds(arms: dict[str, Step], rounds: int, steps: int, device: torch.device) -> list[dict[str, float]]:
    """Units per second of every arm, one dict a round, printed as they come. The first round warms up, uncounted."""
    measured = []
    for count in range(rounds + 1):
        rates = {}
        for name, step in arms.items():
            synchronize(device)
            started = time.perf_counter()
            units = sum(step() for _ in range(steps))
            synchronize(device)
            rates[name] = units / (time.perf_counter() - started)
        if count:
            measured.append(rates)
            print("  ".join(f"{name}: {rate:.4g}" for name, rate in rates.items()), flush=True)
    return measured


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_rates(rounds: list[dict[str, float]], unit: str, baseline: str) -> None:
    """A Markdown table: median and range of each arm, and its ratio to ``baseline`` taken round by round."""
    print(f"\n| arm | {unit}/s, median (range) | ratio to {baseline}, median (range) |\n|---|---|---|")
    for name in rounds[0]:
        rates, ratios = [r[name] for r in rounds], [r[name] / r[baseline] for r in rounds]
        print(
            f"| {name} | {statistics.median(rates):.4g} ({min(rates):.4g}-{max(rates):.4g}) "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
