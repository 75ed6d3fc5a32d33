"""Neural posterior estimation with the interface of the ``sbi`` toolbox, on Ray.

The toolbox's amortized-Gaussian tutorial runs on these names with its import lines changed. The
work is done by the same actors and the same Ray Train job as in ``sbi-dist run``; simulations go
through a store, by default a temporary directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import load_bundle
from sbi_dist.estimation.ensemble import Estimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.snapshot import METRICS
from sbi_dist.estimation.trainer import train
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.priors import as_prior, prior_to_data, support_bounds
from sbi_dist.problem import Problem
from sbi_dist.session import connect
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.driver import simulate
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.shard import Simulations, encode_shard, versions
from sbi_dist.store import ObjectStore, open_store

__all__ = [
    "NPE",
    "SNPE",
    "check_sbi_inputs",
    "process_prior",
    "process_simulator",
    "simulate_for_sbi",
]


def process_prior(prior: Any) -> tuple[Distribution, int, bool]:
    """The prior as a distribution of one vector, the number of parameters, and False.

    The third value says in ``sbi`` whether the prior gives numpy arrays; here it never does.

    Raises:
        InputError: the prior is no torch distribution with a known continuous support.
    """
    prior = as_prior(prior)
    return prior, int(prior.event_shape[0]), False


class _BatchSimulator:
    """A simulator of any form, called on a batch of parameters and giving a batch of x."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(self, theta: Any) -> Tensor:
        theta = torch.atleast_2d(torch.as_tensor(theta, dtype=torch.float32))
        form, simulator = self.problem.form(), self.problem.simulator
        keywords: dict[str, Any] = {}
        if form.takes_rng:
            # Follows torch's seed, as a torch simulator would.
            keywords["rng"] = np.random.default_rng(int(torch.randint(2**62, (1,))))
        argument: Any = theta if form.library == "torch" else theta.numpy().astype(np.float64)
        if form.batched:
            return torch.as_tensor(simulator(argument, **keywords), dtype=torch.float32)
        rows = [np.asarray(simulator(row, **keywords), dtype=np.float32) for row in argument]
        return torch.from_numpy(np.stack(rows))


def process_simulator(
    simulator: Callable[..., Any], prior: Any, is_numpy_simulator: bool = False
) -> Callable[[Any], Tensor]:
    """The simulator as a function of a batch, theta (N, D) to x (N, *x_shape), both tensors.

    ``is_numpy_simulator`` is accepted for likeness with ``sbi``; the form is found by running it.

    Raises:
        InputError: the simulator can't be run on the prior's draws.
    """
    problem = Problem(prior, simulator)
    problem.form()
    return _BatchSimulator(problem)


def check_sbi_inputs(simulator: Callable[..., Any], prior: Any) -> None:
    """Check that the simulator runs on the prior's draws.

    Raises:
        InputError: it does not; says what came back and what was expected.
    """
    _problem(simulator, prior).form()


def _problem(simulator: Callable[..., Any], prior: Any) -> Problem:
    if isinstance(simulator, _BatchSimulator):
        # The scientist's own function travels to the actors, with the form already found.
        return dataclasses.replace(simulator.problem, prior=as_prior(prior))
    return Problem(prior, simulator)


class _Proposal(Distribution):
    """Anything with ``sample`` (a posterior, say) in the place of a prior, to draw theta from."""

    def __init__(self, proposal: Any) -> None:
        self._proposal = proposal
        size = proposal.sample((2,)).shape[-1]
        super().__init__(event_shape=torch.Size([size]), validate_args=False)

    arg_constraints: dict[str, Any] = {}
    support = torch.distributions.constraints.real_vector

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._proposal.sample(torch.Size(sample_shape))


