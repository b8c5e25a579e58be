"""From logits to the next token: repetition penalty, temperature, top-k, top-p, greedy.

Pure functions on `logits` (B, V). All rows are treated at once, and nothing here makes the host wait for an
accelerator: no `.item()`, no Python loop over rows or tokens. The order is that of Hugging Face's `generate`: penalty,
temperature, top-k, top-p.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TEMPERATURES = (1e-4, 100)  # the least and the largest that logits may be divided by; 0 is greedy
PENALTIES = (0.01, 100)  # of repetition


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and how many.

    Attributes:
        max_new_tokens: the most *new* tokens; the prompt does not count (upstream G3).
        temperature: logits are divided by it; 0 means greedy decoding.
        top_p: nucleus mass in (0, 1]; 1 keeps everything.
        top_k: the number of candidates kept; 0 keeps everything.
        repetition_penalty: >= 1 makes tokens of the prompt and the answer less likely to come again; 1 is off.
        seed: of the random generator of one call; None draws a fresh one.

    Raises:
        ValueError: all impossible values at once, each with its limit.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        rules = [
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}: it must be at least 1"),
            (
                self.temperature == 0 or TEMPERATURES[0] <= self.temperature <= TEMPERATURES[1],
                f"temperature is {self.temperature}: use 0 (greedy), or {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}",
            ),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}: it must be above 0 and at most 1 (1 switches it off)"),
            (self.top_k >= 0, f"top_k is {self.top_k}: it must be 0 (off) or more"),
            (
                PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1],
                f"repetition_penalty is {self.repetition_penalty}: use {PENALTIES[0]:g} to {PENALTIES[1]:g} (1 is off)",
            ),
            (
                self.seed is None or 0 <= self.seed < 2**63,
                f"seed is {self.seed}: it must be between 0 and 2^63 - 1",
            ),
        ]
        problems = [message for valid, message in rules if not valid]
        if problems:
            raise ValueError("; ".join(problems))


def make_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """A random generator of one call's own: equal seeds give equal tokens, whoever else draws meanwhile."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def tokens_seen(input_ids: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """Which tokens occur in each row: (B, T) ids and (B, T) 0/1 mask of real tokens -> (B, V) bool."""
    counts = torch.zeros(len(input_ids), vocab_size, dtype=torch.int64, device=input_ids.device)
    return counts.scatter_add_(1, input_ids, mask.long()) > 0


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen` (B, V) less likely: positive logits are divided, negative ones multiplied.

    CTRL (Keskar et al. 2019, arXiv:1909.05858, section 4.1) divides only; that *raises* the probability of a token
    whose logit is negative (upstream G4), so here as everywhere today the sign decides.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of a row become -inf (Fan et al. 2018, arXiv:1805.04833); ties at the edge stay."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus: the smallest set of likeliest tokens whose probability reaches p, always at least one.

    Holtzman et al. 2020, arXiv:1904.09751, equation 2. A token goes when the likelier ones reach p without it: of
    0.5 0.25 0.15 0.1 and p = 0.6 the first two stay, for before the third there are 0.75 already.
    """
    probs = logits.softmax(dim=-1)
    candidates = V = logits.shape[-1]
    if logits.device.type == "cpu":
        # Tokens below (1-p)/V hold less than 1-p together, so the nucleus needs none of them, and sorting a few hundred
        # is ten times faster than 6,400. On an accelerator sorting is cheap, and counting would make the host wait.
        candidates = max(1, int((probs >= (1 - p) / V).sum(dim=-1).max()))
    top, order = probs.topk(candidates, dim=-1)  # largest first, and the tokens that they belong to
    before = top.cumsum(dim=-1) - top  # 0 0.5 0.75 0.9 in the example
    outside = before >= p
    outside[:, 0] = False  # rounding must not empty the row
    # Back from the order of probability to the order of the vocabulary; what was no candidate is outside, too.
    removed = torch.ones_like(logits, dtype=torch.bool).scatter(1, order, outside)
    return logits.masked_fill(removed, -torch.inf)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row from softmax(logits): (B, V) -> (B,) int64.

    The inverse of the cumulative distribution at a uniform number: one random number a row, and unlike
    `torch.multinomial` no check for which the host must wait. Probabilities 0.2 0.5 0.3 add up to 0.2 0.7 1.0, and
    0.65 falls to the second token: it is the first whose sum is above.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(logits), 1, device=logits.device, generator=generator)
    # `right=True` steps over tokens of probability 0; the factor keeps rounding from stepping over the last one.
    below_total = cumulative[:, -1:] * (1 - 1e-6)
    return torch.searchsorted(cumulative, uniform * below_total, right=True).squeeze(1)


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """The next token of each row.

    Args:
        logits: (B, V), any floating dtype; computed in float32.
        params: what to apply; temperature 0 is the argmax after the repetition penalty.
        generator: on the device of `logits` (`make_generator`).
        seen: (B, V) bool, tokens that occurred in the row; needed only for a repetition penalty other than 1.

    Returns:
        (B,) int64 token ids.
    """
    logits = logits.float()
    if params.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / params.temperature
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    return draw(logits, generator)
