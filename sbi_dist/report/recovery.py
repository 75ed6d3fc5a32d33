"""How well a model recovers known parameters: its posteriors for simulations it did not train on.

Here: which stored simulations those are, and their posteriors in numbers. The picture is in
``plots``, the sentences in ``wording``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sbi_dist.estimation.loop import split
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.report.content import RecoveryFacts
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.shard import ShardRecord

__all__ = ["held_out", "recover"]

_FEWEST, _MOST = 20, 200
# 5 %, 50 % and 95 % of one more than these are whole numbers.
_DRAWS = 299


def recover(
    posterior: Posterior,
    dataset: Dataset,
    records: Mapping[int, ShardRecord],
    *,
    weighted: bool = False,
) -> RecoveryFacts | None:
    """Posteriors of up to 200 simulations that the model was not trained on.

    Args:
        posterior: the model.
        dataset: the simulations that it was trained on.
        records: the records of the dataset's stored shards.
        weighted: whether the draws shown elsewhere are the network's, weighted by a likelihood.

    Returns:
        None where fewer than 20 such simulations are stored.
    """
    about = posterior.about
    theta, x = held_out(dataset, records, about, _MOST)
    if len(theta) < _FEWEST:
        return None
    draws = posterior.sample_batched((_DRAWS,), x, seed=0).double().numpy()
    # A true value that is one more draw lies below this kind of quantile with a probability of
    # exactly 5 %, however few the draws.
    low, median, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0, method="weibull")
    notes = []
    if about["dataset"]["round"] > 1:
        notes.append(
            f"The simulations are those of round {about['dataset']['round']}, from the truncated "
            "prior; they say nothing about parameters outside its box."
        )
    if weighted:
        notes.append("The intervals are the network's alone, without importance weights.")
    return RecoveryFacts(
        truth=theta.astype(np.float64), low=low, median=median, high=high, notes=notes
    )


def held_out(
    dataset: Dataset, records: Mapping[int, ShardRecord], about: dict[str, Any], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``most`` simulations that were held out from a model's training: theta and x.

    Only the shards that hold them are read. Fewer are given where a shard is no longer the one
    that the model was trained on.
    """
    fraction, seed = about["estimator"]["validation_fraction"], about["estimator"]["seed"]
    # What is held out of these first rows is held out of any larger number; so many have ``most``
    # rows held out, and enough of both kinds for `split`.
    rows = math.ceil(max((most + 1) / fraction, 11 / (1 - fraction), 20))
    wanted = split(rows, fraction, seed)[1][:most]
    theta, x = [], []
    start = 0
    for index, digest in about["dataset"]["shards"]:
        if start > wanted[-1] or index not in records or records[index].digest != digest:
            break
        shard = dataset.read(index)
        usable = np.flatnonzero(shard.ok)
        here = wanted[(wanted >= start) & (wanted < start + len(usable))] - start
        theta.append(shard.theta[usable[here]])
        x.append(shard.x[usable[here]])
        start += len(usable)
    if not theta:
        return np.zeros((0, 0)), np.zeros((0, 0))
    return np.concatenate(theta), np.concatenate(x)
