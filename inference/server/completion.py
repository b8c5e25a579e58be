"""The answers to one request as JSON, in one piece or in chunks; both are made of the same deltas."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from inference.engine import Delta
from inference.server.protocol import Sampling
from inference.server.run import Run
from inference.server.service import Service
from inference.server.stream import IDLE


class Choice(ABC):
    """One answer as it grows."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.n_tokens, self.n_reasoning = 0, 0

    def begin(self) -> list[dict]:
        """What a stream sends of this answer before there is any."""
        return []

    @abstractmethod
    def add(self, delta: Delta) -> list[dict]:
        """Take what is new; return it as choices of chunks, without their index."""

    @abstractmethod
    def body(self) -> dict:
        """The whole answer as a choice of a completion, without its index."""

    def count(self, delta: Delta, is_reasoning: bool = False) -> None:
        """Count tokens for `usage`. An end token that the model made counts, as elsewhere; its text is nothing."""
        is_end = delta.finish_reason == "stop" and not delta.token_ids
        count = 1 if is_end else len(delta.token_ids)
        self.n_tokens += count
        self.n_reasoning += count if is_reasoning else 0


class Completion:
    """The answers to one request.

    Args:
        choices: one for each answer of the run, in its order.
        n: answers to each prompt.
        name: "chat.completion" or "text_completion".
        prefix: of the id.
        record: the request's line in the log.
    """

    def __init__(
        self,
        service: Service,
        body: Sampling,
        run: Run,
        choices: Sequence[Choice],
        *,
        n: int,
        name: str,
        prefix: str,
        record: dict,
    ):
        self._run, self._choices, self._n, self._record = run, choices, n, record
        self._log_prompts = service.settings.log_prompts
        self._wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": service.fingerprint,
        }
        record.update(model=body.model, stream=bool(body.stream))

    async def whole(self) -> dict:
        """The completion, when it is finished."""
        async for item in self._run.deltas():
            if item is not None:
                index, delta = item
                self._choices[index].add(delta)
        choices = [{"index": index, **choice.body()} for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self._close()}

    async def chunks(self) -> AsyncIterator[dict | None]:
        """Chunks as they come; None after a while without one."""
        for index, choice in enumerate(self._choices):
            for part in choice.begin():
                yield self._chunk(index, part)
        async for item in self._run.deltas(idle=IDLE):
            if item is None:
                yield None
                continue
            index, delta = item
            for part in self._choices[index].add(delta):
                yield self._chunk(index, part)
        usage = self._close()
        if self._wants_usage:
            yield {**self._head, "choices": [], "usage": usage}

    def _chunk(self, index: int, part: dict) -> dict:
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._head, "choices": [{"index": index, **part}], **usage}

    def _close(self) -> dict:
        """Note the end in the log; returns `usage`, in which a prompt with several answers counts once."""
        firsts = self._run.answers[:: self._n]
        prompt = sum(answer.n_prompt for answer in firsts)
        cached = sum(answer.n_reused for answer in firsts)
        made = sum(choice.n_tokens for choice in self._choices)
        reasoning = sum(choice.n_reasoning for choice in self._choices)
        self._record.update(
            prompt_tokens=prompt,
            completion_tokens=made,
            finish_reasons=[choice.finish_reason for choice in self._choices],
            seconds_to_first_token=self._run.seconds_to_first,
        )
        if self._log_prompts:
            self._record["answers"] = [answer.text for answer in self._run.answers]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }
