"""C2ST: known answers, scikit-learn's networks, and what does not depend on the company."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

from sbi_dist.calibration.c2st import c2st, c2st_each


def samples(count: int, size: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Normal samples apart by ``shift`` in one direction, on a scale of their own."""
    p, q = np.random.default_rng(seed).standard_normal((2, count, size))
    q[:, 0] += shift
    return 3.0 + 1e-3 * p, 3.0 + 1e-3 * q


def four_sd(rate: float, tosses: int) -> float:
    return 4 * math.sqrt(rate * (1 - rate) / tosses)


def test_it_knows_same_from_other() -> None:
    count = 1000
    # Folds whose training and test share nothing: coin tosses.
    assert abs(c2st(*samples(count, 2, 0.0)) - 0.5) < four_sd(0.5, 2 * count)
    assert c2st(*samples(count, 2, 8.0)) > 0.999


def test_it_is_as_good_as_can_be_for_a_shift() -> None:
    """No classifier tells N(0, 1) from N(1, 1) in more than 69.1 % of cases, Phi(1/2)."""
    best = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    found = c2st(*samples(2000, 2, 1.0))
    assert best - 0.03 < found < best + four_sd(best, 4000)


def test_its_networks_are_those_of_scikit_learn() -> None:
    """As sbibm computes it. The random numbers are others, the mean over data sets is the same."""
    ours, theirs = [], []
    for seed in range(5):
        p, q = samples(400, 2, 0.7, seed)
        q[:, 1] = 3.0 + 1.3 * (q[:, 1] - 3.0)
        ours.append(c2st(p, q))
        x = (np.concatenate([p, q]) - p.mean(0)) / p.std(0, ddof=1)
        network = MLPClassifier((20, 20), max_iter=10_000, random_state=1)
        label = np.repeat([0, 1], 400)
        split = KFold(5, shuffle=True, random_state=1)
        theirs.append(cross_val_score(network, x, label, cv=split).mean())
    differences = np.subtract(ours, theirs)
    # Folds and networks vary: the sd of one difference, from the five.
    assert abs(differences.mean()) < 4 * differences.std(ddof=1) / math.sqrt(5)
    # What both vary by as coin tosses on the same data, at most.
    assert abs(differences).max() < four_sd(0.65, 800)


def test_a_pair_does_not_depend_on_the_others() -> None:
    pairs = [samples(200, 2, shift) for shift in (0.0, 0.5, 3.0)]
    together = c2st_each(pairs)
    assert together == pytest.approx([c2st(p, q) for p, q in pairs], abs=0.01)
    assert together == c2st_each(pairs) and c2st_each([]) == []


def test_what_it_can_not_compare() -> None:
    p, q = samples(20, 2, 0.0)
    with pytest.raises(ValueError, match="shapes"):
        c2st(p, q[:, :1])
    with pytest.raises(ValueError, match="all must have the same"):
        c2st_each([(p, q), (p[:10], q)])
    with pytest.raises(ValueError, match="folds is 1"):
        c2st(p, q, folds=1)
    q[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        c2st(p, q)
