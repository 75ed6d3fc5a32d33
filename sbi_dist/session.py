"""The connection to Ray: an existing cluster, or a small one on this machine for this process."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from sbi_dist.errors import InputError, StageError

__all__ = ["connected", "require"]

# Ray Train polls its workers every two seconds by default, which a short training would wait for.
_QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to Ray for the duration of a ``with`` block.

    Keeps a connection that is there already. Otherwise joins the cluster at ``address`` (or at the
    environment's ``RAY_ADDRESS``, which a submitted Ray job has), or starts a local one and ends
    it afterwards.

    Raises:
        InputError: no cluster answers at the address.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    # Of Ray's own messages only errors are the user's concern.
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        else:
            ray.init(
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                object_store_memory=512 * 1024**2,
                configure_logging=False,
            )
    except (ConnectionError, ValueError, TimeoutError) as error:
        where = f"at {address!r}" if address else "on this machine"
        raise InputError(
            f"--address: no Ray cluster can be reached {where} ({error}); give the address of a "
            "running one, or none to start one here"
        ) from error
    except RuntimeError as error:
        raise StageError(f"Ray could not start ({error})") from error
    try:
        yield
    finally:
        ray.shutdown()


def require(cpus: float, gpus: float, count: int, field: str) -> None:
    """Check that the cluster can ever hold ``count`` processes of so many CPUs and GPUs.

    Ray would wait for ever for what is not there.

    Raises:
        InputError: names the field, what it asks for and what there is.
    """
    import ray

    there = ray.cluster_resources()
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        have = there.get(name, 0.0)
        if each and each * count > have:
            raise InputError(
                f"{field} asks for {count} x {each:g} = {each * count:g} {name}s, and the Ray "
                f"cluster has {have:g}; ask for less, or give --address of a larger cluster"
            )
