"""The amortized posterior and its sampler. No Ray, no simulator."""

from sbi_dist.posterior.posterior import Posterior

__all__ = ["Posterior"]
