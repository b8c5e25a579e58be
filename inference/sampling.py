"""From logits to the next token: penalties, bias, temperature, top-k, top-p, min-p, greedy.

Pure functions on `logits` (B, V) and settings (B, 1): every row may have settings of its own, all rows are treated at
once, and nothing here makes the host wait for an accelerator: no `.item()`, no Python loop over rows or tokens. The
order is that of Hugging Face's `generate`: penalties, bias, temperature, top-k, top-p, min-p.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURES = (1e-4, 100)  # the least and the largest that logits may be divided by; 0 is greedy
PENALTIES = (0.01, 100)  # of repetition
OFFSETS = (-2, 2)  # of presence and frequency, OpenAI's limits
BIASES = (-100, 100)  # of logit_bias, OpenAI's limits


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and how many.

    Attributes:
        max_new_tokens: the most *new* tokens; the prompt does not count (upstream G3).
        temperature: logits are divided by it; 0 means greedy decoding.
        top_p: nucleus mass in (0, 1]; 1 keeps everything.
        top_k: the number of candidates kept; 0 keeps everything.
        repetition_penalty: >= 1 makes tokens of the prompt and the answer less likely to come again; 1 is off.
        seed: of the random numbers; the tokens then depend on nothing else, such as who shares the batch. None draws
            a fresh one.
        min_p: tokens less likely than `min_p` times the likeliest are out; 0 keeps everything.
        presence_penalty: subtracted from the logits of tokens that the answer holds; the prompt does not count.
        frequency_penalty: the same, times how often the answer holds them.
        logit_bias: token id -> number added to its logit.

    Raises:
        ValueError: all impossible values at once, each with its limit.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

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
            (0 <= self.min_p <= 1, f"min_p is {self.min_p}: it must be between 0 (off) and 1"),
        ]
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            valid = OFFSETS[0] <= value <= OFFSETS[1]
            rules.append((valid, f"{name} is {value}: use {OFFSETS[0]} to {OFFSETS[1]} (0 is off)"))
        for token, bias in self.logit_bias.items():
            valid = token >= 0 and BIASES[0] <= bias <= BIASES[1]
            rules.append((valid, f"logit_bias of token {token} is {bias}: use {BIASES[0]} to {BIASES[1]}"))
        problems = [message for valid, message in rules if not valid]
        if problems:
            raise ValueError("; ".join(problems))


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the tokens of `seen` (B, V) less likely: positive logits are divided, negative ones multiplied.

    CTRL (Keskar et al. 2019, arXiv:1909.05858, section 4.1) divides only; that *raises* the probability of a token
    whose logit is negative (upstream G4), so here as everywhere today the sign decides. `penalty` is (B, 1).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_presence(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Subtract `presence` once and `frequency` as often as a token was made: OpenAI's definition.

    `counts` (B, V) says how often; the penalties are (B, 1).
    """
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits: Tensor, k: Tensor, largest: int) -> Tensor:
    """All but the k largest logits of a row become -inf (Fan et al. 2018, arXiv:1805.04833); ties at the edge stay.

    `k` is (B, 1), 0 keeps a whole row; `largest` is the largest of them: the host must know how far to sort.
    """
    best = logits.topk(min(largest, logits.shape[-1]), dim=-1).values  # largest first
    kth = best.gather(1, (k - 1).clamp(0, best.shape[1] - 1))
    return logits.masked_fill((logits < kth) & (k > 0), -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the nucleus: the smallest set of likeliest tokens whose probability reaches p (B, 1), always at least one.

    Holtzman et al. 2020, arXiv:1904.09751, equation 2. A token goes when the likelier ones reach p without it: of
    0.5 0.25 0.15 0.1 and p = 0.6 the first two stay, for before the third there are 0.75 already.
    """
    probs = logits.softmax(dim=-1)
    candidates = V = logits.shape[-1]
    if logits.device.type == "cpu":
        # Tokens below (1-p)/V hold less than 1-p together, so the nucleus needs none of them, and sorting a few hundred
        # is ten times faster than 6,400. On an accelerator sorting is cheap, and counting would make the host wait.
        needed = (probs >= (1 - p) / V) & (p < 1)
        candidates = max(1, int(needed.sum(dim=-1).max()))
    top, order = probs.topk(candidates, dim=-1)  # largest first, and the tokens that they belong to
    before = top.cumsum(dim=-1) - top  # 0 0.5 0.75 0.9 in the example
    outside = before >= p
    outside[:, 0] = False  # rounding must not empty the row
    # Back from the order of probability to the order of the vocabulary; what was no candidate is outside, too.
    removed = torch.ones_like(logits, dtype=torch.bool).scatter(1, order, outside)
    return logits.masked_fill(removed & (p < 1), -torch.inf)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Tokens less likely than `min_p` (B, 1) times the likeliest become -inf (Nguyen et al. 2024, arXiv:2407.01082).

    p_i < m max p is l_i < max l + log m: the softmax's sum cancels.
    """
    return logits.masked_fill(logits < logits.max(dim=-1, keepdim=True).values + min_p.log(), -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row from softmax(logits): (B, V) and random numbers in [0, 1), (B, 1) -> (B,) int64.

    The inverse of the cumulative distribution at a uniform number: one random number a row, and unlike
    `torch.multinomial` no check for which the host must wait. Probabilities 0.2 0.5 0.3 add up to 0.2 0.7 1.0, and
    0.65 falls to the second token: it is the first whose sum is above.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # `right=True` steps over tokens of probability 0; the factor keeps rounding from stepping over the last one.
    below_total = cumulative[:, -1:] * (1 - 1e-6)
    return torch.searchsorted(cumulative, uniform * below_total, right=True).squeeze(1)


class RowSampler:
    """How each row of a batch is sampled: settings (rows, 1), histories (rows, V), random numbers (rows, N).

    The random numbers of an answer are drawn when it begins, from a generator of its own: the i-th token is decided by
    the i-th number, whoever else is in the batch, and on every device.
    """

    SETTINGS = {
        **{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    }  # each with the value that switches it off

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str):
        self.params = [SamplingParams(temperature=0)] * rows
        self.tables = {name: torch.full((rows, 1), off, device=device) for name, off in self.SETTINGS.items()}
        self.tables["bias"] = torch.zeros(rows, vocab_size, device=device)
        self.tables["in_prompt"] = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self.tables["counts"] = torch.zeros(rows, vocab_size, device=device)  # of the tokens of the answer
        self.tables["made"] = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # tokens made so far
        self.uniform = torch.zeros(rows, 64, device=device)  # wider when an answer needs more

    def begin(self, row: int, params: SamplingParams, prompt: list[int], most: int) -> None:
        """An answer of at most `most` tokens begins in a row."""
        self.params[row] = params
        for name in self.SETTINGS:
            self.tables[name][row] = getattr(params, name)
        for name in ("bias", "counts", "made"):
            self.tables[name][row] = 0
        in_prompt = torch.zeros(self.tables["in_prompt"].shape[1], dtype=torch.bool)
        in_prompt[prompt] = True
        self.tables["in_prompt"][row] = in_prompt
        for token, bias in params.logit_bias.items():
            self.tables["bias"][row, token] = bias
        if params.temperature > 0:
            generator = torch.Generator()
            seed = generator.seed() if params.seed is None else params.seed
            if most > self.uniform.shape[1]:
                self.uniform = F.pad(self.uniform, (0, most - self.uniform.shape[1]))
            self.uniform[row, :most] = torch.rand(most, generator=generator.manual_seed(seed))

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        self.params[a], self.params[b] = self.params[b], self.params[a]
        for table in (*self.tables.values(), self.uniform):
            table[[a, b]] = table[[b, a]]

    def sample(self, logits: Tensor, rows: Sequence[int], index: slice | Tensor) -> Tensor:
        """The next token of some rows: logits (B, V) of any floating type -> (B,) int64; in float32.

        Args:
            rows: their numbers; `index`: the same for the tables, a slice or (B,) indices on the device.
        """
        params = [self.params[row] for row in rows]
        table = {name: held[index] for name, held in self.tables.items()}
        logits = logits.float()
        if any(p.repetition_penalty != 1 for p in params):
            seen = table["in_prompt"] | (table["counts"] > 0)
            logits = penalize_repetition(logits, seen, table["repetition_penalty"])
        if any(p.presence_penalty or p.frequency_penalty for p in params):
            presence, frequency = table["presence_penalty"], table["frequency_penalty"]
            logits = penalize_presence(logits, table["counts"], presence, frequency)
        if any(p.logit_bias for p in params):
            logits = logits + table["bias"]
        tokens = logits.argmax(dim=-1)
        if any(p.temperature > 0 for p in params):
            is_greedy = table["temperature"] == 0
            logits = logits / table["temperature"].masked_fill(is_greedy, 1)
            if largest := max(p.top_k for p in params):
                logits = keep_top_k(logits, table["top_k"], largest)
            if any(p.top_p < 1 for p in params):
                logits = keep_top_p(logits, table["top_p"])
            if any(p.min_p > 0 for p in params):
                logits = keep_min_p(logits, table["min_p"])
            uniform = self.uniform[index].gather(1, table["made"])
            tokens = torch.where(is_greedy.squeeze(1), tokens, draw(logits, uniform))
        self.tables["made"][index] += 1
        if any(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty for p in params):
            one = torch.ones(len(tokens), 1, device=tokens.device)
            self.tables["counts"][index] = table["counts"].scatter_add(1, tokens[:, None], one)
        return tokens
