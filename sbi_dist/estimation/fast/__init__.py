"""The conditional flow's density and its gradient, computed in few and large operations.

The modules of the flow keep their parameters; here is only how log q(u | x) is computed from
them, with backward passes derived by hand. All arrays are feature-major, (features, N): a layer's
share of a stack of layers is then contiguous, and bins are summed over the batch in step.
"""

from sbi_dist.estimation.fast.flat import FlatParameters
from sbi_dist.estimation.fast.log_prob import FastLogProb, fast_log_prob

__all__ = ["FastLogProb", "FlatParameters", "fast_log_prob"]
