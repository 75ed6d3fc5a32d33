"""Priors over a parameter vector theta of D components.

Any ``torch.distributions.Distribution`` with a continuous support is a prior. Here are the ones
that torch lacks (:class:`BoxUniform`, :class:`Product`, :class:`Truncated`), what the other rooms
need of a prior (:func:`as_prior`, :func:`support_bounds`), and priors as plain data, which is how
a model bundle keeps them. The map from a prior's support to R^D is in ``bijection.py``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LogNormal, Normal, Uniform, constraints
from torch.special import ndtri

from sbi_dist.errors import InputError

__all__ = [
    "BoxUniform",
    "Product",
    "Truncated",
    "as_prior",
    "describe",
    "prior_from_data",
    "prior_to_data",
    "sample_prior",
    "support_bounds",
    "truncate",
]


class BoxUniform(Independent):
    """Uniform density on the box [low, high] of R^D.

    Args:
        low: lower corner, shape (D,).
        high: upper corner, shape (D,).
        reinterpreted_batch_ndims: as in ``torch.distributions.Independent``.

    Raises:
        InputError: corners of different shapes, not finite, or low >= high.
    """

    def __init__(
        self,
        low: Tensor | Sequence[float],
        high: Tensor | Sequence[float],
        reinterpreted_batch_ndims: int = 1,
    ) -> None:
        lower = torch.atleast_1d(torch.as_tensor(low, dtype=torch.get_default_dtype()))
        upper = torch.atleast_1d(torch.as_tensor(high, dtype=torch.get_default_dtype()))
        if lower.shape != upper.shape:
            raise InputError(
                f"prior: BoxUniform low has shape {tuple(lower.shape)} and high "
                f"{tuple(upper.shape)}; they must be equal"
            )
        if not bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
            raise InputError("prior: BoxUniform low and high must be finite numbers")
        if not bool((lower < upper).all()):
            raise InputError(
                f"prior: BoxUniform low {lower.tolist()} must be below high {upper.tolist()} "
                "in every component"
            )
        box = Uniform(lower, upper, validate_args=False)
        super().__init__(box, reinterpreted_batch_ndims, validate_args=False)


class Truncated(Distribution):
    """A univariate distribution restricted to [low, high] and normalized there.

    p(t) = base(t) / (F(high) - F(low)) for low <= t <= high, with F the base's distribution
    function. Drawn by inversion, so that no draw is ever rejected. A Normal or LogNormal may be
    cut anywhere in its tails; torch's distribution functions of the others round to about 1e-16,
    so that the interval must hold a mass of 1e-12.

    Args:
        base: univariate distribution (batch and event shape ``()``) with ``cdf`` and ``icdf``.
        low, high: bounds; infinite ones are allowed.

    Raises:
        InputError: base is not univariate or has no ``cdf`` or ``icdf``, low >= high, or the
            interval holds too little mass.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, base: Distribution, low: float = -math.inf, high: float = math.inf) -> None:
        if base.batch_shape != () or base.event_shape != ():
            raise InputError(
                f"prior: Truncated takes a univariate distribution; {type(base).__name__} has "
                f"batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}"
            )
        self.base, self.low, self.high = base, float(low), float(high)
        if not self.low < self.high:
            raise InputError(f"prior: Truncated low {low} must be below high {high}")
        base_low, base_high = (float(b[0]) for b in support_bounds(_vector(base)))
        self.low, self.high = max(self.low, base_low), min(self.high, base_high)
        if not self.low < self.high:
            raise InputError(
                f"prior: Truncated to [{low}, {high}] leaves nothing of the support of "
                f"{type(base).__name__}, [{base_low}, {base_high}]"
            )
        try:
            median = float(base.icdf(torch.tensor(0.5)))
            self._upper = self.low > median
            start, end = (
                float(self._level(torch.tensor(bound, dtype=torch.float64)))
                for bound in (self.low, self.high)
            )
        except NotImplementedError as error:
            raise InputError(
                f"prior: {type(base).__name__} can't be truncated, as torch has no distribution "
                "function of it or no inverse of that"
            ) from error
        self._start, self._span = start, end - start
        smallest = 1e-300 if isinstance(base, _ACCURATE) else 1e-12
        if not abs(self._span) >= smallest:
            raise InputError(
                f"prior: {type(base).__name__} has a mass of {abs(self._span):.1g} between "
                f"{self.low} and {self.high}, less than {smallest:g}; give bounds that hold more"
            )
        super().__init__(validate_args=False)

    def _level(self, value: Tensor) -> Tensor:
        """The base's F(value); of a normal cut above its median 1 - F, which keeps its digits."""
        if not isinstance(self.base, _ACCURATE):
            return self.base.cdf(value)
        line = value.log() if isinstance(self.base, LogNormal) else value
        score = (line - self.base.loc.double()) / self.base.scale.double()
        # torch's ndtr rounds to 1e-16, its erfc in proportion.
        return 0.5 * torch.erfc((score if self._upper else -score) / math.sqrt(2))

    def _at_level(self, level: Tensor) -> Tensor:
        if not isinstance(self.base, _ACCURATE):
            return self.base.icdf(level)
        score = -ndtri(level) if self._upper else ndtri(level)
        line = self.base.loc.double() + self.base.scale.double() * score
        return line.exp() if isinstance(self.base, LogNormal) else line

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        if math.isinf(self.low) and math.isinf(self.high):
            return constraints.real
        if math.isinf(self.high):
            return constraints.greater_than_eq(self.low)
        if math.isinf(self.low):
            return constraints.less_than(self.high)
        return constraints.interval(self.low, self.high)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        uniform = torch.rand(torch.Size(sample_shape), dtype=torch.float64)
        return self.icdf(uniform).to(torch.get_default_dtype())

    def log_prob(self, value: Tensor) -> Tensor:
        value = torch.as_tensor(value)
        inside = (value >= self.low) & (value <= self.high)
        anchor = torch.as_tensor(float(self.icdf(torch.tensor(0.5, dtype=torch.float64))))
        density = self.base.log_prob(torch.where(inside, value, anchor.to(value)))
        return torch.where(inside, density - math.log(abs(self._span)), -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        clamped = torch.as_tensor(value, dtype=torch.float64).clamp(self.low, self.high)
        return (self._level(clamped) - self._start) / self._span

    def icdf(self, value: Tensor) -> Tensor:
        level = self._start + self._span * torch.as_tensor(value, dtype=torch.float64)
        # Rounding must not put a draw outside the bounds.
        return self._at_level(level).clamp(self.low, self.high)


# Bases whose distribution function is computed here, exact in both tails.
_ACCURATE = (Normal, LogNormal)


class Product(Distribution):
    """Independent blocks of parameters: p(theta) = prod_k p_k(theta_k).

    Args:
        blocks: distributions of scalars or vectors, in the order of theta's components.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, blocks: Sequence[Distribution]) -> None:
        if not blocks:
            raise InputError("prior: Product needs at least one distribution")
        self.blocks = [_vector(block) for block in blocks]
        self.sizes = [int(block.event_shape[0]) for block in self.blocks]
        super().__init__(event_shape=torch.Size([sum(self.sizes)]), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:
        return constraints.cat([block.support for block in self.blocks], dim=-1, lengths=self.sizes)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return torch.cat([block.sample(torch.Size(sample_shape)) for block in self.blocks], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = torch.as_tensor(value).split(self.sizes, dim=-1)
        return torch.stack([b.log_prob(p) for b, p in zip(self.blocks, parts, strict=True)]).sum(0)


def as_prior(prior: Any) -> Distribution:
    """The prior as one distribution of a vector: batch shape ``()``, event shape (D,).

    Takes a torch distribution of a vector, of a scalar (D = 1), a batch of scalars (made
    independent), or a sequence of distributions (their product).

    Raises:
        InputError: not a distribution, discrete, or of another shape.
    """
    if isinstance(prior, (list, tuple)):
        for block in prior:
            if not isinstance(block, Distribution):
                raise InputError(f"prior: {block!r} is not a torch distribution")
        prior = Product(list(prior))
    if not isinstance(prior, Distribution):
        raise InputError(
            f"prior: {type(prior).__name__} is not a torch.distributions.Distribution "
            "(or a sequence of them); give one, such as BoxUniform(low, high)"
        )
    prior = _vector(prior)
    support_bounds(prior)
    return prior


def _vector(prior: Distribution) -> Distribution:
    if prior.event_shape == () and prior.batch_shape == ():
        return Independent(_expanded(prior), 1, validate_args=False)
    if prior.event_shape == () and len(prior.batch_shape) == 1:
        return Independent(prior, 1, validate_args=False)
    if prior.batch_shape != () or len(prior.event_shape) != 1:
        raise InputError(
            f"prior: {type(prior).__name__} has batch shape {tuple(prior.batch_shape)} and event "
            f"shape {tuple(prior.event_shape)}; a prior is a distribution of one vector"
        )
    return prior


class _Single(Distribution):
    """A univariate distribution seen as a batch of one, for those that can't ``expand``."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Distribution) -> None:
        self.base = base
        super().__init__(batch_shape=torch.Size([1]), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return self.base.support

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base.sample(torch.Size([*sample_shape, 1]))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


def _expanded(prior: Distribution) -> Distribution:
    if isinstance(prior, Truncated):
        return _Single(prior)
    return prior.expand(torch.Size([1]))


def sample_prior(prior: Distribution, count: int) -> np.ndarray:
    """``count`` draws, shape (count, D), float32, from torch's global generator."""
    draws = prior.sample(torch.Size([count]))
    return np.ascontiguousarray(torch.as_tensor(draws).detach().cpu().numpy(), dtype=np.float32)


def support_bounds(prior: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of each component's support, float64 of shape (D,); may be infinite.

    Raises:
        InputError: the support is discrete, unknown, or no product of intervals (a simplex, say).
    """
    size = int(prior.event_shape[0]) if prior.event_shape else int(prior.batch_shape[0])
    low, high = _bounds(getattr(prior, "support", None), size, prior)
    return low, high


def _bounds(constraint: Any, size: int, prior: Distribution) -> tuple[np.ndarray, np.ndarray]:
    def filled(low: Any, high: Any) -> tuple[np.ndarray, np.ndarray]:
        low, high = (np.asarray(torch.as_tensor(b).cpu(), dtype=np.float64) for b in (low, high))
        return np.broadcast_to(low, size).copy(), np.broadcast_to(high, size).copy()

    kind = type(constraint).__name__
    if kind in ("_IndependentConstraint", "_Independent", "independent"):
        return _bounds(constraint.base_constraint, size, prior)
    if kind in ("_Cat", "cat"):
        parts = [
            _bounds(part, length, prior)
            for part, length in zip(constraint.cseq, constraint.lengths, strict=True)
        ]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    if kind in ("_Stack", "stack"):
        parts = [_bounds(part, 1, prior) for part in constraint.cseq]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    if constraint is not None and not getattr(constraint, "is_discrete", False):
        if kind in ("_Real", "_RealVector"):
            return filled(-math.inf, math.inf)
        if hasattr(constraint, "lower_bound") and hasattr(constraint, "upper_bound"):
            return filled(constraint.lower_bound, constraint.upper_bound)
        if hasattr(constraint, "lower_bound"):
            return filled(constraint.lower_bound, math.inf)
        if hasattr(constraint, "upper_bound"):
            return filled(-math.inf, constraint.upper_bound)
    raise InputError(
        f"prior: the support of {type(prior).__name__} is {constraint}; allowed are continuous "
        "supports made of intervals, half-lines and lines (express the parameters in such "
        "coordinates)"
    )


# ---- priors as data -------------------------------------------------------------------------

_PLAIN = (
    "Beta Cauchy Chi2 Exponential FisherSnedecor Gamma Gumbel HalfCauchy HalfNormal InverseGamma "
    "Kumaraswamy Laplace LogNormal Normal Pareto StudentT Uniform VonMises Weibull"
).split()


def prior_to_data(prior: Distribution) -> dict[str, Any]:
    """The prior as JSON-ready data; :func:`prior_from_data` is its inverse.

    A distribution that is not torch's own (nor one of this module) is kept as ``opaque``: its
    description and bounds, enough to use a posterior but not to draw from the prior again.
    """
    if isinstance(prior, BoxUniform):
        base = prior.base_dist
        return {"kind": "BoxUniform", "low": base.low.tolist(), "high": base.high.tolist()}
    if isinstance(prior, Truncated):
        return {
            "kind": "Truncated",
            "base": prior_to_data(prior.base),
            "low": None if math.isinf(prior.low) else prior.low,
            "high": None if math.isinf(prior.high) else prior.high,
        }
    if isinstance(prior, Product):
        return {"kind": "Product", "blocks": [prior_to_data(block) for block in prior.blocks]}
    if isinstance(prior, _Single):
        return prior_to_data(prior.base)
    if isinstance(prior, Independent):
        return {"kind": "Independent", "base": prior_to_data(prior.base_dist)}
    if type(prior) is torch.distributions.MultivariateNormal:
        return {
            "kind": "MultivariateNormal",
            "loc": prior.loc.tolist(),
            "scale_tril": prior.scale_tril.tolist(),
        }
    name = type(prior).__name__
    if name in _PLAIN and type(prior) is getattr(torch.distributions, name):
        arguments = {key: getattr(prior, key).tolist() for key in prior.arg_constraints}
        return {"kind": name, **arguments}
    low, high = support_bounds(_vector(prior))
    return {
        "kind": "opaque",
        "description": str(prior)[:200],
        "low": [None if math.isinf(b) else b for b in low.tolist()],
        "high": [None if math.isinf(b) else b for b in high.tolist()],
    }


def prior_from_data(data: dict[str, Any], parameters: int | None = None) -> Distribution | None:
    """The prior that :func:`prior_to_data` described; None where it, or a part, is ``opaque``.

    Args:
        data: of a prior, whoever wrote it.
        parameters: D, where it is known.

    Raises:
        InputError: the data names no known prior, or one of another number of parameters.
    """
    try:
        kinds = [part["kind"] for part in _parts(data, _DEEPEST)]
        if parameters is not None and len(kinds) > _DEEPEST * parameters:
            raise ValueError(f"it has {len(kinds):,} parts")
        prior = None if "opaque" in kinds else as_prior(_from_data(data))
        if prior is not None and parameters not in (None, prior.event_shape[0]):
            raise ValueError(f"it has {prior.event_shape[0]} parameters, the model {parameters}")
        return prior
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        shown = _SHORT.repr(data)
        raise InputError(f"prior: {shown:.200} does not describe a prior ({error})") from error


# Of the parts of a prior, one in another: data of a stranger might go on for ever.
_DEEPEST = 16
_SHORT = reprlib.Repr()


def _parts(data: dict[str, Any], deep: int) -> Iterator[dict[str, Any]]:
    """A prior's data, and those of all that it is made of."""
    if not deep:
        raise ValueError("its parts are too deep in each other")
    yield data
    for part in [data["base"]] if "base" in data else data.get("blocks", []):
        yield from _parts(part, deep - 1)


def _from_data(data: dict[str, Any]) -> Distribution:
    kind = data["kind"]
    if kind == "BoxUniform":
        return BoxUniform(data["low"], data["high"])
    if kind == "Truncated":
        low = -math.inf if data["low"] is None else data["low"]
        high = math.inf if data["high"] is None else data["high"]
        return Truncated(_from_data(data["base"]), low, high)
    if kind == "Product":
        return Product([_from_data(block) for block in data["blocks"]])
    if kind == "Independent":
        base = _from_data(data["base"])
        return _vector(base)
    if kind == "MultivariateNormal":
        loc, scale_tril = torch.tensor(data["loc"]), torch.tensor(data["scale_tril"])
        if loc.ndim != 1 or scale_tril.shape != (len(loc), len(loc)):
            raise InputError("prior: MultivariateNormal has loc and scale_tril of no such shapes")
        return torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)
    if kind not in _PLAIN:
        raise InputError(f"prior: unknown kind {kind!r:.50}")
    distribution = getattr(torch.distributions, kind)
    arguments = {key: torch.tensor(value) for key, value in data.items() if key != "kind"}
    # torch would broadcast them, to any size.
    if len({argument.shape for argument in arguments.values()}) != 1:
        raise InputError(f"prior: {kind} has arguments of different shapes")
    # A second validate_args, which would turn the checks off, is an error.
    return distribution(**arguments, validate_args=True)


def describe(prior: Distribution) -> list[str]:
    """One line a parameter where the prior is a product of univariate ones, else one in all."""
    marginals = _marginals(prior)
    if marginals is None:
        return [str(prior)]
    lines = []
    for marginal in marginals:
        base = marginal.base if isinstance(marginal, Truncated) else marginal
        arguments = ", ".join(f"{key} {float(getattr(base, key)):.4g}" for key in _keys(base))
        line = f"{type(base).__name__}({arguments})"
        if isinstance(marginal, Truncated):
            line += f" on [{marginal.low:.4g}, {marginal.high:.4g}]"
        lines.append(line)
    return lines


def _keys(base: Distribution) -> list[str]:
    return list(base.arg_constraints)


# ---- truncation -----------------------------------------------------------------------------


def _marginals(prior: Distribution) -> list[Distribution] | None:
    """The univariate factors of an independent prior, or None where there are no such factors."""
    if isinstance(prior, Product):
        parts = [_marginals(block) for block in prior.blocks]
        if any(part is None for part in parts):
            return None
        return [marginal for part in parts for marginal in part or []]
    if isinstance(prior, Independent):
        base = prior.base_dist
        if isinstance(base, _Single):
            return [base.base]
        name = type(base).__name__
        if name not in _PLAIN or base.event_shape != ():
            return None
        arguments = {key: getattr(base, key).expand(base.batch_shape) for key in _keys(base)}
        return [
            type(base)(**{key: value[i] for key, value in arguments.items()})
            for i in range(int(base.batch_shape[0]))
        ]
    return None


def truncate(prior: Distribution, low: np.ndarray, high: np.ndarray) -> Distribution:
    """The prior restricted to the box [low, high] (each of shape (D,)) and normalized there.

    The truncated marginal prior of Miller et al. (2021, arXiv:2107.01214): its posterior is the
    posterior under ``prior``, restricted to the box.

    Raises:
        InputError: the prior is no product of univariate distributions with an inverse cdf.
    """
    marginals = _marginals(prior)
    if marginals is None:
        raise InputError(
            f"simulate.rounds: a prior of kind {type(prior).__name__} can't be truncated; give a "
            "product of univariate distributions, or simulate.rounds=1"
        )
    blocks: list[Distribution] = []
    for marginal, lower, upper in zip(marginals, low, high, strict=True):
        base = marginal.base if isinstance(marginal, Truncated) else marginal
        if isinstance(marginal, Truncated):
            lower, upper = max(lower, marginal.low), min(upper, marginal.high)
        try:
            base.icdf(torch.tensor(0.5))
        except NotImplementedError as error:
            raise InputError(
                f"simulate.rounds: {type(base).__name__} has no inverse cdf, so the prior can't be "
                "truncated; use simulate.rounds=1"
            ) from error
        blocks.append(Truncated(base, float(lower), float(upper)))
    return Product(blocks)
