"""The answers to one HTTP request: submitted together, read as they grow, given up when nobody reads them."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence

from inference.engine import Delta, Engine, Request
from inference.server.errors import ApiError, from_engine
from inference.server.metrics import Metrics


class Run:
    """The answers to some requests of the engine, in an event loop.

    Args:
        timeout: seconds until all of them must be over.

    Raises:
        ApiError: not all of them can be submitted, and so none is.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], metrics: Metrics, timeout: float):
        self._metrics, self._timeout, self._begin = metrics, timeout, time.monotonic()
        self._items: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
        self._latest: list[float | None] = [None] * len(requests)  # when each answer's last token came
        self.answers = []
        self.seconds_to_first: float | None = None
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(requests):
                deliver = functools.partial(self._deliver, loop, index)  # in the engine's thread
                self.answers.append(engine.submit(request, on_delta=deliver))
        except Exception as error:
            self.cancel()
            answer = from_engine(error)
            if isinstance(error, ValueError):
                answer = ApiError(400, str(error), param="stop" if str(error).startswith("stop") else None)
            if answer is None:
                raise
            metrics.rejected.labels(answer.code or "invalid").inc()
            raise answer from error

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int, item: Delta | Exception) -> None:
        loop.call_soon_threadsafe(self._items.put_nowait, (index, item))

    def cancel(self) -> None:
        """Give up what is not finished."""
        for answer in self.answers:
            answer.cancel()

    async def deltas(self, idle: float | None = None) -> AsyncIterator[tuple[int, Delta] | None]:
        """(index of the answer, what is new), as it comes, until all are over.

        Args:
            idle: after so many seconds without anything new comes None.

        Raises:
            ApiError: the time is up, the server shuts down, or the request turns out to be impossible.
        """
        left = len(self.answers)
        try:
            while left:
                patience = self._begin + self._timeout - time.monotonic()
                if idle is not None:
                    patience = min(patience, idle)
                try:
                    index, item = await asyncio.wait_for(self._items.get(), max(patience, 0))
                except asyncio.TimeoutError:  # noqa: UP041 -- until Python 3.10 it is not the built-in one
                    self._check_time()
                    yield None
                    continue
                self._check_time()
                self._check(item)
                self._measure(index, item)
                left -= item.finish_reason is not None
                yield index, item
            self._metrics.whole.observe(time.monotonic() - self._begin)
        finally:
            self.cancel()

    def _check_time(self) -> None:
        if time.monotonic() - self._begin > self._timeout:
            raise ApiError(
                408,
                f"the answer took longer than the {self._timeout:g} seconds that a request may take here: ask for "
                "fewer tokens, or start the server with a longer --request_timeout",
                code="request_timeout",
                headers={"x-should-retry": "false"},
            )

    def _check(self, item: Delta | Exception) -> None:
        """Raises what ended an answer, if it is no ordinary end."""
        if isinstance(item, Exception):
            raise from_engine(item) or item
        if item.finish_reason == "cancelled":  # not by us: we no longer read then
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)

    def _measure(self, index: int, delta: Delta) -> None:
        if not delta.token_ids:
            return
        now = time.monotonic()
        if self._latest[index] is None:
            self._metrics.first_token.observe(now - self._begin)
        else:
            self._metrics.between_tokens.observe(now - self._latest[index])
        if self.seconds_to_first is None:
            self.seconds_to_first = now - self._begin
        self._latest[index] = now
