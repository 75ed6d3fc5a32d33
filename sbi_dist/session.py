"""The connection to Ray: an existing cluster, or a small one on this machine for this process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlparse

from sbi_dist.errors import InputError, StageError
from sbi_dist.growth import PATIENCE_S, fitting, grow

__all__ = ["capacity", "connect", "connected", "is_own", "require"]

# Ray Train polls its workers every two seconds by default, which a short training would wait for.
_QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}


_own = False  # whether this process started the Ray that it is connected to


def is_own() -> bool:
    """Whether the Ray in use is this process's own, on this machine and for its time only."""
    return _own


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to Ray for the duration of a ``with`` block; see :func:`connect`."""
    import ray

    began = connect(address)
    try:
        yield
    finally:
        if began:
            ray.shutdown()


def connect(address: str | None = None) -> bool:
    """Connect to Ray until the process ends; whether there was no connection before.

    Joins the cluster at ``address`` (or at the environment's ``RAY_ADDRESS``, which a submitted
    Ray job has), or starts a local one.

    Raises:
        InputError: no cluster answers at the address.
    """
    global _own
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    # Of Ray's own messages only errors are the user's concern.
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _answers(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        else:
            # "local", as without it Ray joins whatever it finds on this machine.
            ray.init(
                address="local",
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
    _own = not address
    # Ray puts its own handler there, with another exit code.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
    return True


def _answers(address: str) -> None:
    """Check that something listens at ``host:port``; Ray itself would try for minutes.

    Raises:
        InputError: nothing does.
    """
    parsed = urlparse(address if "://" in address else f"//{address}")
    try:
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        if address in ("auto", "local"):
            return
        raise InputError(f"--address {address!r} must be host:port, ray://host:port, auto or local")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"--address: no Ray cluster can be reached at {address!r} "
            f"({error.strerror or error}); give the address of a running one, or none to start one "
            "here"
        ) from error


def capacity(resources: dict[str, float]) -> int:
    """How many processes with these resources the cluster's nodes can hold, were they empty."""
    import ray

    return sum(fitting(node["Resources"], resources) for node in ray.nodes() if node.get("Alive"))


def require(
    resources: dict[str, float], count: int, field: str, patience_s: float = PATIENCE_S
) -> None:
    """See to it that the cluster can hold ``count`` processes with these resources, were it empty.

    Nodes that the cluster's autoscaler may add are waited for, for ``patience_s`` at most. Ray
    would wait for ever for what is not there.

    Raises:
        InputError: names the field, what it asks for, what there is and what might be added.
        StageError: the autoscaler's nodes did not start in time.
    """
    import ray

    if capacity(resources) >= count:
        return
    more = ""
    if not _own:
        more = grow(resources, count, field, lambda: capacity(resources), patience_s)
        if not more:
            return
        more = f", and {more}"
    there = ray.cluster_resources()
    for name, each in resources.items():
        have = there.get(name, 0.0)
        if each * count > have:
            unit = "GB of memory" if name == "memory" else f"{name}s"
            scale = 1e9 if name == "memory" else 1
            raise InputError(
                f"{field} asks for {count} x {each / scale:g} = {each * count / scale:g} {unit}, "
                f"and the Ray cluster has {have / scale:g}{more}; ask for less, or give --address "
                "of a larger cluster"
            )
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
    raise InputError(
        f"{field} asks for {count} x ({wanted}), and the nodes of the Ray cluster have room for "
        f"{capacity(resources)} of these{more}; ask for less, or give --address of a larger "
        "cluster"
    )
