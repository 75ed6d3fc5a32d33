"""The errors that users see, and the exit code of each.

Every message names the field, the value, what is allowed and the next step; the command line
prints it as one sentence and never shows a traceback for these.
"""

__all__ = ["InputError", "Interrupted", "StageError"]


class InputError(ValueError):
    """What the user gave can't be used: exit code 2."""

    exit_code = 2


class StageError(RuntimeError):
    """A stage could not finish for a reason outside the input: exit code 1."""

    exit_code = 1


class Interrupted(BaseException):
    """A signal asked the process to stop; finished work is in the store.

    A ``BaseException``, so that code which tolerates a failing simulator does not swallow it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number
