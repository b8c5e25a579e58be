"""A client that goes away before its answer is finished."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.requests import Request

from inference.server.errors import ApiError

T = TypeVar("T")


async def unless_gone(http: Request, work: Coroutine[None, None, T]) -> T:
    """Do some work, and give it up as soon as the client is gone. Streams need no such help: they notice in sending."""

    async def wait_for_the_end() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_the_end())
    try:
        await asyncio.wait([job, gone], return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ApiError(499, "the client has closed the connection")  # nginx's number; only the log sees it
        return job.result()
    finally:
        job.cancel()
        gone.cancel()
