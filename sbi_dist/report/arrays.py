"""Reading arrays handed in by users: torch tensors or anything numpy understands.

Only conversion and the checks that several plots share; no numbers are computed here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

MIN_DRAWS = 10


def as_float_array(value: Any, field: str) -> FloatArray:
    """Convert a torch tensor (any device), numpy array or nested list to float64.

    Raises:
        ValueError: ``value`` cannot be read as an array of real numbers.
    """
    if hasattr(value, "detach"):  # a torch tensor, recognised without importing torch
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
        if array.dtype.kind == "c":
            raise TypeError("complex numbers")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{field} is {type(value).__name__} and cannot be read as an array of real numbers "
            f"({error}); allowed: a torch tensor, a numpy array or a list of numbers"
        ) from error


def as_draws(value: Any, field: str) -> FloatArray:
    """Read parameter draws of shape (N, D), float64.

    Raises:
        ValueError: not two-dimensional, no parameters, non-finite values, or fewer than
            ``max(10, D + 1)`` draws.
    """
    draws = as_float_array(value, field)
    if draws.ndim != 2 or draws.shape[1] == 0:
        raise ValueError(
            f"{field} has shape {draws.shape}; allowed: (N, D), one row a draw and one column "
            "a parameter, D at least 1"
        )
    needed = max(MIN_DRAWS, draws.shape[1] + 1)
    if draws.shape[0] < needed:
        raise ValueError(
            f"{field} has {draws.shape[0]} draws; allowed: at least {needed} draws for "
            f"{draws.shape[1]} parameters"
        )
    bad = ~np.isfinite(draws)
    if bad.any():
        row, column = (int(index) for index in np.argwhere(bad)[0])
        raise ValueError(
            f"{field} holds {int(bad.sum())} non-finite values, the first {draws[row, column]} "
            f"at draw {row}, parameter {column}; allowed: finite numbers"
        )
    return draws


def thin(rows: FloatArray, at_most: int) -> FloatArray:
    """At most ``at_most`` rows, evenly spaced, so that the same input gives the same picture."""
    if rows.shape[0] <= at_most:
        return rows
    return rows[np.linspace(0, rows.shape[0] - 1, at_most).astype(np.int64)]
