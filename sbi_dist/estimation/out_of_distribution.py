"""How unlike the simulations an observation is: a score, and its rank among held-out simulations.

Amortized inference is only to be trusted for observations like those of the training; elsewhere
the simulator is wrong about the world, or the network was never shown the place (Schmitt et al.
2023, arXiv:2112.08866, who compare summaries of observations with those of simulations).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble, Estimator
from sbi_dist.estimation.scatter import LARGEST, Scatter

__all__ = ["OutOfDistribution"]

# Held-out scores that are kept: the largest, of which all count, and as many below them.
_KEPT = 500
_CHUNK_FLOATS, _CHUNK_ROWS = 1 << 16, 4096
# What the embedding network is shown at most, in sd: beyond, it may overflow, and x itself tells.
_SHOWN = 1e4
_TINY = float(torch.finfo(torch.float32).tiny)


@dataclasses.dataclass(frozen=True)
class OutOfDistribution:
    """What simulations of x are like, and the scores of simulations that were held out.

    The score is a squared Mahalanobis distance from the training simulations, in units of its
    median over held-out simulations: half of these have a score below 1. The distance is that of
    standardized x, in its leading principal components and the length of the rest
    (:class:`Scatter`); where an embedding network summarizes x, the mean of that and of the same
    of the network's output, which is the space that the flow is conditioned on (Lee et al. 2018,
    arXiv:1807.03888, for classifiers). Either alone would not do. A network is free to map what
    it was never shown into the midst of the rest ("feature collapse", van Amersfoort et al. 2021,
    arXiv:2102.11409), so x has a say of its own. But x of many noisy numbers hides departures in
    the summaries that inference rests on, such as a mean over trials that no parameters give.

    The p-value is (1 + number of held-out simulations of at least this score) / (1 + their
    number): a conformal p-value. For an observation that is a draw of the simulations' own
    distribution it is at most a with probability a at most, whatever their distribution and
    however crude the score, as the held-out simulations had no part in the distances (Vovk et al.
    2005; Bates et al. 2023, arXiv:2104.08279); all that a network knows of them is when its
    training stopped. It is never below 1 / (1 + number): where only 5 of 50 simulations are held
    out it is 1/6 for any outlier, and the score alone tells. Not seen is what lies in a hole in
    the midst of the simulations, or has less noise than these, or noise of another shape alone.

    Attributes:
        spaces: the scatter of standardized x, and that of the embedding network's output, if any.
        typical: the distance that has score 1.
        scores: (K,) float64, ascending: of held-out simulations.
        ranks: (K,) int64: how many held-out simulations come before each of these.
        simulations: number of held-out simulations, those that are not kept included.
    """

    spaces: tuple[Scatter, ...]
    typical: float
    scores: Tensor
    ranks: Tensor
    simulations: int

    @classmethod
    def fit(cls, estimator: Estimator, training: Tensor, held_out: Tensor) -> OutOfDistribution:
        """Fit to simulations.

        Args:
            estimator: the trained one; of an ensemble, its first member stands for all.
            training: x of training simulations, float32 (N, *x_shape), N >= 1.
            held_out: x of simulations that the estimator was not trained on, (M, *x_shape),
                M >= 1.
        """
        member = _member(estimator)
        chunks = [_vectors(member, rows) for rows in _chunks(training)]
        spaces = tuple(Scatter.fit(torch.cat(each)) for each in zip(*chunks, strict=True))
        count = len(held_out)
        fitted = cls(spaces, 1.0, torch.empty(0), torch.empty(0), count)
        scores = fitted._scores(member, held_out).sort().values
        typical = float(scores[count // 2]) or 1.0  # 0 where all simulations are the same
        ranks = torch.arange(count)
        below = count - _KEPT
        if below > _KEPT:
            # The tail is what p-values of interest are read from.
            some = torch.arange(_KEPT) * below // _KEPT
            ranks = torch.cat([some, ranks[below:]])
        scores = scores[ranks] / typical
        return dataclasses.replace(fitted, typical=typical, scores=scores, ranks=ranks)

    def evaluate(self, estimator: Estimator, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Scores and p-values of observations, float32 (B,) each.

        Between held-out scores that are not kept a p-value is rounded up.

        Args:
            estimator: the one that this was fitted with.
            x: (B, *x_shape), float32. Both results are NaN where a value is not finite.
        """
        scores = self._scores(_member(estimator), x)
        above = torch.cat([torch.tensor([self.simulations]), self.simulations - 1 - self.ranks])
        p_values = (1.0 + above) / (1.0 + self.simulations)
        found = p_values[torch.searchsorted(self.scores, scores)]
        found[scores.isnan()] = math.nan
        largest = torch.finfo(torch.float32).max
        return scores.clamp_(max=largest).float().numpy(), found.float().numpy()

    def _scores(self, member: DensityEstimator, x: Tensor) -> Tensor:
        """Float64 (B,), and NaN where x is not finite."""
        scores = torch.empty(len(x), dtype=torch.float64)
        first = 0
        for rows in _chunks(x):
            total = torch.zeros(len(rows), dtype=torch.float64)
            for space, vectors in zip(self.spaces, _vectors(member, rows), strict=True):
                total += space.distance(vectors)
            total[~torch.isfinite(rows).reshape(len(rows), -1).all(1)] = math.nan
            scores[first : first + len(rows)] = total
            first += len(rows)
        return scores.div_(len(self.spaces) * self.typical)

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data; :meth:`from_data` is the inverse."""
        return {
            "spaces": [space.to_data() for space in self.spaces],
            "typical": self.typical,
            "scores": self.scores.tolist(),
            "ranks": self.ranks.tolist(),
            "simulations": self.simulations,
        }

    @classmethod
    def from_data(cls, data: dict[str, Any], estimator: Estimator) -> OutOfDistribution:
        """Read what :meth:`to_data` gave.

        Raises:
            ValueError, TypeError, LookupError or ArithmeticError: it is no such data, or it does
                not fit the estimator.
        """
        sizes = _sizes(_member(estimator))
        if len(data["spaces"]) != len(sizes):
            raise ValueError(f"out_of_distribution has {len(data['spaces'])} spaces")
        spaces = tuple(map(Scatter.from_data, data["spaces"], sizes))
        scores = torch.tensor(data["scores"], dtype=torch.float64)
        ranks = torch.tensor(data["ranks"], dtype=torch.int64)
        count, typical = data["simulations"], float(data["typical"])
        if (
            not isinstance(count, int)
            or not 0 < typical < math.inf
            or scores.ndim != 1
            or scores.shape != ranks.shape
            or not 1 <= len(scores) <= count < 2**53
            or not bool(torch.isfinite(scores).all() and (scores[0] >= 0))
            or not bool((scores.diff() >= 0).all() and (ranks.diff() > 0).all())
            or int(ranks[0]) != 0
            or int(ranks[-1]) != count - 1
        ):
            raise ValueError("out_of_distribution holds no ranked scores")
        return cls(spaces, typical, scores, ranks, count)


def _member(estimator: Estimator) -> DensityEstimator:
    return estimator.members[0] if isinstance(estimator, Ensemble) else estimator


def _sizes(member: DensityEstimator) -> list[int]:
    """Lengths of the vectors that :func:`_vectors` gives."""
    embedded = member.options.embedding != "none"
    return [math.prod(member.x_shape)] + [member.options.embedding_features] * embedded


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_FLOATS // max(1, math.prod(x.shape[1:]))))
    return x.split(rows) if len(x) else ()


@torch.no_grad()
def _vectors(member: DensityEstimator, x: Tensor) -> list[Tensor]:
    """x (B, *x_shape) in each space: float64 (B, C), none beyond ``LARGEST``."""
    standardization = member.standardization
    standardized = standardization.x(x)
    vectors = [standardized.reshape(len(x), -1).double()]
    if standardization.x_scale == "log":
        # The network takes what is below all that was simulated for the smallest that was. Not so
        # here: the logarithm goes on as a straight line, also below 0.
        low = standardization.x_low
        beyond = (x.double() / low - 1).clamp_(max=0) / standardization.x_sd
        vectors[0] += torch.where(low > _TINY, beyond, 0.0).reshape(len(x), -1)
    if member.options.embedding != "none":
        shown = standardized.clamp(-_SHOWN, _SHOWN)
        vectors.append(member.flow.embedding(shown).double().nan_to_num_(nan=LARGEST))
    return [each.clamp_(-LARGEST, LARGEST) for each in vectors]
