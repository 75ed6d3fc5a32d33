"""The service on Ray Serve: replicas, how many of them, and how one ends.

``build`` is what a Serve configuration names as ``import_path``; its arguments are an experiment
and what overrides its fields.
"""

from __future__ import annotations

import gc
import json
import math
from typing import Any

import torch
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from sbi_dist.errors import InputError
from sbi_dist.experiment import Experiment, load_experiment
from sbi_dist.serving.app import make_app
from sbi_dist.serving.options import ServeOptions
from sbi_dist.serving.service import Service
from sbi_dist.store import ObjectStore, open_store

__all__ = ["build", "deployed", "replicas_wanted"]

# How long the store may be silent before a request for a model that is not loaded is refused.
_PATIENCE_S = 10.0
_QUEUED_S, _TARGET_S = "queued_seconds", "target_seconds"


def replicas_wanted(queued_s: float, target_s: float, running: int, least: int, most: int) -> int:
    """As many replicas as finish all that waits within the target time.

    Args:
        queued_s: seconds that all that waits would take one replica.
        target_s: expected wait that is wanted at most.
        running: replicas that there are.
    """
    wanted = math.ceil(queued_s / target_s)
    if wanted < running and queued_s > 0.5 * target_s * (running - 1):
        wanted = running  # no fewer, if those were then just about as busy
    return max(least, min(most, wanted))


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Ray Serve's question for the number of replicas, answered by what they say waits."""
    measured = context.aggregated_metrics or {}
    queued = sum(measured.get(_QUEUED_S, {}).values())
    targets = list(measured.get(_TARGET_S, {}).values())
    running = context.current_num_replicas
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    if not targets:
        return max(least, min(most, context.target_num_replicas)), {}
    return replicas_wanted(queued, targets[0], running, least, most), {}


@serve.deployment
@serve.ingress()
class Posteriors:
    """One replica.

    Args:
        store: the experiment's folder.
        experiment: its name.
        options: of the stage.
    """

    async def __init__(  # type: ignore[misc]
        self, store: ObjectStore, experiment: str, options: ServeOptions
    ) -> None:
        torch.set_num_threads(max(1, int(options.cpus_per_replica)))
        device = "cuda" if options.gpus_per_replica else "cpu"
        name = serve.get_replica_context().replica_id.unique_id
        self._service = Service(store, experiment, options, name, device)
        # A replica takes requests once this returns: with the promoted model loaded and warm.
        await self._service.start()
        # What there is now stays: else each full collection looks at it all, for 0.2 s under load.
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self._service, manages=False)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        queue = self._service.queue
        return {
            _QUEUED_S: queue.queued / queue.rate,
            _TARGET_S: self._service.options.target_wait_s,
        }

    async def check_health(self) -> None:
        if not self._service.queue.alive:
            raise RuntimeError("the thread that draws has ended")


def deployed(experiment: Experiment) -> serve.Application:
    """The application of an experiment's service."""
    options = experiment.serve
    store = open_store(experiment.store, min(_PATIENCE_S, experiment.store_patience_s))
    scaling: dict[str, Any] = {"num_replicas": options.min_replicas}
    most = options.max_replicas or options.min_replicas
    if most > options.min_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.min_replicas,
                max_replicas=most,
                initial_replicas=options.min_replicas,
                upscale_delay_s=3.0,
                downscale_delay_s=120.0,
                policy=AutoscalingPolicy(policy_function=scale),
            )
        }
    return Posteriors.options(  # type: ignore[attr-defined]
        name="posteriors",
        # The service itself turns away what is too much, with a reason.
        max_ongoing_requests=4 * options.max_requests,
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        ray_actor_options={
            "num_cpus": options.cpus_per_replica,
            "num_gpus": options.gpus_per_replica,
        },
        **scaling,
    ).bind(store.child(experiment.name), experiment.name, options)


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application, by what a Serve configuration says.

    Args:
        arguments: ``experiment``, a file or the name of a shipped experiment; and, by their paths,
            fields that override its own, as ``{"store": ..., "serve.max_replicas": 8}``.

    Raises:
        InputError: there is no such experiment or field, or a value is not what the field takes.
    """
    given = dict(arguments)
    reference = given.pop("experiment", None)
    if not isinstance(reference, str) or not reference:
        raise InputError(
            f"args.experiment is {reference!r}; give a file, or the name of a shipped experiment"
        )
    # JSON is YAML, which overrides are in: each value stays of the type that it has here.
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    return deployed(load_experiment(reference, overrides)[0])
