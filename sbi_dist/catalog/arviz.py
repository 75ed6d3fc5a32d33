"""Stored draws of a catalog or of the observed data, as ArviZ has them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from sbi_dist.catalog.infer import PREDICTIVE
from sbi_dist.catalog.table import read_draws
from sbi_dist.errors import InputError
from sbi_dist.posterior.arviz import datatree
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.store import ObjectStore

__all__ = ["stored_as_arviz"]

# Of parameters times draws times observations: half a gigabyte.
_MOST = 2**27


def stored_as_arviz(
    target: ObjectStore,
    observations: int,
    posterior: Posterior,
    num_samples: int,
    prior: np.ndarray,
    observed: np.ndarray | None = None,
) -> Any:
    """What ``infer`` left, draws weighted by a likelihood included, as an ``xarray.DataTree``.

    Args:
        target: its folder.
        observations: how many there are.
        posterior: whose draws they are.
        num_samples: draws of each.
        prior: (M, D) draws of the prior.
        observed: the problem's own data, where the draws are of these.

    Raises:
        InputError: the draws were not kept, are too many for one file, or ArviZ is not installed.
    """
    size = len(posterior.parameter_names)
    if observations * num_samples * size > _MOST:
        raise InputError(
            f"--arviz: {observations:,} observations x {num_samples:,} draws x {size} parameters "
            f"are more than the {_MOST:,} numbers for one file; give fewer --num-samples, or read "
            f"the Parquet files in {target.uri}"
        )
    read = read_draws(target)
    if "draws" not in read.columns:
        raise InputError(
            f"--arviz: {target.uri} has summaries and no draws; use infer.output=samples or both"
        )
    statistics = {}
    for name in ("effective_sample_size", "log_evidence", "out_of_distribution_p"):
        values = read.columns.get(name)
        if values is not None and len(values) == 1 and np.isfinite(values[0]):
            statistics[name] = float(values[0])
    predictive = None
    if observed is not None and target.exists(PREDICTIVE):
        predictive = np.load(io.BytesIO(target.get(PREDICTIVE)), allow_pickle=False)
    return datatree(
        read.draws,
        posterior.parameter_names,
        units=posterior.about.get("parameter_units") or (),
        observed=None if observed is None else np.asarray(observed, dtype=np.float32)[None],
        observations=None if observed is not None else read.ids,
        prior=prior,
        predictive=predictive,
        attributes={
            "experiment": posterior.about.get("experiment"),
            "model": posterior.about.get("model") or posterior.identity,
            **statistics,
        },
    )
