"""What a conversation with a service is made of, without saying how it is carried on.

A conversation is a generator: it yields a step, is sent what came of it, and is thrown
:class:`Again` where the connection failed. :class:`Client` and :class:`AsyncClient` differ only in
how they take these steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from typing import Any

__all__ = ["Again", "Found", "Head", "Pause", "Receive", "Send", "Steps"]


@dataclasses.dataclass(frozen=True)
class Send:
    """Send a request, in place of the one before; gives the :class:`Head` of its answer."""

    method: str
    url: str
    headers: Mapping[str, str]
    params: Mapping[str, str]
    content: bytes | None
    timeout_s: float


@dataclasses.dataclass(frozen=True)
class Receive:
    """Wait for more of the answer's body; gives its bytes, none at its end."""

    timeout_s: float


@dataclasses.dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class Found:
    """Something for the caller."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Head:
    """Status and headers of an answer; names of headers in any case."""

    status: int
    headers: Mapping[str, str]


Steps = Generator[Send | Receive | Pause | Found, Any, None]


class Again(Exception):
    """What failed may be asked again.

    Args:
        reason: what happened.
        after_s: seconds after which the service wants to be asked, where it said so.
        request_id: of the request that failed.
    """

    def __init__(self, reason: str, after_s: float | None = None, request_id: str = "") -> None:
        super().__init__(reason)
        self.reason, self.after_s, self.request_id = reason, after_s, request_id
