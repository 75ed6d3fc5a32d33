"""The amortized posterior: sample, log_prob and map for any observation, without simulating.

The interface is that of the ``sbi`` toolbox's posteriors (shapes included), so that its
diagnostics accept this object.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import (
    BUNDLE,
    NO_MODEL,
    load_bundle,
    no_model,
    prior_of,
    reference_of,
    weights_digest,
)
from sbi_dist.estimation.ensemble import Ensemble, Estimator
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.posterior.observation import as_observations
from sbi_dist.posterior.sampler import Sampler
from sbi_dist.priors import sample_prior
from sbi_dist.store import ObjectStore, open_store

__all__ = ["Posterior"]

PROMOTED = "models/promoted.json"


class Posterior:
    """p(theta | x) for any x, by a trained density estimator or an ensemble of them.

    Draws never leave the prior's support and the density integrates to one over it, so that
    nothing is rejected.

    Args:
        estimator: the density estimator or the ensemble.
        prior: the prior that it was trained under; None where only its support is known.
        about: the content of the model's ``bundle.json``.
    """

    def __init__(
        self,
        estimator: Estimator,
        prior: Distribution | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.estimator, self.prior, self.about = estimator, prior, about or {}
        self.identity = weights_digest(estimator)
        self.sampler = Sampler(estimator)
        self._default_x: Tensor | None = None
        self._map: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles compile their own sampler, for the CPU.
        return {name: value for name, value in vars(self).items() if name != "sampler"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.sampler = Sampler(self.estimator)

    @classmethod
    def load(cls, uri: str) -> Posterior:
        """The posterior of a model's folder, or of an experiment's folder (its promoted model).

        Needs neither the simulator nor Ray, and runs no code from the folder.

        Raises:
            InputError: there is no model, or a damaged one.
        """
        return cls.from_store(open_store(str(uri)))

    @classmethod
    def from_store(cls, store: ObjectStore) -> Posterior:
        """As :meth:`load`, from an open store."""
        if not store.exists(BUNDLE) and store.exists(PROMOTED):
            try:
                model = json.loads(store.get(PROMOTED))["model"]
                store = store.child(f"models/{model}")
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{store.uri}/{PROMOTED} is damaged ({error}); train again, or give the "
                    "folder of a model"
                ) from error
        estimator, about = load_bundle(store)
        return cls.of_bundle(estimator, about, store.uri)

    @classmethod
    def of_bundle(cls, estimator: Estimator, about: dict[str, Any], where: str) -> Posterior:
        """Of what :func:`load_bundle` gave; ``where`` is what messages call the folder.

        Raises:
            InputError: the prior does not fit, or the flow can't be compiled.
        """
        prior = prior_of(about, estimator)
        try:
            return cls(estimator, prior, about)
        except NO_MODEL as error:
            raise no_model(where, error) from error

    # ---- what it is about ----

    @property
    def parameter_names(self) -> list[str]:
        """Names of the D parameters."""
        names = self.about.get("parameter_names")
        return list(names or [f"theta_{i + 1}" for i in range(self.estimator.num_parameters)])

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return self.estimator.x_shape

    @property
    def default_x(self) -> Tensor | None:
        """The observation used where none is given, shape (1, *x_shape)."""
        return self._default_x

    @default_x.setter
    def default_x(self, x: Any) -> None:
        self.set_default_x(x)

    def set_default_x(self, x: Any) -> Posterior:
        """Set the observation to be used where none is given; returns the posterior."""
        observations = as_observations(x, self.x_shape, "default_x")
        if len(observations) != 1:
            raise InputError(f"default_x holds {len(observations)} observations; it must be one")
        self._default_x, self._map = observations, None
        return self

    def _observation(self, x: Any, use: str) -> Tensor:
        if x is None:
            if self._default_x is None:
                raise InputError("x is missing; give x, or set one with set_default_x(x)")
            return self._default_x
        observations = as_observations(x, self.x_shape)
        if len(observations) != 1:
            raise InputError(
                f"x holds {len(observations)} observations; {use} takes one, use {use}_batched "
                "for more"
            )
        return observations

    # ---- draws ----

    def sample(
        self,
        sample_shape: Sequence[int] | int = (1,),
        x: Any = None,
        seed: int | None = None,
        show_progress_bars: bool = False,
        **_: Any,
    ) -> Tensor:
        """Draws for one observation, float32 of shape (*sample_shape, D).

        Args:
            sample_shape: how many.
            x: the observation, shape x_shape or (1, *x_shape); default ``default_x``.
            seed: draws are a function of (model, x, seed); default: a seed from torch's global
                generator, so that ``torch.manual_seed`` makes draws repeatable.
            show_progress_bars: accepted for likeness with ``sbi``; sampling shows none.
        """
        shape = _shape(sample_shape)
        observation = self._observation(x, "sample")
        return self._draw(observation, shape, seed).squeeze(len(shape))

    def sample_batched(
        self,
        sample_shape: Sequence[int] | int,
        x: Any,
        seed: int | None = None,
        show_progress_bars: bool = False,
        **_: Any,
    ) -> Tensor:
        """Draws for B observations, float32 of shape (*sample_shape, B, D); ``x`` (B, *x_shape)."""
        return self._draw(as_observations(x, self.x_shape), _shape(sample_shape), seed)

    def draws(
        self,
        x: Tensor,
        count: int,
        seed: int | Sequence[int],
        first: int = 0,
        with_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Draws ``first`` to ``first + count - 1`` of each of B observations, without checks of x.

        Args:
            x: float32 of shape (B, *x_shape), finite.
            count: draws of each.
            seed: draws are a function of (model, x, seed, their number); one for each observation
                where there are several.
            with_log_prob: whether to compute the density of each draw too.

        Returns:
            theta, float32 of shape (B, count, D), and log p(theta | x), float32 of shape
            (B, count), or None.
        """
        return self.sampler.draw(x, count, self.identity, seed, first, with_log_prob)

    def _draw(self, x: Tensor, shape: torch.Size, seed: int | None) -> Tensor:
        if seed is None:
            seed = int(torch.randint(2**62, (1,)))
        theta, _ = self.draws(x, shape.numel(), seed)
        return theta.transpose(0, 1).reshape(*shape, len(x), self.estimator.num_parameters)

    # ---- densities ----

    def log_prob(self, theta: Any, x: Any = None, **_: Any) -> Tensor:
        """log p(theta | x) for one observation, shape (N,); ``theta`` (N, D) or (D,).

        -inf outside the prior's support.
        """
        theta = self._parameters(theta)
        if theta.ndim == 1:
            theta = theta[None]
        observation = self._observation(x, "log_prob")
        return self.sampler.log_prob(theta[:, None], observation)[:, 0]

    def log_prob_batched(self, theta: Any, x: Any, **_: Any) -> Tensor:
        """log p(theta | x) for B observations; ``theta`` (*S, B, D), result (*S, B)."""
        theta = self._parameters(theta)
        observations = as_observations(x, self.x_shape)
        if theta.ndim < 2 or theta.shape[-2] != len(observations):
            raise InputError(
                f"theta has shape {tuple(theta.shape)}; for {len(observations)} observations it "
                f"must be (..., {len(observations)}, {self.estimator.num_parameters})"
            )
        flat = theta.reshape(-1, *theta.shape[-2:])
        return self.sampler.log_prob(flat, observations).reshape(theta.shape[:-1])

    def _parameters(self, theta: Any) -> Tensor:
        theta = torch.as_tensor(np.asarray(theta), dtype=torch.float32)
        if theta.shape[-1:] != (self.estimator.num_parameters,):
            raise InputError(
                f"theta has shape {tuple(theta.shape)}; its last length must be the number of "
                f"parameters, {self.estimator.num_parameters}"
            )
        return theta

    def map(
        self, x: Any = None, num_init_samples: int = 1000, num_to_optimize: int = 100, **_: Any
    ) -> Tensor:
        """The theta of largest density for one observation, shape (1, D).

        Gradient ascent in the unconstrained space from the best of ``num_init_samples`` draws.
        """
        if x is None and self._map is not None:
            return self._map
        observation = self._observation(x, "map")
        best = self._ascend(observation, num_init_samples, num_to_optimize)
        if x is None:
            self._map = best
        return best

    def _ascend(self, x: Tensor, draws: int, starts: int) -> Tensor:
        estimator = self.estimator
        theta = self.draws(x, draws, 0)[0][0]
        density = self.sampler.log_prob(theta[:, None], x)[:, 0]
        theta = theta[density.topk(min(starts, draws)).indices]
        context = estimator.embed(x).detach().expand(len(theta), -1)
        u = estimator.unconstrained(theta).requires_grad_()
        optimizer = torch.optim.Adam([u], lr=0.02)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 200)
            optimizer.zero_grad()
            (-estimator.log_prob_unconstrained(u, context).sum()).backward(inputs=[u])
            optimizer.step()
        with torch.no_grad():
            best = int(estimator.log_prob_unconstrained(u, context).argmax())
            return estimator.constrained(u.detach()[best : best + 1])

    # ---- for others ----

    def to_arviz(
        self,
        x: Any = None,
        num_draws: int = 1000,
        seed: int | None = None,
        chains: int = 1,
        observations: Sequence[str] | None = None,
    ) -> Any:
        """Draws as an ``xarray.DataTree`` in ArviZ's schema; needs the extra ``arviz``.

        Groups: ``posterior`` with a variable (chain, draw) for each parameter, ``sample_stats``
        with the log density ``lp``, ``observed_data`` with ``x``, and ``prior`` where it is known.

        Args:
            x: one observation, shape x_shape or (1, *x_shape), default ``default_x``; or several,
                (B, *x_shape), each a coordinate of the further dimension ``observation``.
            num_draws: of each observation, in all chains together.
            seed: as for :meth:`sample`.
            chains: the draws are independent, so that they make as many chains as one likes.
            observations: B names; default: one observation has none, several have numbers.

        Raises:
            InputError: ArviZ is not installed; x does not fit; ``num_draws`` is below 1, or
                ``chains`` does not divide it.
        """
        from sbi_dist.posterior import arviz

        arviz.require()
        if num_draws < 1:
            raise InputError(f"num_draws is {num_draws}; it must be 1 or more")
        given = self._observation(x, "to_arviz") if x is None else as_observations(x, self.x_shape)
        if observations is None and len(given) > 1:
            observations = [str(number) for number in range(len(given))]
        if observations is not None and len(observations) != len(given):
            raise InputError(
                f"observations has {len(observations)} names; there are {len(given)} observations"
            )
        if seed is None:
            seed = int(torch.randint(2**62, (1,)))
        draws, log_prob = self.draws(given, num_draws, seed, with_log_prob=True)
        assert log_prob is not None
        prior = None
        if self.prior is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed % 2**32)
                prior = sample_prior(self.prior, num_draws)
        return arviz.datatree(
            draws.numpy(),
            self.parameter_names,
            units=self.about.get("parameter_units") or (),
            observed=given.numpy(),
            observations=observations,
            prior=prior,
            statistics={"lp": log_prob.numpy()},
            chains=chains,
            attributes={
                "experiment": self.about.get("experiment"),
                "model": self.about.get("model") or self.identity,
                "seed": seed,
            },
        )

    # ---- what it is not about ----

    def out_of_distribution(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How unlike the simulations observations are, without checks of x.

        Args:
            x: float32 of shape (B, *x_shape).

        Returns:
            A score, about 1 for a simulation and growing as the square of the distance from them,
            and a p-value, the part of the held-out simulations with no lower score; float32 (B,)
            each, as ``OutOfDistribution`` defines them. NaN where x is not finite, and where the
            bundle tells of no held-out simulations of this estimator.
        """
        if self._reference is None:
            return np.full(len(x), np.nan, np.float32), np.full(len(x), np.nan, np.float32)
        return self._reference.evaluate(self.estimator, x)

    @functools.cached_property
    def _reference(self) -> OutOfDistribution | None:
        if self.about.get("weights_sha256", self.identity)[:16] != self.identity:
            return None
        return reference_of(self.about, self.estimator)

    def __repr__(self) -> str:
        names = ", ".join(self.parameter_names)
        of = (
            f" of {len(self.estimator.members)} estimators"
            if isinstance(self.estimator, Ensemble)
            else ""
        )
        return f"Posterior of ({names}) given x of shape {self.x_shape}, model {self.identity}{of}"


def _shape(sample_shape: Sequence[int] | int) -> torch.Size:
    shape = torch.Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)
    if any(length < 0 for length in shape):
        raise InputError(f"sample_shape is {tuple(shape)}; its lengths must not be negative")
    return shape
