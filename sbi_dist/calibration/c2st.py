"""Classifier two-sample test: how well a classifier tells two samples apart, 0.5 to 1.

Lopez-Paz and Oquab 2017, arXiv:1610.06545, in the form of the SBI benchmark (Lueckmann et al. 2021,
arXiv:2101.04653): both samples standardized by the first one, a network of two hidden layers of
10 D units, accuracy in five-fold cross-validation. ``sbibm`` trains its networks with scikit-learn,
one after another; here those of all folds of several pairs are trained side by side, by the same
rules (see ``classifier.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sbi_dist.calibration.classifier import fit_classifiers, scores

__all__ = ["c2st", "c2st_each"]


def c2st(p: np.ndarray, q: np.ndarray, seed: int = 1, folds: int = 5) -> float:
    """Mean accuracy of telling p from q, in cross-validation; 0.5 where they are alike.

    Args:
        p: (M, D) draws, by whose mean and sd both are standardized: those of the reference.
        q: (M', D) draws. Where M' is not M, the larger class alone gives more than 0.5.
        seed: of the folds and of the networks.
        folds: of the cross-validation.

    Raises:
        ValueError: shapes that do not agree, or numbers that are not finite.
    """
    return c2st_each([(p, q)], seed, folds)[0]


def c2st_each(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 1, folds: int = 5
) -> list[float]:
    """:func:`c2st` of several pairs of the same shapes, trained side by side.

    The random numbers of a pair do not depend on the others, its result only to rounding.
    """
    if not pairs:
        return []
    shapes = {(np.shape(p), np.shape(q)) for p, q in pairs}
    if len(shapes) > 1:
        raise ValueError(f"pairs have shapes {sorted(shapes)}; all must have the same")
    x, label = zip(*(_labelled(p, q) for p, q in pairs), strict=True)
    rows, size = x[0].shape
    if not 2 <= folds <= rows:
        raise ValueError(f"folds is {folds}; it must be from 2 to the number of draws, {rows}")
    generators = [torch.Generator().manual_seed(seed) for _ in pairs]
    # Of the rows that folds of equal length leave over, each is in no fold.
    held = [
        torch.randperm(rows, generator=each)[: rows // folds * folds].view(folds, -1)
        for each in generators
    ]
    train = [torch.cat([each[:k], each[k + 1 :]]).flatten() for each in held for k in range(folds)]
    test = [fold for each in held for fold in each]

    def of(values: Sequence[Tensor], chosen: list[Tensor]) -> Tensor:
        return torch.stack([values[k // folds][some] for k, some in enumerate(chosen)])

    hidden = 10 * size
    weights = fit_classifiers(of(x, train), of(label, train), hidden, generators)
    right = (scores(weights, of(x, test), hidden) > 0) == (of(label, test) > 0.5)
    return right.double().mean(1).view(len(pairs), folds).mean(1).tolist()


def _labelled(p: np.ndarray, q: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both samples standardized, float32 (M + M', D), and 0 or 1 for each row."""
    if np.ndim(p) != 2 or np.ndim(q) != 2 or p.shape[1] != q.shape[1]:
        raise ValueError(
            f"samples have shapes {np.shape(p)} and {np.shape(q)}; allowed: (M, D) and (M', D)"
        )
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise ValueError("a sample has numbers that are not finite")
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    mean, sd = p.mean(0), p.std(0, ddof=1)
    sd[sd == 0] = 1.0  # the benchmark divides by 0
    x = (np.concatenate([p, q]) - mean) / sd
    label = np.concatenate([np.zeros(len(p)), np.ones(len(q))])
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(label.astype(np.float32))
