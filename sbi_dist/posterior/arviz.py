"""Draws as ArviZ has them: a DataTree of posterior, prior and observed data, with names and units.

ArviZ (Kumar et al. 2019, JOSS 4(33), 1143) plots, compares and summarizes posteriors of whatever
made them. Its package is optional: ``pip install 'sbi_dist[arviz]'``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sbi_dist import __version__
from sbi_dist.errors import InputError

__all__ = ["check_writable", "datatree", "require", "write"]

_DIMENSIONS = {"chain", "draw", "observation"}
_INSTALL = "`pip install 'sbi_dist[arviz]'`, or arviz-base, h5netcdf and h5py"


def require() -> ModuleType:
    """The module ``arviz_base``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import arviz_base
    except ImportError as error:
        raise InputError(f"ArviZ is needed for this and not installed; {_INSTALL}") from error
    return arviz_base


def datatree(
    draws: np.ndarray,
    names: Sequence[str],
    *,
    units: Sequence[str | None] = (),
    observed: np.ndarray | None = None,
    observations: Sequence[str] | None = None,
    prior: np.ndarray | None = None,
    predictive: np.ndarray | None = None,
    statistics: Mapping[str, np.ndarray] | None = None,
    chains: int = 1,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """An ``xarray.DataTree`` in ArviZ's schema.

    A variable for each parameter; with ``observations`` each has that dimension too, else the one
    observation has none.

    Args:
        draws: (B, N, D) of B observations.
        names: D names.
        units: D units, kept as attributes; empty where there are none.
        observed: (B, *x_shape), the variable ``x`` of the group ``observed_data``.
        observations: B names; None for one observation.
        prior: (M, D), the group ``prior``.
        predictive: (P, *x_shape) simulations from draws of the one observation, the group
            ``posterior_predictive``.
        statistics: of each draw, (B, N) by name, the group ``sample_stats``.
        chains: the draws are independent, so that they make as many chains as one likes.
        attributes: of the posterior; numbers and text.

    Raises:
        InputError: ArviZ is not installed, ``chains`` does not divide N, names of parameters are
            alike or those of dimensions, or several observations have no names.
    """
    arviz_base = require()
    draws = np.asarray(draws)
    batch, count, size = draws.shape
    # A slash would part groups of the tree.
    written = [str(name).replace("/", "_") for name in names]
    if len(set(written)) != size or set(written) & _DIMENSIONS:
        raise InputError(
            f"parameter names are {list(names)}; ArviZ needs {size} different ones, none of them "
            f"{', '.join(sorted(_DIMENSIONS))}"
        )
    if chains < 1 or count % chains:
        raise InputError(f"chains is {chains}; it must be 1 or more, and divide {count} draws")
    if observations is None and batch != 1:
        raise InputError(f"observations have no names; there must be {batch}")

    def by_chain(values: np.ndarray) -> np.ndarray:
        """(B, N) as (chain, draw) or (chain, draw, B)."""
        parted = values.T.reshape(chains, count // chains, batch)
        return parted[..., 0] if observations is None else parted

    along = [] if observations is None else ["observation"]
    posterior = {name: by_chain(draws[:, :, each]) for each, name in enumerate(written)}
    groups: dict[str, dict[str, np.ndarray]] = {"posterior": posterior}
    dims = dict.fromkeys(posterior, along)
    if statistics:
        groups["sample_stats"] = {
            name: by_chain(np.asarray(values)) for name, values in statistics.items()
        }
        dims |= dict.fromkeys(statistics, along)
    if prior is not None:
        groups["prior"] = {name: np.asarray(prior)[None, :, i] for i, name in enumerate(written)}
    if predictive is not None:
        groups["posterior_predictive"] = {"x": np.asarray(predictive)[None]}
    if observed is not None:
        groups["observed_data"] = {"x": observed[0] if observations is None else observed}
    about = {
        "inference_library": "sbi_dist",
        "inference_library_version": __version__,
        **{name: value for name, value in (attributes or {}).items() if value is not None},
    }
    coordinates = {} if observations is None else {"observation": list(observations)}
    trees = {}
    # One by one: a parameter and its prior may have other dimensions by the same name.
    for name, group in groups.items():
        of_group = {key: dims[key] for key in group if key in dims and name != "prior"}
        if name == "observed_data":
            of_group = {"x": [*along, *(f"x_dim_{i}" for i in range(group["x"].ndim - len(along)))]}
        kept = coordinates if name not in ("prior", "posterior_predictive") else {}
        tree = arviz_base.from_dict(
            {name: group},
            dims=of_group,
            coords=kept,
            attrs={name: about},
            sample_dims=["chain", "draw"] if name != "observed_data" else None,
        )
        trees[name] = tree[name].to_dataset()
        if name in ("posterior", "prior"):
            for each, key in enumerate(written):
                attrs = trees[name][key].attrs
                attrs["long_name"] = str(names[each])
                if each < len(units) and units[each]:
                    attrs["units"] = units[each]
    from xarray import DataTree

    return DataTree.from_dict({f"/{name}": each for name, each in trees.items()})


def check_writable(path: str) -> None:
    """Check that :func:`write` will find what it needs.

    Raises:
        InputError: it will not, or the path is that of a store.
    """
    if "://" in path:
        raise InputError(f"--arviz is {path!r}; it must be a file of this machine, as draws.nc")
    require()
    for name in ("h5netcdf", "h5py"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is needed for netCDF files and not installed; {_INSTALL}")


def write(tree: Any, path: str) -> None:
    """Write a netCDF file, which ``xarray.open_datatree`` reads.

    Raises:
        InputError: h5netcdf is not installed, or the file can't be written.
    """
    check_writable(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tree.to_netcdf(path, engine="h5netcdf")
    except OSError as error:
        raise InputError(
            f"{path!r} can't be written ({error.strerror or error}); give another file"
        ) from error