def simulate_for_sbi(
    simulator: Callable[..., Any],
    proposal: Any,
    num_simulations: int,
    num_workers: int | None = None,
    simulation_batch_size: int | None = None,
    seed: int | None = None,
    show_progress_bar: bool = True,
    store: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw theta from the proposal and simulate x for each, on Ray actors.

    Args:
        simulator: a callable on theta, in any of the forms that ``Problem`` takes.
        proposal: a prior, or a posterior to draw from.
        num_simulations: N.
        num_workers: actors; default as many as there are CPUs.
        simulation_batch_size: rows of one call of a batch simulator.
        seed: default drawn from torch's global generator.
        show_progress_bar: whether to show progress.
        store: a place that all machines of the cluster see; default a temporary directory here.

    Returns:
        theta (N, D) and x (N, *x_shape), float32. Failed simulations have NaN in x.
    """
    if not isinstance(proposal, (Distribution, list, tuple)):
        proposal = _Proposal(proposal)
    problem = _problem(simulator, proposal)
    options = SimulateOptions(
        num_simulations=num_simulations,
        seed=_seed(seed),
        batch_size=simulation_batch_size,
        actors=num_workers,
        max_failure_fraction=1.0,
    )
    # Stays for the calls that follow, such as train().
    connect()
    with _place(store) as root:
        records = simulate(problem, options, root, show_progress_bar)
        simulations = Dataset(root).read_all([record.index for record in records])
    theta, x = simulations.theta[:num_simulations], simulations.x[:num_simulations]
    return torch.from_numpy(theta.copy()), torch.from_numpy(x.copy())


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**31, (1,))) if seed is None else seed


@contextlib.contextmanager
def _place(store: str | None) -> Iterator[ObjectStore]:
    if store is not None:
        yield open_store(store).child(uuid.uuid4().hex)
        return
    with tempfile.TemporaryDirectory(prefix="sbi-dist-") as folder:
        yield open_store(folder)


class NPE:
    """Neural posterior estimation: fit q(theta | x) to simulations drawn from the prior.

    Args:
        prior: the prior; may be given to :meth:`build_posterior` instead.
        density_estimator: ``nsf`` or ``maf``.
        device: ``cpu``, or ``cuda`` (``gpu``) to train on a GPU.
        show_progress_bars: whether to show progress.
        store: a place that all machines of the cluster see; default a temporary directory here.
        options: further fields of ``TrainOptions``, such as ``embedding`` or ``workers``.
    """

    def __init__(
        self,
        prior: Any = None,
        density_estimator: str = "nsf",
        device: str = "cpu",
        show_progress_bars: bool = True,
        store: str | None = None,
        **options: Any,
    ) -> None:
        self.prior = None if prior is None else as_prior(prior)
        self._store, self._show = store, show_progress_bars
        # One worker needs no process group, so it trains here, by Ray Train's local mode.
        kind = str(device).partition(":")[0]
        if kind not in ("cpu", "cuda", "gpu"):
            raise InputError(f"device is {device!r}; it must be 'cpu' or 'cuda'")
        gpus = {} if kind == "cpu" else {"gpus_per_worker": 1.0}
        self.options = _options({"workers": 0, "estimator": density_estimator, **gpus, **options})
        self._theta: list[np.ndarray] = []
        self._x: list[np.ndarray] = []
        self._estimator: Estimator | None = None
        self._about: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    def append_simulations(self, theta: Any, x: Any) -> NPE:
        """Add simulations theta (N, D), x (N, *x_shape); returns the object.

        Simulations with NaN or infinite x are kept out of the training.
        """
        theta = np.asarray(theta, dtype=np.float32)
        x = np.asarray(x, dtype=np.float32)
        if theta.ndim != 2 or x.ndim < 1 or len(theta) != len(x):
            raise InputError(
                f"theta has shape {theta.shape} and x {x.shape}; theta must be (N, D) and x "
                "(N, ...) with the same N"
            )
        if self.prior is not None and theta.shape[1] != self.prior.event_shape[0]:
            raise InputError(
                f"theta has {theta.shape[1]} columns; the prior has "
                f"{int(self.prior.event_shape[0])} parameters"
            )
        if self._x and x.shape[1:] != self._x[0].shape[1:]:
            raise InputError(
                f"x has shape {x.shape[1:]} a simulation, those appended before "
                f"{self._x[0].shape[1:]}"
            )
        self._theta.append(theta)
        self._x.append(x if x.ndim > 1 else x[:, None])
        return self

    def train(
        self,
        training_batch_size: int | None = None,
        learning_rate: float | None = None,
        validation_fraction: float | None = None,
        stop_after_epochs: int | None = None,
        max_num_epochs: int | None = None,
        clip_max_norm: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Estimator:
        """Train by a Ray Train job on the appended simulations; the fitted density estimator.

        The arguments are those of ``sbi`` (``stop_after_epochs`` is ``TrainOptions.patience``) and
        the fields of ``TrainOptions``.

        Raises:
            InputError: no simulations, or too few.
        """
        if not self._theta:
            raise InputError("there are no simulations; call append_simulations(theta, x) first")
        given = {
            "batch_size": training_batch_size,
            "learning_rate": learning_rate,
            "validation_fraction": validation_fraction,
            "patience": stop_after_epochs,
            "max_epochs": max_num_epochs,
            "clip_norm": clip_max_norm,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        chosen = _options(
            {**dataclasses.asdict(self.options), "seed": _seed(seed), **changes, **options}
        )
        connect()
        with _place(self._store) as root:
            simulations, bounds, about = self._simulations()
            data, record = encode_shard(simulations, {"shard": 0, **about})
            root.put("simulations/shard-000000.parquet", data)
            model = root.child("model")
            self._about = train(
                root.child("simulations"), [record], bounds, model, chosen, about, self._show
            )
            self._estimator = load_bundle(model)[0]
            self.summary = {**_history(model), "shard": record.digest}
        return self._estimator

    def _simulations(
        self,
    ) -> tuple[Simulations, tuple[np.ndarray, np.ndarray], dict[str, Any]]:
        theta, x = np.concatenate(self._theta), np.concatenate(self._x)
        finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1) & np.isfinite(theta).all(axis=1)
        count = len(theta)
        simulations = Simulations(
            simulation_id=np.arange(count, dtype=np.int64),
            theta=theta,
            x=x,
            failed=dict.fromkeys(
                np.flatnonzero(~finite).tolist(), ("nonfinite", "x is NaN or infinite")
            ),
            duration_s=np.zeros(count, dtype=np.float32),
        )
        size = theta.shape[1]
        unbounded = (np.full(size, -np.inf), np.full(size, np.inf))
        about = {
            "x_shape": list(x.shape[1:]),
            "prior": {"kind": "opaque"} if self.prior is None else prior_to_data(self.prior),
            "versions": versions(),
        }
        return simulations, unbounded if self.prior is None else support_bounds(self.prior), about

    def build_posterior(
        self, density_estimator: Estimator | None = None, prior: Any = None, **_: Any
    ) -> Posterior:
        """The posterior of the given, or else the last trained, density estimator."""
        estimator = density_estimator or self._estimator
        if estimator is None:
            raise InputError("there is no density estimator; call train() first")
        prior = self.prior if prior is None else as_prior(prior)
        return Posterior(estimator, prior, self._about)


def _options(fields: dict[str, Any]) -> TrainOptions:
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    for name in fields:
        if name not in known:
            raise InputError(f"unknown option {name!r}; allowed: {', '.join(sorted(known))}")
    return TrainOptions(**fields)


def _history(model: ObjectStore) -> dict[str, Any]:
    import json

    return json.loads(model.get(METRICS))


SNPE = NPE
