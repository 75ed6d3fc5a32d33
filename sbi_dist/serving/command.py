"""``sbi-dist serve``: start the service on Ray, say where it is, and end it in order."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sbi_dist.errors import InputError, StageError
from sbi_dist.experiment import Experiment
from sbi_dist.promotion import Promotion
from sbi_dist.serving.options import ServeOptions
from sbi_dist.serving.tokens import Tokens
from sbi_dist.session import connected, require
from sbi_dist.store import ObjectStore

__all__ = ["environment", "serve"]

_APPLICATION = "sbi_dist"
_LOOK_EVERY_S = 1.0
# A load balancer needs this to see that a replica ends; HAProxy looks four times a second.
_LEAVING_S = 3
_GRACE_S = 10.0  # for what is to be done beside waiting
# HAProxy takes paths of sockets up to 97; Serve appends a node's id and a name to the folder's.
_LONGEST_FOLDER = 97 - len("/admin.sock") - 57
_RANDOM = 8  # characters that mkdtemp appends
_PORTS = range(20_000, 30_000)


def serve(
    experiment: Experiment,
    store: ObjectStore,
    address: str | None,
    detach: bool,
    say: Callable[[str], None],
) -> None:
    """Serve an experiment's models until interrupted; on a cluster, ``detach`` leaves it running.

    Args:
        store: the experiment's folder.
        say: prints a line for the user.

    Raises:
        InputError: the port is taken, there is no model, or no room on the cluster.
        StageError: the service does not start, or ends by itself.
    """
    options = experiment.serve
    own = address is None and not os.environ.get("RAY_ADDRESS")
    if detach and own:
        raise InputError("--detach needs --address of a cluster that goes on running")
    if options.tokens_file is not None:
        Tokens(options.tokens_file)
    _require_model(store)
    if own:
        _require_port(options)
    folder = _folder()
    try:
        for name, value in environment(options, folder).items():
            os.environ.setdefault(name, value)
        _run(experiment, address, detach, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    experiment: Experiment, address: str | None, detach: bool, say: Callable[[str], None]
) -> None:
    with contextlib.ExitStack() as ending:
        ending.enter_context(connected(address))
        # Imported late: Serve reads its settings from the environment when it is imported.
        from ray import serve as ray_serve

        from sbi_dist.serving.deployment import deployed

        options = experiment.serve
        require(options.resources(), options.min_replicas, "serve.min_replicas")
        # Ray sets its own level when it is imported; of its messages only errors are the user's.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if not detach:
            # Before it is begun: an interrupt may come in its midst.
            ending.callback(_end, options.drain_s)
        try:
            ray_serve.start(http_options={"host": options.host, "port": options.port})
            ray_serve.run(deployed(experiment), name=_APPLICATION, route_prefix="/", blocking=False)
        except RuntimeError as error:
            raise StageError(
                f"serve: the service did not start ({str(error).splitlines()[-1][:300]}); the "
                "replicas' log files in Ray's folder tell more"
            ) from error
        host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        url = f"http://{host}:{options.port}"
        say(f"serve: {experiment.name} is served at {url}/ (page), {url}/docs (interface)")
        if detach:
            say("serve: it goes on running; end it with `serve shutdown` on the cluster")
            return
        say("serve: Ctrl-C ends it")
        try:
            while _APPLICATION in ray_serve.status().applications:
                time.sleep(_LOOK_EVERY_S)
        except KeyboardInterrupt:
            say("serve: requests that are being answered are finished, then it ends")
            raise
        raise StageError("serve: the service was ended from elsewhere")


def _end(drain_s: float) -> None:
    """End the application, and Serve if nothing else is served."""
    from ray import serve as ray_serve

    # The load balancer goes last, as Serve ends it without regard to the requests in it.
    ray_serve.delete(_APPLICATION, _blocking=False)
    end = time.monotonic() + drain_s + _LEAVING_S + _GRACE_S
    while time.monotonic() < end and _APPLICATION in ray_serve.status().applications:
        time.sleep(_LOOK_EVERY_S / 4)
    if ray_serve.status().applications.keys() <= {_APPLICATION}:
        # Ray tells on standard output that the controller, which ends itself, has ended.
        with contextlib.redirect_stdout(io.StringIO()):
            ray_serve.shutdown()
            # Ray hears of it a little later.
            time.sleep(_LOOK_EVERY_S / 4)


def _folder() -> Path:
    """A new folder for what HAProxy needs; its sockets' paths may not be long."""
    temporary = tempfile.gettempdir()
    fits = len(temporary) + len("/sbi-") + _RANDOM <= _LONGEST_FOLDER
    return Path(tempfile.mkdtemp(prefix="sbi-", dir=temporary if fits else "/tmp"))


def _require_model(store: ObjectStore) -> None:
    promotion = Promotion(store)
    if promotion.model is None:
        raise InputError(f"{store.uri} {promotion.why_none()}")


def _require_port(options: ServeOptions) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(
                    f"serve.host is {options.host!r}, where this machine can't listen "
                    f"({error.strerror}); give one of its IPv4 addresses, as 127.0.0.1, or 0.0.0.0 "
                    "for all of them"
                ) from error
            raise InputError(
                f"serve.port is {options.port} on {options.host!r}, which can't be had "
                f"({error.strerror}); set another with --set serve.port=N"
            ) from error


def environment(options: ServeOptions, folder: Path) -> dict[str, str]:
    """What Ray Serve reads when it starts on this machine."""
    settings = {
        # Without a thread of its own for the application, a request costs less.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # That would also keep lines of the log back until there are a thousand.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_LEAVING_S),
    }
    if options.proxy == "haproxy":
        ports = [str(port) for port in _free_ports(4)]
        settings |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": ports[0],
            "RAY_SERVE_HAPROXY_STATS_PORT": ports[1],
            # Where HAProxy turns while no replica answers. By default all services of a machine
            # share these ports, and get each other's requests, past their tokens.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ports[2],
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": ports[3],
            "RAY_SERVE_HAPROXY_NBTHREAD": "1" if (os.cpu_count() or 1) < 8 else "4",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(options.drain_s) + 5),
        }
    return settings


def _free_ports(count: int) -> list[int]:
    """Ports outside of the ranges that Ray's processes and the system take theirs from."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise StageError("serve: there are no free ports between 20000 and 29999 on this machine")
