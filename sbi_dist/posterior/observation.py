"""Observations as users give them, checked: shape, dtype, finiteness."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbi_dist.errors import InputError

__all__ = ["as_observations"]


def as_observations(x: Any, x_shape: tuple[int, ...], field: str = "x") -> Tensor:
    """Observations as float32 of shape (B, *x_shape).

    Takes one observation (x_shape), or a batch (B, *x_shape); vectors may also come flat.

    Raises:
        InputError: not numbers, not that shape, or NaN or infinite.
    """
    try:
        array = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field} is no array of numbers ({error})") from error
    size = math.prod(x_shape)
    if array.shape == x_shape or (array.ndim == 1 and array.size == size):
        array = array.reshape(1, *x_shape)
    elif array.shape[1:] != x_shape:
        if array.ndim == 2 and array.shape[1] == size:
            array = array.reshape(-1, *x_shape)
        else:
            raise InputError(
                f"{field} has shape {array.shape}; an observation has shape {x_shape}, a batch of "
                f"B observations {('B', *x_shape)}".replace("'", "")
            )
    if len(array) == 0:
        raise InputError(f"{field} holds no observation")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        raise InputError(
            f"{field} holds NaN or infinite values in observation {bad[0]}"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}; every value must be finite"
        )
    return torch.from_numpy(np.ascontiguousarray(array))
