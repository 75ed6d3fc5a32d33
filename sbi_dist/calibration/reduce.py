"""From a block of draws to rows of the table: where theta lies among the draws of its posterior."""

from __future__ import annotations

import numpy as np

from sbi_dist.calibration.reference import Scale
from sbi_dist.calibration.seeded import normal, uniform
from sbi_dist.calibration.table import STATUSES, Ranks, merge

__all__ = ["FAR", "reduce_block"]

# In sd, of the tails that are counted.
FAR = 5.0
# Streams of random numbers: one for each use, then two for each parameter.
_HPD, _TARP, _TARP_DATA, _AVERAGED, _FIRST = range(5)


def reduce_block(
    row: np.ndarray,
    theta: np.ndarray,
    draws: np.ndarray,
    log_q: np.ndarray | None = None,
    log_q_theta: np.ndarray | None = None,
    *,
    scale: Scale,
    reference: np.ndarray | None = None,
    ood: np.ndarray | None = None,
    failed: np.ndarray | None = None,
    seed: int = 0,
) -> Ranks:
    """The table of a block of held-out simulations.

    Memory beyond the block itself is a few times (B, N).

    Args:
        row: (B,) int64 identifiers.
        theta: (B, D).
        draws: (B, N, D) of the posterior of each x, N at least 2.
        log_q: (B, N) log density of the draws; -inf is allowed.
        log_q_theta: (B,) log density of theta.
        scale: of the parameters.
        reference: (B, D) a guess of theta that was made from x and not from theta.
        ood: (B,) p-values, only kept.
        failed: (B,) rows for which no draws were made.
        seed: of ties, random points and the choice of one draw.

    Raises:
        ValueError: shapes that do not agree.
    """
    draws, theta = np.asarray(draws), np.asarray(theta, dtype=np.float64)
    row = np.asarray(row, dtype=np.int64)
    _check(row, theta, draws, log_q, log_q_theta, reference, scale)
    batch, count, size = draws.shape
    status = _status(theta, draws, log_q, log_q_theta, failed)
    good = status == 0
    # Numbers of rows that have no ranks are set to something finite, and taken out at the end.
    theta_in = np.where(good[:, None], theta, 0.0)
    rank, beyond = np.empty((2, batch, size), dtype=np.int32)
    far = np.empty((batch, size), dtype=bool)
    mean, sd, averaged = np.empty((3, batch, size))
    tarp, tarp_data = (_Nearer(batch, count) for _ in range(2))
    chosen = (uniform(seed, row, _AVERAGED) * count).astype(np.int64)
    guess = np.full((batch, size), np.nan) if reference is None else np.asarray(reference, float)
    has_guess = np.isfinite(guess).all(axis=1)
    for each in range(size):
        # Contiguous, so that a row's sums do not depend on how many rows there are.
        values = np.where(good[:, None], draws[:, :, each], 0.0).astype(np.float64, order="C")
        truth = theta_in[:, each]
        ties = uniform(seed, row, _FIRST + 2 * each)
        rank[:, each] = _rank(values, truth, ties)
        mean[:, each], sd[:, each], beyond[:, each], far[:, each] = _moments(values, truth)
        averaged[:, each] = values[np.arange(batch), chosen]
        point = normal(seed, row, _FIRST + 2 * each + 1) * scale.sd[each] + scale.mean[each]
        tarp.add(values, truth, point, scale.sd[each])
        if reference is not None:
            tarp_data.add(values, truth, np.nan_to_num(guess[:, each]), scale.sd[each])
    hpd_rank = np.full(batch, -1, dtype=np.int32)
    if log_q is not None and log_q_theta is not None:
        dense = np.where(good[:, None], log_q, 0.0).astype(np.float64)
        at_theta = np.where(good, log_q_theta, 0.0).astype(np.float64)
        hpd_rank = _rank(-dense, -at_theta, uniform(seed, row, _HPD))
    data_rank = tarp_data.rank(uniform(seed, row, _TARP_DATA))
    bad = ~good
    for floats in (mean, sd, averaged):
        floats[bad] = np.nan
    tarp_rank = tarp.rank(uniform(seed, row, _TARP))
    for integers in (rank, beyond, hpd_rank, tarp_rank):
        integers[bad] = -1
    data_rank[bad | ~has_guess] = -1
    far[bad] = False
    return merge(
        [
            Ranks(
                row=row,
                status=status,
                theta=theta,
                reference=guess,
                mean=mean,
                sd=sd,
                averaged=averaged,
                rank=rank,
                beyond=beyond,
                theta_beyond=far,
                hpd_rank=hpd_rank,
                tarp_rank=tarp_rank,
                tarp_data_rank=data_rank,
                ood=np.full(batch, np.nan) if ood is None else np.asarray(ood, np.float64),
                draws=count,
                seed=seed,
            )
        ]
    )


