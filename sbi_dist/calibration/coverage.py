"""Expected coverage: regions of highest density hold the truth as often as they say.

Hermans et al. 2022, arXiv:2110.06581. The draws that have a higher density than the truth are the
smallest such region that holds it, so coverage at all levels is the distribution of their number
(Deistler et al. 2022, arXiv:2210.04815).
"""

from __future__ import annotations

import numpy as np

from sbi_dist.calibration.finding import Finding, part_of
from sbi_dist.calibration.table import Ranks
from sbi_dist.calibration.uniformity import curve, p_value, radial

__all__ = ["coverage"]


def coverage(ranks: Ranks) -> Finding | None:
    """One part; None where no densities were given.

    The statistic is signed: mean coverage minus mean level, below 0 for over-confidence.
    """
    used = ranks.usable()
    if len(used) and (used.hpd_rank < 0).any():
        return None
    found = curve(used.hpd_rank, ranks.draws)
    # The mean of (rank + 1/2) / (N + 1) is the area above the ECDF.
    area = 0.5 - float(np.mean((used.hpd_rank + 0.5) / (ranks.draws + 1))) if len(used) else 0.0
    return Finding("coverage", [part_of("", area, p_value(found), radial(found))])
