"""What a test finds: numbers, before anyone judges them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sbi_dist.calibration.uniformity import Deviation

__all__ = ["BOUNDS", "Finding", "Part", "part_of"]

# Effects from which a significant deviation fails, in probability of a credible region. A central
# interval of a Gaussian posterior that is 10 % too narrow holds 0.05 less than it says, one that
# is 20 % too wide 0.08 more: claiming more than is known costs more than claiming less, and is
# allowed half as much. A shift by 1/8 sd moves one-sided limits by 0.05.
BOUNDS = {"over": 0.05, "under": 0.08, "bias": 0.05}


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing tested: a parameter, or the whole posterior.

    Attributes:
        name: of the parameter; empty for the whole posterior.
        statistic: as the test defines it.
        p_value: corrected for the number of parts; None where there is no hypothesis.
        kind: which way it deviates most, compared with the bound: a key of ``wording``.
        effect: how much, at least 0.
        bound: of the effect.
        more: other numbers to report.
    """

    name: str
    statistic: float
    p_value: float | None
    kind: str
    effect: float
    bound: float
    more: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    @property
    def severity(self) -> float:
        """The effect in units of its bound."""
        return self.effect / self.bound


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one test.

    Attributes:
        name: of the test.
        parts: at least one.
        meets_bound: the verdict of a part whose effect reaches its bound without a p-value.
    """

    name: str
    parts: Sequence[Part]
    meets_bound: str = "warn"


def part_of(
    name: str,
    statistic: float,
    p_value: float,
    deviation: Deviation,
    more: Mapping[str, float | None] | None = None,
) -> Part:
    """A part whose effect is the deviation of ranks that is worst in units of its bound."""
    effects = {"over": deviation.over, "under": deviation.under, "bias": abs(deviation.bias)}
    kind = max(effects, key=lambda each: effects[each] / BOUNDS[each])
    if kind == "bias":
        label = "bias_high" if deviation.bias > 0 else "bias_low"
    else:
        label = kind
    return Part(name, statistic, p_value, label, effects[kind], BOUNDS[kind], more or {})
