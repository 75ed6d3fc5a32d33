"""The model bundle: ``bundle.json`` and ``weights.safetensors``, and no pickle.

A bundle is all that a posterior needs: architecture, standardizations, prior as data, parameter
names, where it came from. Loading one runs no code of its author's, needs neither the simulator
nor Ray, and works on a CPU whatever it was trained on. A bundle from a stranger is refused, or is
a model that costs about what its files' size says (see ``claims.py``).

One estimator's is of format 1. An ensemble's is of format 2: ``members`` lists each one's
``estimator`` and ``standardization``, and its weights are named ``members.<number>.<name>``.
Either may have ``out_of_distribution``, what observations are compared with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.distributions import Distribution

from sbi_dist.errors import InputError
from sbi_dist.estimation.claims import (
    checked_names,
    checked_options,
    checked_shape,
    checked_sizes,
    parsed,
)
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble, Estimator
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.priors import prior_from_data
from sbi_dist.store import ObjectStore

__all__ = [
    "BUNDLE",
    "NO_MODEL",
    "OUT_OF_DISTRIBUTION",
    "WEIGHTS",
    "load_bundle",
    "no_model",
    "prior_of",
    "read_bundle",
    "reference_of",
    "save_bundle",
    "weights_digest",
]

BUNDLE, WEIGHTS = "bundle.json", "weights.safetensors"
OUT_OF_DISTRIBUTION = "out_of_distribution"
NO_MODEL: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    RuntimeError,
    SafetensorError,
)
"""What a model is refused with by the libraries that it is made of."""
_ONE, _ENSEMBLE = 1, 2  # formats
_LARGEST_BUNDLE = 256 * 1024**2
_MOST_SECONDS, _MOST_MEMBERS = 600.0, 100


def weights_digest(estimator: Estimator) -> str:
    """16 hex digits of the weights: the model's identity for reproducible draws."""
    return hashlib.sha256(_weights(estimator)).hexdigest()[:16]


def _weights(estimator: Estimator) -> bytes:
    if isinstance(estimator, Ensemble):
        # Copies: the format has no tensor of two names, and a member may be there twice.
        state = {
            f"{_prefix(number)}{name}": value.clone()
            for number, member in enumerate(estimator.members)
            for name, value in member.flow.state_dict().items()
        }
    else:
        state = estimator.flow.state_dict()
    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def _prefix(number: int) -> str:
    return f"members.{number}."


