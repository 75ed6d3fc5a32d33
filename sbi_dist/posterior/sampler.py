"""Draws and densities for many observations at once, in bounded memory.

The observations are embedded once each; the pairs (observation, draw) then go through the flow in
chunks of a fixed number of rows, so that one observation with many draws and many observations
with few cost the same and take the same memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbi_dist.estimation.ensemble import Estimator
from sbi_dist.posterior.noise import normal_noise, stream_keys

__all__ = ["draw", "log_density"]

# Rows that go through the flow at once: large enough for efficient matrix products, small enough
# for the activations to stay in a core's cache.
_ROWS = 8192
# Numbers of all the contexts that go with them: fewer rows where a context is very long.
_CONTEXTS = 2**26


@torch.no_grad()
def draw(
    estimator: Estimator, x: Tensor, count: int, identity: str, seed: int, first: int = 0
) -> Tensor:
    """Posterior draws ``first`` to ``first + count - 1`` of each observation.

    Args:
        estimator: the fitted estimator.
        x: observations, float32 of shape (B, *x_shape), finite.
        count: draws of each.
        identity: the model's digest, part of the random stream.
        seed: seed of the random streams.

    Returns:
        theta, float32 of shape (B, count, D); inside the prior's support.
    """
    context = estimator.embed(x)
    keys = stream_keys(x.numpy(), identity, seed)
    size = estimator.num_parameters
    theta = torch.empty((len(x), count, size), dtype=torch.float32)
    at_once = _rows_at_once(context)
    per_observation = max(1, min(count, at_once))
    observations = at_once // per_observation
    for start in range(0, len(x), observations):
        rows = slice(start, start + observations)
        for offset in range(0, count, per_observation):
            number = min(per_observation, count - offset)
            noise = normal_noise(keys[rows], first + offset, number, estimator.noise_size)
            repeated = context[rows].repeat_interleave(number, dim=0)
            chunk = estimator.push(noise.flatten(0, 1), repeated)
            theta[rows, offset : offset + number] = chunk.unflatten(0, (-1, number))
    return theta


@torch.no_grad()
def log_density(estimator: Estimator, theta: Tensor, x: Tensor) -> Tensor:
    """log q(theta | x), float32 of shape (N, B).

    Args:
        theta: float32 of shape (N, B, D): N parameter vectors for each observation.
        x: observations, float32 of shape (B, *x_shape).
    """
    context = estimator.embed(x)
    count, batch = theta.shape[:2]
    result = torch.empty(count * batch)
    flat = theta.reshape(count * batch, -1)
    which = torch.arange(batch).repeat(count)
    at_once = _rows_at_once(context)
    for start in range(0, len(flat), at_once):
        rows = slice(start, start + at_once)
        result[rows] = estimator.log_prob_given_context(flat[rows], context[which[rows]])
    return result.reshape(count, batch)


def _rows_at_once(context: Tensor) -> int:
    return max(1, min(_ROWS, _CONTEXTS // max(1, context.shape[1])))
