"""The one catalogue of metric names.

What a metric means is decided by the stage that sets it. Every one is used by a panel or an alert
of ``cluster/``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["CATALOGUE", "Metric"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    Counters only grow and end with ``_total``, gauges go up and down, and histograms count values
    by upper bound of the bucket that they fall into, with one bucket more above the last bound.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    description: str
    labels: tuple[str, ...] = ("experiment", "model")
    boundaries: tuple[float, ...] = ()


_OF_DATASET = ("experiment", "dataset")
_BY_RANK = ("experiment", "model", "rank")
_OF_CATALOG = ("experiment", "catalog")
_OF_SERVICE = ("experiment",)
_OF_REPLICA = ("experiment", "replica")

# A boundary at the half second that the objective of the service is about.
_REQUEST_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_QUEUE_S = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
_DRAWS = (1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7)
_PIECES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "sbi_simulate_simulations_total",
            "counter",
            "Simulations whose shards were stored, by status.",
            (*_OF_DATASET, "status"),
        ),
        Metric(
            "sbi_simulate_shards_total",
            "counter",
            "Shards that were stored.",
            _OF_DATASET,
        ),
        Metric(
            "sbi_simulate_busy_seconds_total",
            "counter",
            "Time that the stored simulations took, summed over them.",
            _OF_DATASET,
        ),
        Metric(
            "sbi_simulate_actor_deaths_total",
            "counter",
            "Times that an actor was lost while it simulated.",
            _OF_DATASET,
        ),
        Metric(
            "sbi_simulate_actors",
            "gauge",
            "Actors that simulate.",
            _OF_DATASET,
        ),
        Metric(
            "sbi_simulate_simulations_per_second",
            "gauge",
            "Rate at which simulations are stored, over the run so far.",
            _OF_DATASET,
        ),
        Metric(
            "sbi_simulate_seconds_left",
            "gauge",
            "Expected time to the end of the dataset.",
            _OF_DATASET,
        ),
        Metric(
            "sbi_train_loss",
            "gauge",
            "Mean training loss of the epoch so far, in nats.",
        ),
        Metric(
            "sbi_train_validation_loss",
            "gauge",
            "Validation loss of the last epoch that ended, in nats.",
        ),
        Metric(
            "sbi_train_best_validation_loss",
            "gauge",
            "Lowest validation loss so far, in nats.",
        ),
        Metric("sbi_train_learning_rate", "gauge", "Learning rate of the last step."),
        Metric("sbi_train_epoch", "gauge", "Number of the epoch, from 1."),
        Metric(
            "sbi_train_simulations_total",
            "counter",
            "Simulations that training steps were taken on by all workers, anew in each epoch.",
        ),
        Metric(
            "sbi_train_simulations_per_second",
            "gauge",
            "Rate at which all workers together train on simulations.",
        ),
        Metric(
            "sbi_train_input_wait_seconds_total",
            "counter",
            "Time that a worker waited for simulations to train on.",
            _BY_RANK,
        ),
        Metric(
            "sbi_train_seconds_left",
            "gauge",
            "Expected time to the end of the training, at most.",
        ),
        Metric(
            "sbi_train_skipped_steps_total",
            "counter",
            "Steps that were not taken as their loss or gradient was not finite.",
        ),
        Metric("sbi_train_checkpoints_total", "counter", "Checkpoints written to the store."),
        Metric(
            "sbi_train_restarts_total",
            "counter",
            "Times that a training went on after its workers were lost.",
        ),
        Metric(
            "sbi_infer_observations_total",
            "counter",
            "Observations of a catalog whose results were stored, by status.",
            (*_OF_CATALOG, "status"),
        ),
        Metric(
            "sbi_infer_draws_total",
            "counter",
            "Posterior draws whose results were stored.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_parts_total",
            "counter",
            "Parts of a catalog's results that were stored.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_actor_deaths_total",
            "counter",
            "Times that an actor was lost while it drew for a part.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_observations_per_second",
            "gauge",
            "Rate at which results of observations are stored, over the run so far.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_infer_seconds_left",
            "gauge",
            "Expected time to the end of the catalog.",
            _OF_CATALOG,
        ),
        Metric(
            "sbi_serve_requests_total",
            "counter",
            "Requests that were answered, by operation and outcome.",
            ("experiment", "operation", "outcome"),
        ),
        Metric(
            "sbi_serve_request_seconds",
            "histogram",
            "Time from the head of a request to the last byte of its answer, where it ended ok.",
            ("experiment", "operation"),
            _REQUEST_S,
        ),
        Metric(
            "sbi_serve_queue_seconds",
            "histogram",
            "Time that a piece of work waited before it was drawn.",
            _OF_SERVICE,
            _QUEUE_S,
        ),
        Metric(
            "sbi_serve_batch_draws",
            "histogram",
            "Cost of a batch in posterior draws.",
            boundaries=_DRAWS,
        ),
        Metric(
            "sbi_serve_batch_pieces",
            "histogram",
            "Pieces of requests that share a batch.",
            boundaries=_PIECES,
        ),
        Metric("sbi_serve_draws_total", "counter", "Posterior draws that were made."),
        Metric(
            "sbi_serve_busy_seconds_total",
            "counter",
            "Time that drawing took.",
            _OF_SERVICE,
        ),
        Metric(
            "sbi_serve_observations_total",
            "counter",
            "Observations that were answered for, by status.",
            ("experiment", "model", "status"),
        ),
        Metric(
            "sbi_serve_out_of_distribution_total",
            "counter",
            "Observations whose p-value against the training simulations is below 0.01.",
        ),
        Metric(
            "sbi_serve_queued_draws",
            "gauge",
            "Draws that admitted requests still wait for.",
            _OF_REPLICA,
        ),
        Metric(
            "sbi_serve_queued_seconds",
            "gauge",
            "Expected time until the draws that admitted requests wait for are made.",
            _OF_REPLICA,
        ),
        Metric(
            "sbi_serve_requests_in_flight",
            "gauge",
            "Requests that are being answered.",
            _OF_REPLICA,
        ),
        Metric(
            "sbi_serve_model_loaded",
            "gauge",
            "Whether a model is loaded: 1 while it is.",
            ("experiment", "model", "replica"),
        ),
        Metric(
            "sbi_serve_model_promoted",
            "gauge",
            "Whether a model is the promoted one that is served: 1 while it is.",
            ("experiment", "model", "replica"),
        ),
        Metric(
            "sbi_serve_model_calibration",
            "gauge",
            "Verdict on the calibration of the promoted model that is served: 1 for that one.",
            ("experiment", "model", "verdict"),
        ),
        Metric(
            "sbi_serve_model_loads_total",
            "counter",
            "Times that a model was to be loaded, by outcome.",
            ("experiment", "outcome"),
        ),
        Metric(
            "sbi_serve_model_bytes",
            "gauge",
            "Memory that loaded models take.",
            _OF_REPLICA,
        ),
    )
}