def save_bundle(store: ObjectStore, estimator: Estimator, about: dict[str, Any]) -> dict[str, Any]:
    """Write a bundle into a model's folder; the content of its ``bundle.json``.

    ``about`` adds prior, parameter names, dataset, training summary and versions. ``bundle.json``
    is written last: where it is, the bundle is whole.
    """
    weights = _weights(estimator)
    content = {
        "format": _ONE,
        "estimator": dataclasses.asdict(estimator.options),
        "x_shape": list(estimator.x_shape),
        "num_parameters": estimator.num_parameters,
        "num_weights": estimator.num_weights,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if isinstance(estimator, Ensemble):
        content["format"] = _ENSEMBLE
        content["members"] = [_described(member) for member in estimator.members]
    else:
        content.update(_described(estimator))
    content.update(about)
    store.put(WEIGHTS, weights)
    store.put(BUNDLE, json.dumps(content, indent=2, sort_keys=True).encode())
    return content


def _described(estimator: DensityEstimator) -> dict[str, Any]:
    return {
        "estimator": dataclasses.asdict(estimator.options),
        "standardization": estimator.standardization.to_data(),
    }


def load_bundle(store: ObjectStore) -> tuple[Estimator, dict[str, Any]]:
    """The estimator and the content of ``bundle.json`` of a model's folder.

    Raises:
        InputError: there is no bundle, or it is damaged or of another format.
    """
    where = store.uri
    try:
        size, _ = store.identity(BUNDLE)
        if size > _LARGEST_BUNDLE:
            raise InputError(f"{where}/{BUNDLE} has {size:,} bytes; that is no model bundle")
        store.identity(WEIGHTS)  # or something that is no file and has no end might be read
        text = store.get(BUNDLE)
        weights = store.get(WEIGHTS)
    except KeyError as error:
        raise InputError(
            f"{where} holds no model ({error.args[0]} is missing); train one, or give a folder "
            "with bundle.json and weights.safetensors"
        ) from None
    return read_bundle(text, weights, where)


def read_bundle(
    text: bytes, weights: bytes, where: str, most_seconds: float = _MOST_SECONDS
) -> tuple[Estimator, dict[str, Any]]:
    """The estimator and the content of ``bundle.json``, from the content of the files.

    Args:
        text: of ``bundle.json``.
        weights: of ``weights.safetensors``.
        where: what messages call the folder.
        most_seconds: refuse what would take longer to load, by an estimate.

    Raises:
        InputError: they are damaged or of another format.
    """
    try:
        content = parsed(text)
        if content["format"] not in (_ONE, _ENSEMBLE):
            raise InputError(
                f"{where}/{BUNDLE} has format {content['format']!r:.50}; this version reads "
                f"{_ONE} and {_ENSEMBLE}"
            )
        if hashlib.sha256(weights).hexdigest() != content["weights_sha256"]:
            raise InputError(
                f"{where}/{WEIGHTS} is damaged: it does not match the checksum in {BUNDLE}; "
                "train again, or copy the model again"
            )
        estimator = _built(content, weights, most_seconds)
        _check_numbers(content, estimator)
        checked_names(content, estimator.num_parameters)
        reference_of(content, estimator)
    except InputError:
        raise
    except NO_MODEL as error:
        raise no_model(where, error) from error
    return estimator, content


def no_model(where: str, error: Exception) -> InputError:
    """What to tell of one of ``NO_MODEL``."""
    first = str(error).splitlines()[0][:500] if str(error) else ""
    return InputError(f"{where} holds no valid model ({type(error).__name__}: {first})")


def reference_of(content: dict[str, Any], estimator: Estimator) -> OutOfDistribution | None:
    """What observations are compared with, by the content of an estimator's ``bundle.json``.

    None where it has none, as those of earlier versions.
    """
    data = content.get(OUT_OF_DISTRIBUTION)
    return None if data is None else OutOfDistribution.from_data(data, estimator)


def prior_of(content: dict[str, Any], estimator: Estimator) -> Distribution | None:
    """The prior of a ``bundle.json``, of as many parameters as the estimator; None if opaque.

    Raises:
        InputError: there is no such prior.
    """
    return prior_from_data(content.get("prior", {"kind": "opaque"}), estimator.num_parameters)


def _built(content: dict[str, Any], weights: bytes, most_seconds: float) -> Estimator:
    """The estimator of a bundle; any of ``NO_MODEL`` where its content is wrong."""
    x_shape = checked_shape(content["x_shape"])
    ensemble = content["format"] == _ENSEMBLE
    each = content["members"] if ensemble else [content]
    count = content["estimator"]["ensemble"] if ensemble else 1
    if not isinstance(each, list) or count != len(each) or not 1 <= count <= _MOST_MEMBERS:
        raise ValueError(f"an ensemble of {count!r:.50} has other members than that")
    options = [checked_options(member["estimator"]) for member in each]
    standardizations = [Standardization.from_data(member["standardization"]) for member in each]
    for standardization in standardizations:
        if standardization.x_mean.shape != x_shape:
            raise ValueError("the standardization is of another x_shape")
    described = list(zip(options, standardizations, strict=True))
    checked_sizes(
        [(chosen, of.bijection.size) for chosen, of in described], x_shape, weights, most_seconds
    )
    states = _states(load(weights), len(each)) if ensemble else [load(weights)]
    with torch.random.fork_rng(devices=[]):
        members = [DensityEstimator(*one, x_shape) for one in described]
    for member, state in zip(members, states, strict=True):
        _fill(member, state)
        member.eval()
        _check_draw(member)
    return Ensemble(members).eval() if ensemble else members[0]


def _states(weights: dict[str, Tensor], members: int) -> list[dict[str, Tensor]]:
    """The weights of each member of an ensemble."""
    states: list[dict[str, Tensor]] = [{} for _ in range(members)]
    for name, value in weights.items():
        _, number, rest = name.split(".", 2)
        if not name.startswith(_prefix(int(number))):
            raise ValueError(f"the weights {name!r} belong to no member")
        states[int(number)][rest] = value
    return states


def _fill(member: DensityEstimator, state: dict[str, Tensor]) -> None:
    """Set the weights of a new flow."""
    parameters = {name for name, _ in member.flow.named_parameters()}
    for name, made in member.flow.state_dict().items():
        given = state[name]
        if given.dtype != made.dtype or given.shape != made.shape:
            raise ValueError(f"{name} is {given.dtype} of {tuple(given.shape)}")
        if name not in parameters:
            # Masks, orders of features: of the architecture, and what code takes for granted.
            if not torch.equal(given, made):
                raise ValueError(f"{name} is not that of the architecture")
        elif not bool(torch.isfinite(given).all()):
            raise ValueError(f"{name} has numbers that are not finite")
    member.flow.load_state_dict(state)


def _check_numbers(content: dict[str, Any], estimator: Estimator) -> None:
    for name in ("num_parameters", "num_weights"):
        if content.get(name, getattr(estimator, name)) != getattr(estimator, name):
            raise ValueError(f"{name} is not that of the architecture")


@torch.no_grad()
def _check_draw(estimator: DensityEstimator) -> None:
    """Go through the flow once: numbers that do not fit show here."""
    context = estimator.embed(torch.zeros(1, *estimator.x_shape))
    u = torch.zeros(1, estimator.num_parameters)
    noise, log_det = estimator.flow.flow._transform(u, context=context)
    theta = estimator.constrained(u)
    if not all(bool(torch.isfinite(each).all()) for each in (noise, log_det, theta)):
        raise ValueError("its numbers give no draws")
