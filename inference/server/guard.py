"""What every request passes before an endpoint sees it: the log, the key, the limit of its size. Plain ASGI."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders

from inference.server.errors import ApiError, error_response

LOG = logging.getLogger("minimind.server")


class RequestLog:
    """One line of JSON for each request, when it is over, without its text; and the header X-Request-ID.

    Endpoints add what they know to `scope["record"]`.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Pass a request on; the method of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.monotonic()
        record = scope["record"] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "request_id": f"req_{uuid.uuid4().hex}",
            "method": scope["method"],
            "path": scope["path"],
            "status": 499,  # unless something is sent: the client is gone
        }

        async def send_with_id(message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = record["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            record["seconds"] = round(time.monotonic() - begin, 4)
            LOG.info(json.dumps(record, ensure_ascii=False))


class Key:
    """Lets requests to /v1 pass only with `Authorization: Bearer KEY`, if there is a key."""

    def __init__(self, app, key: str):
        self.app, self._key = app, key.encode()

    async def __call__(self, scope, receive, send) -> None:
        """Pass a request on, or refuse it; the method of ASGI."""
        if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._knows(Headers(scope=scope)):
            error = ApiError(
                401,
                "wrong or missing API key: send the header Authorization: Bearer KEY, with the key of --api_key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Takes equally long for every wrong key, so nobody can find it out letter by letter.
        return hmac.compare_digest(given.strip().encode(), self._key) and scheme.lower() == "bearer"


class BodyLimit:
    """Refuses bodies above a size, announced or counted while they come."""

    def __init__(self, app, limit: int):
        self.app, self._limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        """Pass a request on; the method of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = ApiError(413, f"the body has more than {self._limit:,} bytes, the limit here (--max_body)")
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limit:
            await error_response(error)(scope, receive, send)
            return
        size = 0

        async def counted():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise error
            return message

        await self.app(scope, counted, send)
