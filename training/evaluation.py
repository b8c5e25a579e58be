"""Held-out loss, bits per byte and sample answers: is the model learning, on text it was never trained on?"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dataset.batching import at_least_longest, plan_batches
from inference.generation import generate
from inference.sampling import SamplingParams
from model.chat_format import ChatFormat

MAX_CHECKED = 32  # held-out questions answered in one batch at an evaluation


@dataclass
class Evaluation:
    """What a stage measures at its evaluations.

    heldout: units with ``lengths`` and ``collate``, none of them trained on; may be empty.
    questions: user messages to answer, or the beginnings of texts to continue when ``continue_text`` is set.
    checks: name -> property of an answer; the share of answers to held-out questions (at most 32) that have it is
        measured too. Needs conversations as ``heldout``.
    """

    heldout: object
    tokenizer: PreTrainedTokenizerBase
    questions: list[str] = field(default_factory=list)
    continue_text: bool = False
    max_new_tokens: int = 64
    checks: dict[str, Callable[[str], bool]] = field(default_factory=dict)

    @torch.no_grad()
    def measure(self, run, model: nn.Module, loss_fn, tokens_per_batch: int) -> dict[str, float]:
        """Means of loss and metrics over the held-out set, and bits per byte where the metrics include ``nll``.

        Bits per byte = (nats of all supervised tokens) / (ln 2 * their UTF-8 bytes). Unlike the loss per token it does
        not depend on the tokenizer. The end token costs nats and has no bytes.
        """
        if not len(self.heldout):
            return {}
        token_bytes = torch.from_numpy(ChatFormat(self.tokenizer).token_bytes())
        names, rows = [], []
        model.eval()
        budget = at_least_longest(tokens_per_batch, self.heldout.lengths)
        collate = run.pinned(self.heldout.collate)
        plan = plan_batches(self.heldout.lengths, budget, seed=0, epoch=0)
        for ids in plan[run.rank :: run.world_size]:  # this rank's share; it may be empty
            batch = collate(ids)
            byte_count = int(token_bytes[batch["targets"]].sum())
            with run.autocast():
                loss, weight, metrics = loss_fn(model, run.to_device(batch))
            values = {"loss": loss, "weight": weight, "bytes": byte_count, "targets": len(batch["targets"]), **metrics}
            names = list(values)
            rows.append(run.stack(values.values()))
        model.train()
        names = run.from_main(names)
        # float64: a float32 sum of thousands of micro-batches would lose the last digits of each.
        sums = torch.stack(rows).cpu().double().sum(0) if rows else torch.zeros(len(names), dtype=torch.float64)
        sums = run.sum_over_ranks(sums.to(run.device, torch.float32)).tolist()
        total = dict(zip(names, sums, strict=True))
        weight = max(total.pop("weight"), 1.0)
        byte_count = total.pop("bytes")
        targets = total.pop("targets")
        measured = {f"heldout_{name}": value / weight for name, value in total.items()}
        if "nll" in total and byte_count:
            measured["heldout_nll"] = total["nll"] / targets  # where tokens differ in weight, targets != weight
            measured["bits_per_byte"] = total["nll"] / (math.log(2) * byte_count)
        if self.checks and run.is_main:
            measured |= self.check_answers(model)
        return measured

    def check_answers(self, model: nn.Module) -> dict[str, float]:
        """Share of greedy answers to held-out questions that pass each of ``checks``."""
        units = self.heldout.take(np.arange(min(len(self.heldout), MAX_CHECKED)))
        last_spans = units.spans[units.first_spans + units.span_counts - 1, 0]
        prompts = [units.tokens[a:b].tolist() for a, b in zip(units.starts, last_spans, strict=True)]
        texts = self._answer(model, prompts)
        return {name: sum(map(check, texts)) / len(texts) for name, check in self.checks.items()}

    def answers(self, model: nn.Module) -> list[tuple[str, str]]:
        """Greedy answers to ``questions``: pairs (question, answer)."""
        if not self.questions:
            return []
        chat = ChatFormat(self.tokenizer)
        if self.continue_text:
            prompts = [ids[:-1] for ids in chat.encode_texts(self.questions)]  # without </s>
        else:
            prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in self.questions]
        return list(zip(self.questions, self._answer(model, prompts), strict=True))

    def _answer(self, model: nn.Module, prompts: list[list[int]]) -> list[str]:
        """The greedy continuation of each prompt, as text."""
        params = SamplingParams(temperature=0.0, max_new_tokens=self.max_new_tokens)
        model.eval()
        answers = generate(model, prompts, params, eos_token_id=self.tokenizer.eos_token_id)
        model.train()
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
