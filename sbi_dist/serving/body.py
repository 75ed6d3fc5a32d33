"""Bodies of requests, read within bounds of size, memory and time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

from sbi_dist.serving.compression import decompress
from sbi_dist.serving.refusal import Refusal
from sbi_dist.serving.service import Memory

__all__ = ["body_of"]

# Parsed JSON takes several times the memory of its text.
_GROWS = 8
# Memory is taken for so many bytes at least: parts may be of one byte each.
_ROOM = 4096


@contextlib.asynccontextmanager
async def body_of(request: Request, limit: int, memory: Memory) -> AsyncIterator[bytes]:
    """The whole body, without its content coding, for the time of a ``with`` block.

    Raises:
        Refusal: 413 it is larger than ``limit`` bytes; 408 it did not come in time; 400 or 415 its
            coding; 503 there is no memory for it now.
    """
    deadline = request.state.deadline
    given = request.headers.get("content-length", "")
    if given.isdecimal() and (len(given) > 18 or int(given) > limit):
        raise _too_large(limit)
    content, size, room, give_back = bytearray(), 0, 0, []
    try:
        stream = request.stream()
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    part = await anext(stream, None)
            except TimeoutError:
                raise Refusal(
                    408,
                    "Request timeout",
                    f"only {size:,} bytes of the body came before the request's time was up",
                ) from None
            if part is None:
                break
            if not part:
                continue
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            if size > room:
                more = max(size - room, _ROOM)
                give_back.append(memory.take(_GROWS * more))
                room += more
            content += part
        body = bytes(content)
        coding = request.headers.get("content-encoding")
        if coding is not None:
            body = decompress(body, coding, limit)
            if len(body) > size:
                give_back.append(memory.take(_GROWS * (len(body) - size)))
        yield body
    finally:
        for each in give_back:
            each()


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        "Request too large",
        f"the body is larger than {limit / 1e6:g} MB, the most allowed; divide it into several "
        "requests, or send it as Arrow",
        extra={"limit": limit},
    )
