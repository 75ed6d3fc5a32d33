"""Fast draws and densities of a trained flow, for one observation or millions.

nflows defines what a flow is; here it is executed. :class:`Sampler` takes an estimator and plans
the work, ``program`` and the modules of its steps hold the computation on a CPU or in eager mode on
a GPU.
"""

from sbi_dist.posterior.sampler.sampler import Sampler

__all__ = ["Sampler"]
