"""What the clients have in common in their use of httpx."""

from __future__ import annotations

import httpx

from sbi_dist.errors import InputError
from sbi_dist.serving.client.steps import Again, Send

__all__ = ["as_again", "timeouts"]

# A machine that is there is reached in less.
_CONNECT_S = 10.0


def timeouts(step: Send) -> httpx.Timeout:
    """Of every single wait of a request."""
    return httpx.Timeout(step.timeout_s, connect=min(_CONNECT_S, step.timeout_s))


def as_again(error: httpx.HTTPError) -> Again:
    """A failure of the connection, which may pass.

    Raises:
        InputError: it is the request that can't be sent.
    """
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
        # Its text may show a header.
        raise InputError("the request can't be sent as HTTP; check url and token") from None
    if isinstance(error, httpx.ConnectTimeout):
        return Again("no connection in time")
    if isinstance(error, httpx.TimeoutException):
        return Again("no answer in time")
    return Again(f"the connection failed ({str(error) or type(error).__name__})")
