"""The engine: one thread that answers the requests of many callers together, token by token.

    with Engine(model, tokenizer) as engine:
        answer = engine.submit(Request(prompt, SamplingParams(64)))
        for delta in answer:
            print(delta.text, end="")

`Batch` (batch.py) makes the tokens; here are the queue in front of it, text and stop strings, and what must be true of
a service: the queue is bounded, an answer can be cancelled, a fault of one request hurts no other, and nobody waits for
a thread that is dead. `docs/engine_en.md` explains it with a picture.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from inference.batch import PREFILL_CHUNK, Batch
from inference.requests import Continuation, Request
from inference.text import StopStrings, TextStream
from model.model_lora import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QueueFull(RuntimeError):
    """As many requests wait as may: try again later."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class EngineDead(RuntimeError):
    """The engine's thread ended with an error, which is the `__cause__`; nothing is answered any more."""


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer.

    Attributes:
        text: '' in the middle of a character, or of what may be a stop string.
        token_ids: without the end token. Those of a stop string are here, although its text is not.
        logprobs, top_logprobs: of these tokens; empty unless asked for.
        finish_reason: "stop", "length" or "cancelled" in the last delta, None in all others.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and totals since it began. `finished` counts by finish reason, and "error"."""

    running: int
    waiting: int
    max_rows: int
    max_queue: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    finished: dict[str, int]


class Answer:
    """The answer to a request: iterate over its deltas, in any one thread. The fields say what there is so far.

    Iterating blocks until the next token, ends after the delta with a finish reason, and raises what made it impossible
    to go on: the request's own fault, or EngineDead.
    """

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase, deliver: Callable | None):
        self.request = request
        self.text, self.finish_reason = "", None
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.prompt_logprobs: list[float | None] = []
        self.prompt_top_logprobs: list[dict[int, float] | None] = []
        self.n_prompt, self.n_reused = len(request.prompt), 0
        self._characters, self._stops = TextStream(tokenizer), StopStrings(request.stop)
        self._items: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        self._deliver = deliver or self._items.put
        self._cancelled = threading.Event()
        self._is_read = False

    def cancel(self) -> None:
        """End the answer, at most one token later; the last delta then says "cancelled". Does not wait for it."""
        self._cancelled.set()

    def __iter__(self) -> Iterator[Delta]:
        while not self._is_read:
            yield self._next(None)

    def result(self, timeout: float | None = None) -> Answer:
        """Read to the end, and return the answer itself.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._is_read:
            self._next(None if end is None else end - time.monotonic())
        return self

    def _next(self, timeout: float | None) -> Delta:
        try:
            item = self._items.get(timeout=None if timeout is None else max(0.0, timeout))
        except queue.Empty:
            raise TimeoutError(f"no end of the answer in time; {len(self.token_ids)} tokens so far") from None
        self._is_read = isinstance(item, Exception) or item.finish_reason is not None
        if isinstance(item, Exception):
            raise item
        return item

    # In the engine's thread

    def _advance(self, continuation: Continuation) -> None:
        """Deliver what is new in a continuation."""
        new = continuation.tokens[len(self.token_ids) :]
        text, reason = "", continuation.finish_reason
        for token in new:
            if not self._stops.found:
                text += self._stops.push(self._characters.push(token))
        if reason is not None and not self._stops.found:
            text += self._stops.push(self._characters.finish())
        if self._stops.found:
            reason = "stop"
        elif reason is not None:
            text += self._stops.finish()
        start = len(self.token_ids)
        logprobs, tops = continuation.logprobs[start:], continuation.top_logprobs[start:]
        self.n_reused = continuation.n_reused
        if continuation.request.prompt_logprobs:
            self.prompt_logprobs = continuation.prompt_logprobs
            self.prompt_top_logprobs = continuation.prompt_top_logprobs
        self.logprobs += logprobs
        self.top_logprobs += tops
        self._give(Delta(text, new, logprobs, tops, reason))

    def _end(self, reason: str) -> None:
        """Deliver the last delta of an answer that its request did not end."""
        self._give(Delta(self._stops.push(self._characters.finish()) + self._stops.finish(), finish_reason=reason))

    def _give(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.finish_reason = delta.finish_reason
        self._deliver(delta)

    def _fail(self, error: Exception) -> None:
        self._deliver(error)


class Engine:
    """Answers requests, many at once, in a thread of its own that starts with it.

    Args:
        model, max_rows, context, prefill_chunk, reuse_prefixes, exact: see `Batch`.
        tokenizer: turns tokens into text, and says which one ends an answer.
        max_queue: requests that may wait for a row; see `submit`.

    Use it in a `with` statement, or `close` it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 32,
        max_queue: int = 256,
        context: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = True,
        exact: bool = False,
    ):
        self.tokenizer, self.max_queue = tokenizer, max_queue
        self.batch = Batch(
            model,
            max_rows,
            context,
            eos_token_ids=(tokenizer.eos_token_id,),
            prefill_chunk=prefill_chunk,
            reuse_prefixes=reuse_prefixes,
            exact=exact,
        )
        self._waiting: deque[Answer] = deque()
        self._answers: dict[Continuation, Answer] = {}  # of the running ones
        self._changed = threading.Condition()  # guards `_waiting` and the two below; tells the thread of work
        self._is_closing, self._is_hurried = False, False
        self._failure: BaseException | None = None
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # For callers, in any thread

    def submit(self, request: Request, on_delta: Callable[[Delta | Exception], None] | None = None) -> Answer:
        """Ask for an answer; returns at once.

        Args:
            on_delta: called in the engine's thread with every delta, or with the exception that ended the answer; the
                answer is then not to be iterated over. It must not wait for anything. In a program of asyncio:
                `lambda item: loop.call_soon_threadsafe(queue.put_nowait, item)`.

        Raises:
            ValueError: the request is impossible; says everything that is wrong with it.
            QueueFull, EngineClosed, EngineDead: it may be possible, but not now, or not here.
        """
        self.batch.check(request)
        answer = Answer(request, self.tokenizer, on_delta)
        with self._changed:
            if self._failure is not None:
                raise EngineDead(f"the engine ended: {self._failure!r}") from self._failure
            if self._is_closing:
                raise EngineClosed("the engine takes no more requests")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already, the limit is {self.max_queue}")
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Know a LoRA adapter, for `Request.adapter`. Raises ValueError if it does not fit the model."""
        self.batch.add_adapter(name, adapter)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; answers that use it go on. Raises KeyError if there is none of this name."""
        del self.batch.adapted[name]

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return sorted(self.batch.adapted)

    @property
    def is_alive(self) -> bool:
        """Whether requests can be answered."""
        return self._failure is None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """What it does, and has done."""
        with self._changed:
            return EngineStats(
                running=len(self.batch.running),
                waiting=len(self._waiting),
                max_rows=self.batch.max_rows,
                max_queue=self.max_queue,
                finished=dict(self._finished),
                **{name: self._totals[name] for name in ("prompt_tokens", "reused_tokens", "generated_tokens")},
            )

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, answer those there are, and end the thread.

        After `timeout` seconds (None: whenever) the answers that still run or wait end as "cancelled".
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)
        self._is_hurried = True
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close(timeout=None if kind is None else 0)

    # The thread

    def _run(self) -> None:
        try:
            while self._has_work():
                self._step()
        except BaseException as error:  # a mistake in the engine itself: whoever waits must learn of it
            self._die(error)

    def _has_work(self) -> bool:
        """Wait until there is something to do; False when the engine is closed and everything is answered."""
        with self._changed:
            while not self._waiting and not self._answers and not self._is_closing:
                self._changed.wait()
            return bool(self._waiting or self._answers)

    def _step(self) -> None:
        """Let cancelled answers go, new ones join, and all running ones get a token."""
        for continuation, answer in list(self._answers.items()):
            if answer._cancelled.is_set() or self._is_hurried:
                self.batch.remove(continuation)
                self._finish(continuation, "cancelled")
                self._tell(answer, answer._end, "cancelled")
        self._let_join()
        for continuation in self.batch.step():
            self._report(continuation)

    def _let_join(self) -> None:
        """Give free rows to waiting requests, first come, first served."""
        while True:
            with self._changed:
                # Those that were cancelled while they waited need no row to be told.
                gone = [answer for answer in self._waiting if answer._cancelled.is_set() or self._is_hurried]
                for answer in gone:
                    self._waiting.remove(answer)
                has_room = len(self.batch.running) < self.batch.max_rows
                joining = self._waiting.popleft() if self._waiting and has_room else None
            for answer in gone:
                self._finished["cancelled"] += 1
                self._tell(answer, answer._end, "cancelled")
            if joining is None:
                return
            try:
                continuation = self.batch.add(joining.request)
            except Exception as error:  # e.g. its adapter was removed meanwhile
                self._finished["error"] += 1
                self._tell(joining, joining._fail, error)
                continue
            self._answers[continuation] = joining
            self._totals["prompt_tokens"] += joining.n_prompt
            self._totals["reused_tokens"] += continuation.n_reused

    def _report(self, continuation: Continuation) -> None:
        """Deliver what a step did for a continuation, and forget it if it is over."""
        answer = self._answers[continuation]
        if continuation.error is not None:
            self._finish(continuation, "error")
            self._tell(answer, answer._fail, continuation.error)
            return
        self._totals["generated_tokens"] += len(continuation.tokens) - len(answer.token_ids)
        is_delivered = self._tell(answer, answer._advance, continuation)
        stopped_by_text = answer.finish_reason is not None and not continuation.is_over
        if stopped_by_text or not (is_delivered or continuation.is_over):
            self.batch.remove(continuation)
        if answer.finish_reason is not None or not is_delivered:
            self._finish(continuation, answer.finish_reason or "error")

    def _finish(self, continuation: Continuation, reason: str) -> None:
        del self._answers[continuation]
        self._finished[reason] += 1

    def _tell(self, answer: Answer, tell: Callable, what: object) -> bool:
        """Call `tell(what)`, a method of an answer; False if that failed."""
        try:
            tell(what)
            return True
        except Exception as error:
            # The reader's `on_delta`, e.g. of an event loop that is closed, or its tokenizer. If even the error cannot
            # be delivered nobody is there.
            with contextlib.suppress(Exception):
                answer._fail(error)
            return False

    def _die(self, error: BaseException) -> None:
        """Tell everybody who waits that nothing will come."""
        with self._changed:
            self._failure = error
            left = [*self._answers.values(), *self._waiting]
            self._answers.clear()
            self._waiting.clear()
        for answer in left:
            dead = EngineDead(f"the engine ended: {error!r}")
            dead.__cause__ = error
            self._tell(answer, answer._fail, dead)
