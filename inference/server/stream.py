"""Answers as server-sent events: `data: {...}` and an empty line each, and `data: [DONE]` at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from inference.server.errors import ApiError, error_body
from inference.server.run import Run

IDLE = 15.0
"""Seconds without a token after which a comment shows that the connection lives, as it waits in the queue."""
KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy that collects events spoils them
LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


class EventStream(StreamingResponse):
    """Sends the events of a run; when the client is gone, even before the first one, the run is given up."""

    def __init__(self, run: Run, bodies: AsyncIterator[dict | None]):
        super().__init__(events(bodies), media_type="text/event-stream", headers=HEADERS)
        self._run = run

    async def __call__(self, scope, receive, send) -> None:
        """Answer; the method of ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.cancel()


async def events(bodies: AsyncIterator[dict | None]) -> AsyncIterator[str]:
    """JSON bodies as events; None becomes a comment. An error is the last body: the status has been sent long ago."""
    try:
        async for body in bodies:
            yield KEEP_ALIVE if body is None else event(body)
    except ApiError as error:
        yield event(error.body())
    except Exception:
        logging.getLogger("minimind.server").exception("an answer ended with an error")
        yield event(error_body(500, "an internal error ended the answer; the server's log says why"))
    yield DONE


def event(body: dict) -> str:
    """One event. Some clients take every line separator of Unicode for the end of a line, so these are escaped."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':')).translate(LINE_ENDS)}\n\n"
