"""Work that is done only while the one who asked for it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from sbi_dist.serving.refusal import Refusal

__all__ = ["while_there"]

T = TypeVar("T")


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """Do the work, and break it off when the caller goes; the request's body must have been read.

    Raises:
        Refusal: 499 the caller is gone.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            request.state.gone = True
            raise Refusal(499, "Client closed request", "the caller is gone")
        return await doing
    finally:
        doing.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
