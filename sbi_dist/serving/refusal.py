"""What a request is refused with: an HTTP problem, RFC 9457."""

from __future__ import annotations

from typing import Any

__all__ = ["Refusal"]


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status code.
        title: what kind of problem it is, the same for all of its kind.
        detail: this occurrence of it: the field, the value, what is allowed, the next step.
        retry_after: seconds after which to try again.
        extra: more members of the problem document.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        retry_after: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail = status, title, detail
        self.retry_after, self.extra = retry_after, extra
