"""The model bundle: ``bundle.json`` and ``weights.safetensors``, and no pickle.

A bundle is all that a posterior needs: architecture, standardizations, prior as data, parameter
names, where it came from. Loading one runs no code of its author's, needs neither the simulator
nor Ray, and works on a CPU whatever it was trained on.

One estimator's is of format 1. An ensemble's is of format 2: ``members`` lists each one's
``estimator`` and ``standardization``, and its weights are named ``members.<number>.<name>``.
Either may have ``out_of_distribution``, what observations are compared with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sbi_dist.errors import InputError
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble, Estimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.store import ObjectStore

__all__ = [
    "BUNDLE",
    "OUT_OF_DISTRIBUTION",
    "WEIGHTS",
    "load_bundle",
    "reference_of",
    "save_bundle",
    "weights_digest",
]

BUNDLE, WEIGHTS = "bundle.json", "weights.safetensors"
OUT_OF_DISTRIBUTION = "out_of_distribution"
_ONE, _ENSEMBLE = 1, 2  # formats
_LARGEST_BUNDLE = 256 * 1024**2


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
        text = store.get(BUNDLE)
        weights = store.get(WEIGHTS)
    except KeyError as error:
        raise InputError(
            f"{where} holds no model ({error.args[0]} is missing); train one, or give a folder "
            "with bundle.json and weights.safetensors"
        ) from None
    if len(text) > _LARGEST_BUNDLE:
        raise InputError(f"{where}/{BUNDLE} has {len(text):,} bytes; that is no model bundle")
    try:
        content = json.loads(text)
        if content["format"] not in (_ONE, _ENSEMBLE):
            raise InputError(
                f"{where}/{BUNDLE} has format {content['format']!r}; this version reads "
                f"{_ONE} and {_ENSEMBLE}"
            )
        if hashlib.sha256(weights).hexdigest() != content["weights_sha256"]:
            raise InputError(
                f"{where}/{WEIGHTS} is damaged: it does not match the checksum in {BUNDLE}; "
                "train again, or copy the model again"
            )
        estimator = _built(content, weights)
        reference_of(content, estimator)
    except InputError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"{where} holds no valid model ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    return estimator, content


def reference_of(content: dict[str, Any], estimator: Estimator) -> OutOfDistribution | None:
    """What observations are compared with, by the content of an estimator's ``bundle.json``.

    None where it has none, as those of earlier versions.
    """
    data = content.get(OUT_OF_DISTRIBUTION)
    return None if data is None else OutOfDistribution.from_data(data, estimator)


def _built(content: dict[str, Any], weights: bytes) -> Estimator:
    """The estimator of a bundle; any of many errors where its content is wrong."""
    x_shape = tuple(int(length) for length in content["x_shape"])
    ensemble = content["format"] == _ENSEMBLE
    described = [_read(member) for member in content["members"]] if ensemble else [_read(content)]
    _check_sizes(described, x_shape, len(weights))
    with torch.random.fork_rng(devices=[]):
        members = [DensityEstimator(*each, x_shape) for each in described]
    if ensemble:
        if content["estimator"]["ensemble"] != len(members):
            raise ValueError(
                f"an ensemble of {content['estimator']['ensemble']} has {len(members)} members"
            )
        states = _states(load(weights), len(members))
    else:
        states = [load(weights)]
    for member, state in zip(members, states, strict=True):
        member.flow.load_state_dict(state)
        member.eval()
        _check_draw(member)
    return Ensemble(members).eval() if ensemble else members[0]


def _read(described: dict[str, Any]) -> tuple[TrainOptions, Standardization]:
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    options = {name: value for name, value in described["estimator"].items() if name in known}
    return TrainOptions(**options), Standardization.from_data(described["standardization"])


def _states(weights: dict[str, Tensor], members: int) -> list[dict[str, Tensor]]:
    """The weights of each member of an ensemble."""
    states: list[dict[str, Tensor]] = [{} for _ in range(members)]
    for name, value in weights.items():
        _, number, rest = name.split(".", 2)
        if not name.startswith(_prefix(int(number))):
            raise ValueError(f"the weights {name!r} belong to no member")
        states[int(number)][rest] = value
    return states


def _check_sizes(
    described: list[tuple[TrainOptions, Standardization]], x_shape: tuple[int, ...], weights: int
) -> None:
    """Refuse architectures that the weights can't fill, before memory is taken for them."""
    at_least = 0
    for options, standardization in described:
        if standardization.bijection.size < 1:
            raise ValueError("the architecture does not fit the weights")
        at_least += options.transforms * options.blocks * options.hidden_features**2
        at_least += math.prod(x_shape) * (options.embedding == "none")
    if not described or at_least * 4 > 2 * weights + 4096 * len(described):
        raise ValueError("the architecture does not fit the weights")


@torch.no_grad()
def _check_draw(estimator: DensityEstimator) -> None:
    """Draw once: shapes and numbers of ``bundle.json`` that do not fit show here."""
    context = estimator.embed(torch.zeros(1, *estimator.x_shape))
    theta = estimator.push(torch.zeros(1, estimator.num_parameters), context)
    if theta.shape != (1, estimator.num_parameters) or not bool(torch.isfinite(theta).all()):
        raise ValueError("its numbers give no draws")
