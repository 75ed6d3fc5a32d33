"""A model in memory, ready to be asked: what its files' content is made into.

Where the content comes from, and which models there are, is not known here.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import read_bundle
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.posterior.sampler import Sampler

__all__ = ["VERDICTS", "Model", "Verdict", "load_model", "verdict_of"]

VERDICTS = ("pass", "warn", "fail")
_LONGEST_SUMMARY = 1000
# Of a model for a service, which loads one while requests wait for it.
_MOST_SECONDS = 60.0
# Draws that are made of a new model at once, and the multiplications that they may take.
_WARM_DRAWS, _WARM_PRODUCTS = 8192, 1e9
# Arrays of a tile as wide as its widest, and tiles whose memory a compiled estimator keeps.
_ARRAYS, _TILES, _COLUMNS, _OF_TILE = 5, 8, 4096, 2**20


class Verdict(NamedTuple):
    """What calibration found: one of ``VERDICTS`` or ``none``, and in a few words why."""

    verdict: str
    summary: str


_UNCHECKED = Verdict("none", "the model's calibration was not checked")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that can be asked.

    Attributes:
        id: name of its folder.
        posterior: compiled for the service's device, and warm.
        about: the content of its ``bundle.json``.
        verdict, verdict_summary: see :class:`Verdict`.
        num_bytes: about how much memory it takes.
    """

    id: str
    posterior: Posterior
    about: dict[str, Any]
    verdict: str
    verdict_summary: str
    num_bytes: int

    def judged(self, verdict: Verdict | None) -> Model:
        """With a verdict; None is that of ``bundle.json``, if it has one."""
        found = verdict or verdict_of(self.about.get("calibration")) or _UNCHECKED
        return dataclasses.replace(self, verdict=found.verdict, verdict_summary=found.summary)


def verdict_of(data: Any) -> Verdict | None:
    """The verdict in JSON data, or as text; None where there is no valid one."""
    if isinstance(data, bytes):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError):
            return None
    verdict = data.get("verdict") if isinstance(data, dict) else None
    if not isinstance(verdict, str) or verdict not in VERDICTS:
        return None
    summary = data.get("summary")
    words = " ".join(summary.split()) if isinstance(summary, str) else ""
    return Verdict(verdict, words.encode(errors="replace").decode()[:_LONGEST_SUMMARY])


def load_model(
    model_id: str,
    text: bytes,
    weights: bytes,
    verdict: Verdict | None,
    device: str,
    threads: int,
) -> Model:
    """A model of its files' content, which may be anyone's.

    Raises:
        InputError: they are no model, or one that can't be served.
    """
    where = f"models/{model_id}"
    estimator, about = read_bundle(text, weights, where, _MOST_SECONDS)
    posterior = Posterior.of_bundle(estimator, about, where)
    posterior.sampler = Sampler(estimator, device, threads)
    _warm(posterior)
    size = _num_bytes(posterior, len(text), len(weights))
    return Model(model_id, posterior, about, "none", "", size).judged(verdict)


def _members(posterior: Posterior) -> tuple[DensityEstimator, ...]:
    estimator = posterior.estimator
    return estimator.members if isinstance(estimator, Ensemble) else (estimator,)


def _num_bytes(posterior: Posterior, text: int, weights: int) -> int:
    # The weights as they are and compiled; numbers of JSON, which are kept as Python's.
    total = 3 * text + 3 * weights
    for member in _members(posterior):
        options, size = member.options, member.num_parameters
        outputs = 2 * size if options.estimator == "maf" else (size + 1) // 2 * (3 * options.bins)
        width = max(options.hidden_features, outputs)
        total += 4 * _TILES * _ARRAYS * min(_COLUMNS * width, _OF_TILE)
    return total


def _centre(posterior: Posterior) -> Tensor:
    """An x in the midst of the training simulations, (1, *x_shape)."""
    scales = _members(posterior)[0].standardization
    x = scales.x_mean
    if scales.x_scale == "log":
        x = x.exp()
    elif scales.x_scale == "asinh":
        x = x.sinh() * scales.x_width + scales.x_centre
    return x.float()[None]


def _warm(posterior: Posterior) -> None:
    """Draw in ways that have kernels and memory of their own, so that no request is the first."""
    x = _centre(posterior)
    most = int(_WARM_PRODUCTS / posterior.estimator.num_weights)
    many = max(16, min(_WARM_DRAWS, most))
    for rows, count in ((1, 1), (1, many), (max(1, many // 64), 16)):
        observations = x.expand(rows, *x.shape[1:]).contiguous()
        theta, log_q = posterior.draws(observations, count, 0, with_log_prob=True)
        assert log_q is not None
        if not bool(torch.isfinite(theta).all() and torch.isfinite(log_q).all()):
            raise InputError("its draws are not finite for an x like those it was trained on")
    posterior.sampler.log_prob(theta.transpose(0, 1), observations)
    posterior.out_of_distribution(observations)
