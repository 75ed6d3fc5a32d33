"""The errors that users see, and the exit code of each.

Every message names the field, the value, what is allowed and the next step; the command line
prints it as one sentence and never shows a traceback for these.
"""

__all__ = ["CalibrationError", "InputError", "StageError"]


class InputError(ValueError):
    """What the user gave can't be used: exit code 2."""

    exit_code = 2


class StageError(RuntimeError):
    """A stage could not finish for a reason outside the input: exit code 1."""

    exit_code = 1


class CalibrationError(StageError):
    """A stage ran, and the model failed its calibration: exit code 3."""

    exit_code = 3
