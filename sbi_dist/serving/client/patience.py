"""How long and how often one request is repeated, and the errors that end it."""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from sbi_dist.errors import InputError, StageError
from sbi_dist.serving.client.steps import Again

__all__ = ["Patience", "RequestRefused", "ServiceError", "retry_after"]

_FIRST_S, _MOST_S = 0.1, 5.0
# Clients that were told the same time do not come back at once.
_SPREAD, _LEAST_SPREAD_S = 0.25, 0.1


class RequestRefused(InputError):
    """The service refuses what it was asked; asking again would not help.

    Attributes:
        status: HTTP status code.
        request_id: by which the service's log knows it; empty where it has none.
    """

    def __init__(self, message: str, status: int | None = None, request_id: str = "") -> None:
        super().__init__(message)
        self.status, self.request_id = status, request_id


class ServiceError(StageError):
    """The service did not answer, or not in a way that can be used.

    Attributes:
        status: HTTP status code; None where there was no answer.
        request_id: by which the service's log knows it; empty where it has none.
    """

    def __init__(self, message: str, status: int | None = None, request_id: str = "") -> None:
        super().__init__(message)
        self.status, self.request_id = status, request_id


class Patience:
    """The time and the tries of one request.

    Args:
        where: the service, for errors.
        timeout_s: for all tries together.
        retries: how often in a row it is sent again without any progress. Waiting for as long as
            the service itself asked for does not count.
        clock, uniform: as of ``time`` and ``random``.
    """

    def __init__(
        self,
        where: str,
        timeout_s: float,
        retries: int,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._where, self._timeout_s, self._retries = where, timeout_s, retries
        self._clock, self._uniform = clock, uniform
        self._ends = clock() + timeout_s
        self._in_a_row = 0
        self._last: Again | None = None

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            ServiceError: none are.
        """
        left = self._ends - self._clock()
        if left <= 0:
            raise self._over()
        return left

    def excuse(self, seconds: float) -> None:
        """Time that the caller took does not count."""
        self._ends += seconds

    def progress(self) -> None:
        """Something came of it."""
        self._in_a_row = 0

    def pause(self, again: Again) -> float:
        """Seconds to wait before the next try.

        Raises:
            ServiceError: there is to be none.
        """
        self._last = again
        if not self._retries:
            raise self._failed(again, "")
        if again.after_s is not None:
            spread = max(_LEAST_SPREAD_S, _SPREAD * again.after_s)
            wait = again.after_s + self._uniform(0.0, spread)
        else:
            if self._in_a_row >= self._retries:
                raise self._failed(again, f", {self._in_a_row + 1} times in a row")
            wait = self._uniform(0.0, min(_MOST_S, _FIRST_S * 2**self._in_a_row))
            self._in_a_row += 1
        if wait >= self.left():
            raise self._over()
        return wait

    def _failed(self, again: Again, how_often: str) -> ServiceError:
        return ServiceError(
            f"{self._where}: {again.reason}{how_often}; see whether the service runs there and "
            f"try again{_named(again.request_id)}",
            request_id=again.request_id,
        )

    def _over(self) -> ServiceError:
        last = self._last
        reason = "" if last is None else f" (last: {last.reason})"
        return ServiceError(
            f"{self._where}: not done within timeout_s, {self._timeout_s:g} s{reason}; give it "
            f"longer, or ask for fewer draws{_named('' if last is None else last.request_id)}",
            request_id="" if last is None else last.request_id,
        )


def _named(request_id: str) -> str:
    return f" (request {request_id})" if request_id else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a ``Retry-After``, which may also be a date; None where there is no valid one."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
