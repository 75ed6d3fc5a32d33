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
from torch.distributions import Distribution

from sbi_dist.posterior.posterior import Posterior

__all__ = ["Weighted", "importance_sample"]

_CHUNK = 50_000


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Outcome of importance sampling for one observation.

    Attributes:
        draws: (num_samples, D) float32, resampled by weight.
        effective_sample_size: (sum w)^2 / sum w^2 of the weighted draws.
        log_evidence: log of the mean weight, an estimate of log p(x).
    """

    draws: np.ndarray
    effective_sample_size: float
    log_evidence: float


def importance_sample(
    posterior: Posterior,
    log_likelihood: Callable[..., Any],
    prior: Distribution,
    x: Any,
    num_samples: int,
    proposals: int,
    seed: int,
) -> Weighted:
    """Weigh ``proposals`` draws of q by likelihood and prior; resample ``num_samples`` of them.

    Args:
        posterior: q.
        log_likelihood: log p(x | theta) for numpy theta (N, D) and x of x_shape, giving (N,).
        prior: p(theta); only its part inside q's support is seen.
        x: one observation.
        num_samples, proposals: how many to give back, and to weigh.
        seed: of the draws and of the resampling (systematic, so of least variance).
    """
    theta = posterior.sample((proposals,), x, seed=seed)
    observation = np.asarray(x, dtype=np.float64).reshape(posterior.x_shape)
    log_weights = np.empty(proposals)
    for start in range(0, proposals, _CHUNK):
        rows = slice(start, start + _CHUNK)
        chunk = theta[rows]
        likelihood = np.asarray(log_likelihood(chunk.double().numpy(), observation), dtype=float)
        log_ratio = prior.log_prob(chunk) - posterior.log_prob(chunk, x)
        log_weights[rows] = likelihood + log_ratio.double().numpy()
    # A likelihood that is NaN for some theta is no evidence for it.
    log_weights[~np.isfinite(log_weights)] = -math.inf
    largest = float(log_weights.max())
    if not math.isfinite(largest):
        return Weighted(theta[:num_samples].numpy(), 0.0, -math.inf)
    weights = np.exp(log_weights - largest)
    total = weights.sum()
    generator = np.random.Generator(np.random.Philox(key=seed))
    levels = (np.arange(num_samples) + generator.random()) / num_samples
    chosen = np.searchsorted(np.cumsum(weights) / total, levels).clip(max=proposals - 1)
    generator.shuffle(chosen)
    return Weighted(
        draws=theta[torch.from_numpy(chosen)].numpy(),
        effective_sample_size=float(total**2 / (weights**2).sum()),
        log_evidence=largest + math.log(total / proposals),
    )