class _Nearer:
    """Distances of the draws (B, N) and of theta (B,) from a point, squared and in sd."""

    def __init__(self, batch: int, count: int) -> None:
        self.draws, self.theta = np.zeros((batch, count)), np.zeros(batch)

    def add(self, values: np.ndarray, truth: np.ndarray, point: np.ndarray, sd: float) -> None:
        """One parameter more."""
        self.draws += np.square((values - point[:, None]) / sd)
        self.theta += np.square((truth - point) / sd)

    def rank(self, ties: np.ndarray) -> np.ndarray:
        """(B,): draws that are nearer than theta."""
        return _rank(self.draws, self.theta, ties)


def _rank(values: np.ndarray, truth: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """(B,) int32: values (B, N) below the truth; uniform on its place among those equal to it.

    With ``ties`` uniform on (0, 1), the rank of one more draw is uniform on 0..N for discrete
    values too.
    """
    below = (values < truth[:, None]).sum(axis=1)
    equal = (values == truth[:, None]).sum(axis=1)
    return (below + np.floor(ties * (equal + 1))).astype(np.int32)


def _moments(
    values: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and sd (B,) of the values (B, N), values far from the others, whether the truth is.

    Each of the N + 1, the truth among them, is compared with the N others: under a correct
    posterior these N + 1 are exchangeable, and so is which of them are far.
    """
    count = values.shape[1]
    mean = values.mean(axis=1)
    deviations = values - mean[:, None]
    squares = np.square(deviations).sum(axis=1)
    sd = np.sqrt(squares / (count - 1))
    # Deviations from the mean of all N + 1, and the sum of their squares.
    shift = (truth - mean) / (count + 1)
    total = squares + (truth - mean) * shift * count
    limit = FAR**2 / (count - 1)
    stretch = (count + 1) / count

    def is_far(from_mean: np.ndarray, all_squares: np.ndarray) -> np.ndarray:
        # Without this one, the others' mean is this much farther, their squares that much less.
        return np.square(stretch * from_mean) > limit * (
            all_squares - stretch * np.square(from_mean)
        )

    beyond = is_far(deviations - shift[:, None], total[:, None]).sum(axis=1)
    far = np.square(truth - mean) > FAR**2 * np.square(sd)
    return mean, sd, beyond, far


def _status(
    theta: np.ndarray,
    draws: np.ndarray,
    log_q: np.ndarray | None,
    log_q_theta: np.ndarray | None,
    failed: np.ndarray | None,
) -> np.ndarray:
    """(B,) uint8: the first of ``STATUSES`` that is true of a row."""
    status = np.zeros(len(theta), dtype=np.uint8)
    if log_q is not None and log_q_theta is not None:
        # NaN and +inf are neither above nor below; -inf only says that there is no density.
        known = (log_q < np.inf).all(axis=1) & (np.asarray(log_q_theta) < np.inf)
        status[~known] = STATUSES.index("log_q")
    status[~np.isfinite(draws).all(axis=(1, 2))] = STATUSES.index("draws")
    status[~np.isfinite(theta).all(axis=1)] = STATUSES.index("theta")
    if failed is not None:
        status[np.asarray(failed, dtype=bool)] = STATUSES.index("failed")
    return status


def _check(
    row: np.ndarray,
    theta: np.ndarray,
    draws: np.ndarray,
    log_q: np.ndarray | None,
    log_q_theta: np.ndarray | None,
    reference: np.ndarray | None,
    scale: Scale,
) -> None:
    if draws.ndim != 3 or draws.shape[1] < 2:
        raise ValueError(f"draws have shape {draws.shape}; allowed: (B, N, D) with N at least 2")
    batch, count, size = draws.shape
    if (log_q is None) != (log_q_theta is None):
        raise ValueError("log_q and log_q_theta are given together or not at all")
    shapes = {
        "row": (row, (batch,)),
        "theta": (theta, (batch, size)),
        "log_q": (log_q, (batch, count)),
        "log_q_theta": (log_q_theta, (batch,)),
        "reference": (reference, (batch, size)),
        "scale.sd": (scale.sd, (size,)),
    }
    for name, (array, shape) in shapes.items():
        if array is not None and np.shape(array) != shape:
            raise ValueError(f"{name} has shape {np.shape(array)}; with these draws: {shape}")
