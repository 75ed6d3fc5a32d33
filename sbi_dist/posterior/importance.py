"""Importance sampling: posterior draws corrected by a known likelihood.

Draws of the fitted posterior q get the weights w = p(x | theta) p(theta) / q(theta | x) and are
resampled by them. Where the likelihood is right and q covers the posterior, the outcome follows
the exact posterior, whatever q's errors (Dax et al. 2023, arXiv:2210.05686). The effective sample
size tells whether q covers it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["Weighted", "weigh"]

_CHUNK = 50_000


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Outcome of importance sampling for one observation.

    Attributes:
        draws: (num_samples, D) float32, resampled by weight.
        best: (D,) float32, the draw of highest p(x | theta) p(theta).
        effective_sample_size: (sum w)^2 / sum w^2 of the weighted draws.
        log_evidence: log of the mean weight, an estimate of log p(x).
    """

    draws: np.ndarray
    best: np.ndarray
    effective_sample_size: float
    log_evidence: float


def weigh(
    theta: Tensor,
    log_q: Tensor,
    log_likelihood: Callable[..., Any],
    prior: Distribution,
    x: np.ndarray,
    num_samples: int,
    seed: int,
) -> Weighted:
    """Weigh draws of q for one observation; resample ``num_samples`` of them.

    Args:
        theta: the draws, float32 of shape (N, D).
        log_q: log q(theta | x), float32 of shape (N,).
        log_likelihood: log p(x | theta) for numpy theta (N, D) and x of x_shape, giving (N,).
        prior: p(theta); only its part inside q's support is seen.
        x: the observation, of x_shape.
        num_samples: how many to give back.
        seed: of the resampling (systematic, so of least variance).
    """
    observation = np.asarray(x, dtype=np.float64)
    count = len(theta)
    log_target = np.empty(count)
    for start in range(0, count, _CHUNK):
        chunk = theta[start : start + _CHUNK]
        likelihood = np.asarray(log_likelihood(chunk.double().numpy(), observation), dtype=float)
        log_target[start : start + _CHUNK] = likelihood + prior.log_prob(chunk).double().numpy()
    log_weights = log_target - log_q.double().numpy()
    # A likelihood that is NaN for some theta is no evidence for it.
    unlikely = ~np.isfinite(log_weights)
    log_weights[unlikely] = log_target[unlikely] = -math.inf
    largest = float(log_weights.max())
    if not math.isfinite(largest):
        best = theta[int(log_q.nan_to_num(nan=-math.inf).argmax())]
        return Weighted(theta[:num_samples].numpy(), best.numpy(), 0.0, -math.inf)
    weights = np.exp(log_weights - largest)
    total = weights.sum()
    generator = np.random.Generator(np.random.Philox(key=seed))
    levels = (np.arange(num_samples) + generator.random()) / num_samples
    chosen = np.searchsorted(np.cumsum(weights) / total, levels).clip(max=count - 1)
    generator.shuffle(chosen)
    return Weighted(
        draws=theta[torch.from_numpy(chosen)].numpy(),
        best=theta[int(log_target.argmax())].numpy(),
        effective_sample_size=float(total**2 / (weights**2).sum()),
        log_evidence=largest + math.log(total / count),
    )
