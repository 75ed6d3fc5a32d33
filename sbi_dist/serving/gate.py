"""What every request passes before and after it is answered, as ASGI middleware.

Its identifier, its token, its deadline, how it ended: for the metrics and the log. Whatever goes
wrong becomes a problem document (RFC 9457), and nothing of the inside is told. What the answers
are is not known here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sbi_dist.serving.refusal import Refusal
from sbi_dist.serving.service import Service

__all__ = ["Gate", "problem"]

_log = logging.getLogger("sbi_dist.serving")
_IDENTIFIER = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OPEN = ("/page/", "/v2/health/")
_OPEN_PAGES = ("/", "/docs", "/openapi.json", "/favicon.ico")
_OUTCOMES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "bad_request",
    408: "timeout",
    409: "not_found",
    413: "too_large",
    415: "bad_request",
    422: "bad_request",
    429: "saturated",
    503: "saturated",
    504: "timeout",
}
# A reader that takes nothing for so long, beyond its request's time, is given up.
_STALLED_S = 10.0
_HOLD_S = 0.5  # for which one that is turned away is kept waiting for room
_OPERATIONS = ("sample", "summary", "log_prob", "infer")


class Gate:
    """The way in and out.

    Args:
        app: what answers.
        service: whose tokens and options hold.
        names: whether to put X-Request-ID into answers; Ray Serve does so itself.
    """

    def __init__(self, app: ASGIApp, service: Service, names: bool = True) -> None:
        self._app, self._service, self._names = app, service, names
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        identifier = headers.get(b"x-request-id", "")
        if not _IDENTIFIER.fullmatch(identifier):
            identifier = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = identifier
        status, ended = 0, False

        async def sending(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                if self._names:
                    message["headers"].append((b"x-request-id", identifier.encode()))
            left = max(0.0, state["deadline"] - time.monotonic()) if "deadline" in state else 0.0
            async with asyncio.timeout(left + _STALLED_S):
                await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                ended = True

        outcome = None
        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            self._check_token(path, headers.get(b"authorization"))
            state["deadline"] = began + self._timeout(headers.get(b"x-timeout-s"))
            if scope["method"] == "POST":
                await self._room(state["deadline"])
            await self._app(scope, receive, sending)
        except Refusal as refusal:
            await _answer(refusal, identifier, sending)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except (ConnectionError, ClientDisconnect):
            outcome = "cancelled"
        except TimeoutError:
            outcome = "timeout"
            _log.warning("request %s broke off: its answer was not taken", identifier)
            raise
        except Exception as error:
            cause = error.__cause__  # where Starlette has it once the answer has begun
            if status and isinstance(cause, Refusal):
                outcome = _OUTCOMES.get(cause.status, "error")
                _log.warning("request %s broke off: %s", identifier, cause.detail)
                raise
            outcome = "error"
            _log.exception("request %s failed", identifier)
            if status:
                raise
            failure = Refusal(
                500,
                "Internal error",
                "the request failed for a reason that is in the service's log; give its operator "
                "the identifier of the request",
            )
            await _answer(failure, identifier, sending)
        finally:
            if outcome is None:
                outcome = "ok" if status < 400 else _OUTCOMES.get(status, "error")
                if not ended or state.get("gone"):
                    outcome = "cancelled"
            last = scope["path"].rsplit("/", 1)[-1]
            operation = last if last in _OPERATIONS else "other"
            self._service.count(operation, outcome, time.monotonic() - began)

    async def _room(self, deadline: float) -> None:
        """Turn a request away before it is read: under a flood, that must cost next to nothing.

        Not at once, as callers that come again at once would keep the service from its work.

        Raises:
            Refusal: 503, there is too much to do.
        """
        queue, most = self._service.queue, self._service.options.max_requests
        try:
            queue.check()
        except Refusal:
            if self._held >= most:
                raise
            self._held += 1
            try:
                await asyncio.sleep(min(_HOLD_S, max(0.0, deadline - time.monotonic())))
            finally:
                self._held -= 1
            queue.check()

    def _check_token(self, path: str, authorization: str | None) -> None:
        tokens = self._service.tokens
        if tokens is None or path in _OPEN_PAGES or path.startswith(_OPEN):
            return
        if not tokens.accept(authorization):
            raise Refusal(
                401,
                "Unauthorized",
                "the request has no valid token; send the header Authorization: Bearer TOKEN",
            )

    def _timeout(self, given: str | None) -> float:
        options = self._service.options
        if given is None:
            return options.timeout_s
        try:
            timeout = float(given)
        except ValueError:
            timeout = math.nan
        if not timeout > 0:
            raise Refusal(
                400,
                "Malformed header",
                f"X-Timeout-S is {given[:40]!r}; it must be a number of seconds above 0",
            )
        return min(timeout, options.max_timeout_s)


def problem(refusal: Refusal, identifier: str) -> tuple[bytes, list[tuple[str, str]]]:
    """Body and headers of a problem document."""
    content: dict[str, Any] = {
        "type": "urn:sbi-dist:" + re.sub(r"[^a-z]+", "-", refusal.title.lower()),
        "title": refusal.title,
        "status": refusal.status,
        "detail": refusal.detail,
        "instance": f"urn:request:{identifier}",
        "request_id": identifier,
        # What clients of the Open Inference Protocol read.
        "error": refusal.detail,
        **(refusal.extra or {}),
    }
    headers = [("content-type", "application/problem+json")]
    if refusal.retry_after is not None:
        headers.append(("retry-after", str(max(1, math.ceil(refusal.retry_after)))))
    if refusal.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    if refusal.status in (408, 413):
        # What is left of the body is not read.
        headers.append(("connection", "close"))
    return orjson.dumps(content), headers


async def _answer(refusal: Refusal, identifier: str, send: Send) -> None:
    body, headers = problem(refusal, identifier)
    raw = [(name.encode(), value.encode()) for name, value in headers]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
