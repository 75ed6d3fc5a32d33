"""Patience with an S3 server: which failures pass, how long to wait, and what is said meanwhile.

One policy for all operations. Failures that do not pass are put into words in
:mod:`sbi_dist.store.s3_errors`.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sbi_dist.progress import duration, say

__all__ = ["Impatient", "Outage", "Transient", "minutes", "persist", "transient"]

T = TypeVar("T")

# Waits are drawn from 0 up to a bound that doubles from START_S, or from BUSY_S where the server
# asks for fewer requests, to CAP_S; a Retry-After is obeyed up to RETRY_AFTER_S.
START_S = 0.1
BUSY_S = 1.0
CAP_S = 15.0
RETRY_AFTER_S = 60.0

# An outage is mentioned when it has lasted this long, and at most once in the second time.
QUIET_S = 2.0
SAY_EVERY_S = 60.0

_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_BUSY_CODES = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
}


class Transient(Exception):
    """A failure found by this package, not by boto3, that another attempt may not have."""


class Impatient(Exception):
    """The patience has ended; ``reason`` is the last failure."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Pause:
    """A transient failure.

    Attributes:
        reason: in a few words.
        busy: whether the server asks for fewer requests.
        retry_after_s: how long it wants to be left alone.
    """

    reason: str
    busy: bool = False
    retry_after_s: float = 0.0


def transient(error: BaseException) -> Pause | None:
    """What to know about a failure that may pass; None where it will not."""
    from botocore.exceptions import (
        ClientError,
        ConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
        SSLError,
    )
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, Transient):
        return Pause(str(error))
    if isinstance(error, ClientError):
        return _answer(error)
    if isinstance(error, SSLError) and certificate_problem(error):
        return None
    if isinstance(error, FlexibleChecksumError):
        return Pause("wrong checksum")
    # What is left of a date that was cut is a plain ValueError of boto3's.
    cut = isinstance(error, ValueError) and "timestamp" in str(error)
    if cut or isinstance(error, (IncompleteReadError, ResponseParserError)):
        return Pause("answer cut off")
    if isinstance(error, (ConnectionError, HTTPClientError, HTTPError, OSError)):
        return Pause(reason(error))
    return None


def _answer(error: Any) -> Pause | None:
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    metadata = answer.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    busy = code in _BUSY_CODES or status in (429, 503)
    if not (busy or code in _TRANSIENT_CODES or status == 408 or (status >= 500 and status != 501)):
        return None
    words = code if not code.isdigit() else f"HTTP status {status}"
    after = metadata.get("HTTPHeaders", {}).get("retry-after", "")
    return Pause(words or f"HTTP status {status}", busy, _seconds(after))


def _seconds(after: str) -> float:
    """A Retry-After header, seconds or a date, as seconds."""
    if after.strip().isdigit():
        return float(after)
    try:
        when = email.utils.parsedate_to_datetime(after)
        return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def certificate_problem(error: BaseException) -> bool:
    """Whether TLS failed for a reason that stays, and not as the connection was lost."""
    words = str(error).upper()
    return "CERTIFICATE" in words or "WRONG_VERSION_NUMBER" in words or "HOSTNAME" in words


def reason(error: BaseException) -> str:
    """A failed connection in a few words, without addresses of objects in memory."""
    inner = getattr(error, "kwargs", {}).get("error", error)
    words = str(inner)
    if "resolve" in words.lower():
        return "the host name is not known"
    system = re.search(r"\[Errno -?\d+\] ([^'\")(>]+)", words) or re.search(
        r"\(\d+, '([^']+)'\)", words
    )
    if system:
        return system.group(1).strip()
    kind = type(inner if isinstance(inner, BaseException) else error).__name__
    if "Timeout" in kind or "timed out" in words.lower():
        return "timed out"
    if "RemoteDisconnected" in words or "IncompleteRead" in words or "Connection" in kind:
        return "connection lost"
    return kind


def minutes(seconds: float) -> str:
    """A patience in words, such as ``10 min``."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.3g} s"


class Outage:
    """Says once that a server does not answer, and that it does again.

    One for each server in a process, whatever number of stores and threads wait for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._said: float | None = None
        self._in_words = False

    def failed(self, uri: str, why: str, patience_s: float) -> None:
        """An operation has failed and will be tried again."""
        now = time.monotonic()
        with self._lock:
            if self._since is None:
                self._since = now
            recent = self._said is not None and now - self._said < SAY_EVERY_S
            if self._in_words or recent or now - self._since < QUIET_S:
                return
            self._in_words, self._said = True, now
        say(f"store {uri} does not answer ({why}); waiting up to {minutes(patience_s)} for it")

    def passed(self, uri: str) -> None:
        """An operation has succeeded."""
        if self._since is None:
            return
        with self._lock:
            since, in_words = self._since, self._in_words
            self._since, self._in_words = None, False
        if in_words and since is not None:
            say(f"store {uri} answers again after {duration(time.monotonic() - since)}")


def persist(
    attempt: Callable[[], T], patience_s: float, failed: Callable[[Pause], None] | None = None
) -> T:
    """The result of ``attempt``, which is made again after transient failures.

    Args:
        attempt: the whole operation, with reading the answer's body.
        patience_s: no further attempt begins when this has passed.
        failed: told of each failure that is followed by another attempt.

    Raises:
        Impatient: the patience has ended.
    """
    import tenacity

    quick = tenacity.wait_random_exponential(multiplier=START_S, max=CAP_S)
    busy = tenacity.wait_random_exponential(multiplier=BUSY_S, max=CAP_S)
    started = time.monotonic()

    def wait(state: tenacity.RetryCallState) -> float:
        pause = _pause(state)
        drawn = (busy if pause.busy else quick)(state)
        wanted = max(drawn, min(pause.retry_after_s, RETRY_AFTER_S))
        # A last attempt is made when the patience ends, not only before.
        return max(0.0, min(wanted, started + patience_s - time.monotonic()))

    def told(state: tenacity.RetryCallState) -> None:
        if failed is not None:
            failed(_pause(state))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: transient(error) is not None),
        stop=tenacity.stop_after_delay(patience_s),
        wait=wait,
        before_sleep=told,
    )
    try:
        return retrying(attempt)
    except tenacity.RetryError as ended:
        last = transient(ended.last_attempt.exception() or ended)
        raise Impatient(last.reason if last else "no answer") from None


def _pause(state: Any) -> Pause:
    found = transient(state.outcome.exception())
    assert found is not None
    return found
