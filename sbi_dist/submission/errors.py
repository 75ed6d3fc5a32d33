"""What may come between a submission and its job."""

from __future__ import annotations

from sbi_dist.errors import StageError

__all__ = ["Ended", "NoSuchJob", "Unreachable"]


class Unreachable(StageError):
    """The dashboard does not answer now, and may again."""


class NoSuchJob(StageError):
    """The cluster has no job of this id."""


class Ended(StageError):
    """The job, or following it, came to an end with an exit code of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
