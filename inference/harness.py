"""A model as lm-evaluation-harness (the package lm_eval) asks for it: log-likelihoods and text, computed here.

This module needs lm_eval, so it is imported inside of functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from inference.generation import generate
from inference.likelihood import Pair, score_continuations
from inference.sampling import SamplingParams

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel


class HarnessModel(LM):
    """A causal model and its tokenizer, as lm_eval asks for them.

    Args:
        model: in evaluation mode.
        batch_size: rows of one forward pass.
        report: called with (continuations scored, continuations in all) after each.

    `truncated` counts the requests that were longer than the model's context and lost their beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        report: Callable[[int, int], None] = lambda done, total: None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.report = model, tokenizer, batch_size, report
        self.context = model.config.max_position_embeddings
        self.truncated = 0

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer itself puts in front; a rendered chat has its own <s> already."""
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer.encode(text, add_special_tokens=not begins)

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Both are encoded together and then cut, so that ' A' after 'x' is the token it would be in a text.

        Spaces at the end of the context go to the continuation, as in lm_eval: a word's token begins with its space.
        """
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = [eos if bos is None else bos]
        start = self.encode(text) if text else first
        together = self.encode(text + continuation) if text else first + self._plain(continuation)
        if together[: len(start)] == start and len(together) > len(start):
            return start, together[len(start) :]
        return start, self._plain(continuation)  # a token reaches over the border, as with '：《'

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._score([self.encode_pair(*request.args[:2]) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        pairs, owners = [], []
        first = self.encode_pair("", "x")[0][0]
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(self._plain(request.args[0]), first, self.context, context_len=1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._score(pairs), strict=True):
            sums[owner] += log_likelihood
        return sums

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        self.truncated += sum(len(context) + len(continuation) - 1 > self.context for context, continuation in pairs)
        results = [(0.0, False)] * len(pairs)
        for done, (i, scored) in enumerate(score_continuations(self.model, pairs, self.batch_size), start=1):
            results[i] = (scored.log_likelihood, scored.is_greedy)
            self.report(done, len(pairs))
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts = []
        for done, request in enumerate(requests, start=1):
            texts.append(self._continue(*request.args[:2]))
            self.report(done, len(requests))
        return texts

    def _continue(self, context: str, settings: dict) -> str:
        """What the model writes after `context`, up to the first of the texts in `until`."""
        new = settings.get("max_gen_toks", settings.get("max_new_tokens", 256))
        prompt = self.encode(context)
        if len(prompt) + new > self.context:
            prompt = prompt[-max(1, self.context - new) :]
            self.truncated += 1
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        params = SamplingParams(new, temperature, settings.get("top_p", 1.0), settings.get("top_k", 0), seed=0)
        (tokens,) = generate(self.model, [prompt], params, self.tokenizer.eos_token_id)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        until = settings.get("until", [])
        for stop in [until] if isinstance(until, str) else until:
            text = text.partition(stop)[0] if stop else text
        return text
