"""The model bundle: ``bundle.json`` and ``weights.safetensors``, and no pickle.

A bundle is all that a posterior needs: architecture, standardizations, prior as data, parameter
names, where it came from. Loading one runs no code of its author's, needs neither the simulator
nor Ray, and works on a CPU whatever it was trained on.
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

from sbi_dist.errors import InputError
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.store import ObjectStore

__all__ = ["BUNDLE", "WEIGHTS", "load_bundle", "save_bundle", "weights_digest"]

BUNDLE, WEIGHTS = "bundle.json", "weights.safetensors"
_FORMAT = 1
_LARGEST_BUNDLE = 64 * 1024**2


def weights_digest(estimator: DensityEstimator) -> str:
    """16 hex digits of the weights: the model's identity for reproducible draws."""
    return hashlib.sha256(_weights(estimator)).hexdigest()[:16]


def _weights(estimator: DensityEstimator) -> bytes:
    state = estimator.flow.state_dict()
    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def save_bundle(
    store: ObjectStore, estimator: DensityEstimator, about: dict[str, Any]
) -> dict[str, Any]:
    """Write a bundle into a model's folder; the content of its ``bundle.json``.

    ``about`` adds prior, parameter names, dataset, training summary and versions. ``bundle.json``
    is written last: where it is, the bundle is whole.
    """
    weights = _weights(estimator)
    content = {
        "format": _FORMAT,
        "estimator": dataclasses.asdict(estimator.options),
        "standardization": estimator.standardization.to_data(),
        "x_shape": list(estimator.x_shape),
        "num_parameters": estimator.num_parameters,
        "num_weights": estimator.num_weights,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **about,
    }
    store.put(WEIGHTS, weights)
    store.put(BUNDLE, json.dumps(content, indent=2, sort_keys=True).encode())
    return content


def load_bundle(store: ObjectStore) -> tuple[DensityEstimator, dict[str, Any]]:
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
        if content["format"] != _FORMAT:
            raise InputError(
                f"{where}/{BUNDLE} has format {content['format']!r}; this version reads {_FORMAT}"
            )
        if hashlib.sha256(weights).hexdigest() != content["weights_sha256"]:
            raise InputError(
                f"{where}/{WEIGHTS} is damaged: it does not match the checksum in {BUNDLE}; "
                "train again, or copy the model again"
            )
        known = {field.name for field in dataclasses.fields(TrainOptions)}
        options = TrainOptions(
            **{name: value for name, value in content["estimator"].items() if name in known}
        )
        standardization = Standardization.from_data(content["standardization"])
        x_shape = tuple(int(length) for length in content["x_shape"])
        _check_sizes(options, standardization, x_shape, len(weights))
        with torch.random.fork_rng(devices=[]):
            estimator = DensityEstimator(options, standardization, x_shape)
        estimator.flow.load_state_dict(load(weights))
        estimator.eval()
        _check_draw(estimator)
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


def _check_sizes(
    options: TrainOptions,
    standardization: Standardization,
    x_shape: tuple[int, ...],
    weights: int,
) -> None:
    """Refuse an architecture that the weights can't fill, before memory is taken for it."""
    size = standardization.bijection.size
    hidden = options.hidden_features
    at_least = options.transforms * options.blocks * hidden * hidden + math.prod(x_shape) * (
        options.embedding == "none"
    )
    if size < 1 or at_least * 4 > 2 * weights + 4096:
        raise ValueError("the architecture does not fit the weights")


@torch.no_grad()
def _check_draw(estimator: DensityEstimator) -> None:
    """Draw once: shapes and numbers of ``bundle.json`` that do not fit show here."""
    context = estimator.embed(torch.zeros(1, *estimator.x_shape))
    theta = estimator.push(torch.zeros(1, estimator.num_parameters), context)
    if theta.shape != (1, estimator.num_parameters) or not bool(torch.isfinite(theta).all()):
        raise ValueError("its numbers give no draws")
