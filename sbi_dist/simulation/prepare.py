"""What comes before the first simulation: the simulator's form, the manifest, the plan.

Also how a simulator is packed for other processes.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from sbi_dist.errors import InputError
from sbi_dist.priors import prior_to_data
from sbi_dist.problem import ATTEMPTS, Problem, local_modules
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.isolation import Crashed, TimedOut, forked
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.simulation.plan import Extent, shard_size_for
from sbi_dist.simulation.shard import versions
from sbi_dist.simulator import SimulatorForm

__all__ = ["FORMAT", "begin", "find_form", "ship"]

# Changes when the same problem and seed give other shards than before.
FORMAT = 2
# Calls of the simulator that finding its form takes at most, roughly.
_CALLS = 40


def find_form(problem: Problem, options: SimulateOptions) -> SimulatorForm:
    """The simulator's form, found in a process of its own that it may hang or crash.

    Where Ray is connected, whose threads a fork would not have, it is found in this process.

    Raises:
        InputError: it can't be run on draws of the prior, in any of three sets of them.
    """
    import ray
    import torch

    if problem.known_form is not None or ray.is_initialized() or threading.active_count() > 1:
        return problem.form()

    def find(attempt: int) -> SimulatorForm:
        # The threads of this process's parallel loops are not in the fork.
        torch.set_num_threads(1)
        return problem.find_form(attempt)

    problem.source()  # as it is before anything more is imported
    limit = None if options.timeout_s is None else 10.0 + _CALLS * options.timeout_s
    reason: Exception | None = None
    for attempt in range(ATTEMPTS):
        try:
            problem.known_form = forked(functools.partial(find, attempt), limit)
            return problem.known_form
        except (Crashed, TimedOut, InputError) as error:
            reason = reason or error
    if isinstance(reason, InputError):
        raise reason
    raise InputError(
        f"problem.simulator can't be run on draws of the prior: {reason}, in each of {ATTEMPTS} "
        "trials; mend it, or say what it takes with Problem(batched=...)"
    )


def begin(problem: Problem, options: SimulateOptions, dataset: Dataset) -> dict[str, Any]:
    """Begin or extend a dataset as the options ask; its manifest."""
    form = problem.form()
    size = options.shard_size or shard_size_for(
        options.num_simulations,
        form.batched,
        problem.num_parameters + max(1, _product(form.x_shape)),
    )
    if form.batched and options.batch_size and options.shard_size is None:
        # Whole batches, so that none is shorter than asked for.
        size = max(options.batch_size, size - size % options.batch_size)
    first = Extent(first=0, start=0, shard_size=size, stop=options.num_simulations)
    manifest, _ = dataset.create(_manifest(problem, options, form), first)
    dataset.extend(options.num_simulations, size)
    return manifest


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _manifest(problem: Problem, options: SimulateOptions, form: SimulatorForm) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "problem": problem.fingerprint(),
        "prior": prior_to_data(problem.prior),
        "parameter_names": list(problem.parameter_names or ()),
        "parameter_units": list(problem.parameter_units or ()),
        "x_shape": list(form.x_shape),
        "columns": {
            "simulation_id": "int64",
            "theta": f"float32 {[problem.num_parameters]}",
            "x": f"float32 {list(form.x_shape)}",
            "status": "string",
            "error": "string",
            "duration_s": "float32, seconds",
        },
        "seed": options.seed,
        "batch_size": options.batch_size,
        "versions": {**versions(), **problem.package_versions()},
    }


def ship(thing: Any, what: str, problem: Problem) -> bytes:
    """Pickle for other processes; code that they can't import travels by value.

    Raises:
        InputError: it can't be pickled.
    """
    from ray import cloudpickle

    for part in (problem.simulator, problem.log_likelihood, problem.prior):
        for module in local_modules(part):
            cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(thing)
    except Exception as error:
        raise InputError(
            f"{what} can't be sent to the workers ({type(error).__name__}: {error}); make what it "
            "needs inside the function, not outside of it"
        ) from error
