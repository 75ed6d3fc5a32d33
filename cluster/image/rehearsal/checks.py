"""What a built image must do, run in it as a strict pod would run it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.image.rehearsal.build import Failed
from cluster.image.rehearsal.container import Container, Image

__all__ = ["check"]

_SMALL = [
    *("--set", "simulate.num_simulations=400"),
    *("--set", "train.max_epochs=3"),
    *("--set", "train.hidden_features=16"),
]
# What KubeRay asks a head's and a worker's container by default.
_PROBES = {
    "raylet": "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz",
    "gcs": "wget --tries 1 -T 2 -q -O- http://localhost:8265/api/gcs_healthz",
}
_SHIPPED = """
from sbi_dist.experiment import load_experiment, shipped
from sbi_dist.problem import load_problem
for name in shipped():
    experiment, folder = load_experiment(name)
    load_problem(experiment.problem, folder)
print(len(shipped()))
"""
# What Triton does first for every kernel; the rest needs a GPU.
_TRITON = """
import torch
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "empty", 0, -1, 0};
PyMODINIT_FUNC PyInit_empty(void) { return PyModule_Create(&definition); }
'''
assert torch.version.cuda
print(compile_module_from_src(source, "empty"))
"""


def check(image: Image, version: str) -> None:
    """Run every check.

    Raises:
        Failed: one did not hold; with what the command printed.
    """
    checks: dict[str, Callable[[], None]] = {
        "the user can't change the code": lambda: _code_is_fixed(image),
        "no secret and no setting of the build": lambda: _environment(image),
        "the default command": lambda: _says(image, image.command, "Usage: sbi-dist"),
        "the version": lambda: _says(image, ["sbi-dist", "--version"], version),
        "an experiment by name": lambda: _says(image, ["sbi-dist", "status", "gaussian"], "2000"),
        "the script of a job": lambda: _says(image, ["python", "jobs/status.py", "sir"], "sir"),
        "a login shell": lambda: _says(
            image, ["bash", "-lc", "command -v ray python; id -u; umask"], "/opt/venv/bin/ray"
        ),
        "packages that fit each other": lambda: _says(image, ["pip", "check"], "No broken"),
        "every shipped experiment": lambda: _says(image, ["python", "-c", _SHIPPED], "12"),
        "a whole pipeline, and serving": lambda: _pipeline(image),
        "a Ray head": lambda: _head(image, {}),
        "a Ray head with a token": lambda: _head(
            image, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ),
    }
    if image.labels["io.sbi-dist.variant"] == "cuda":
        checks["Triton's compiler"] = lambda: _says(image, ["python", "-c", _TRITON], "empty")
    for name, holds in checks.items():
        began = time.monotonic()
        holds()
        print(f"ok: {name} ({time.monotonic() - began:.0f} s)", flush=True)


def _run(image: Image, command: Sequence[str], hardened: bool = True) -> tuple[int, str]:
    process = Container(image, hardened).start(
        [*image.entrypoint, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output = process.communicate(timeout=300)[0]
        return process.returncode, output
    finally:
        process.kill()
        process.wait()


def _says(image: Image, command: Sequence[str], expected: str) -> None:
    status, output = _run(image, command)
    if status or expected not in output:
        raise Failed(f"{command}: exit status {status}, without {expected!r}: {output}")


def _code_is_fixed(image: Image) -> None:
    places = (
        "/opt/venv/bin /opt/venv/lib/python3*/site-packages/sbi_dist ~/jobs /etc /usr/local/bin"
    )
    script = f"for place in {places}; do ! test -w $place || echo can write: $place; done; id -u"
    status, output = _run(image, ["sh", "-c", script], hardened=False)
    if status or output.strip() != "1000":
        raise Failed(f"what the user may write: {output}")
    if image.user != "1000:1000":
        raise Failed(f"USER {image.user} must be 1000:1000")


def _environment(image: Image) -> None:
    words = ("SECRET", "TOKEN", "PASSWORD", "AWS_", "PIP_", "PROXY")
    found = [name for name in image.environment if any(word in name.upper() for word in words)]
    if found:
        raise Failed(f"environment of the image: {found}")
    left = [path for path in (image.tree / "build", image.tree / "project") if path.exists()]
    if left:
        raise Failed(f"left behind by the build: {left}")


def _pipeline(image: Image) -> None:
    """Experiment to report, then the service until it is asked to end."""
    script = (
        f"sbi-dist run gaussian --store /tmp/runs {' '.join(_SMALL)} "
        "&& test -s /tmp/runs/gaussian/report/index.html "
        f"&& exec sbi-dist serve gaussian --store /tmp/runs {' '.join(_SMALL)}"
    )
    with _started(image, ["bash", "-c", script], {}) as (container, first):
        _until_it_holds(container, first, "health check", " ".join(image.health), within_s=150)
        asked = "wget -q -O- http://127.0.0.1:8000/v1/models"
        _until_it_holds(container, first, "models", asked)
        _end(first, signal.SIGTERM)


def _head(image: Image, environment: dict[str, str]) -> None:
    """Started, asked, used and ended as by KubeRay."""
    command = ["ray", "start", "--head", "--block", "--num-cpus=2"]
    with _started(image, command, environment) as (
        container,
        first,
    ):
        if container.beside(first, image.health).returncode == 0:
            raise Failed("the health check holds before Ray is there")
        for name, probe in {
            **{name: f"{probe} | grep success" for name, probe in _PROBES.items()},
            "health check": " ".join(image.health),
        }.items():
            _until_it_holds(container, first, name, probe)
        work = f"sbi-dist simulate gaussian --store /tmp/runs {' '.join(_SMALL)} --address auto"
        done = container.beside(first, ["bash", "-c", work])
        if done.returncode:
            raise Failed(f"{work}: {done.stdout}{done.stderr}")
        _end(first, signal.SIGTERM)


@contextmanager
def _started(
    image: Image, command: Sequence[str], environment: dict[str, str]
) -> Iterator[tuple[Container, int]]:
    """A container, and the id of its first process as seen from here."""
    container = Container(image, environment=environment)
    quiet = subprocess.DEVNULL
    process = container.start([*image.entrypoint, *command], stdin=quiet, stdout=quiet)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 20
        while True:
            found = children.read_text().split()
            with suppress(OSError, IndexError):
                if b"tini" in Path(f"/proc/{found[0]}/cmdline").read_bytes().split(b"\0")[0]:
                    break
            if time.monotonic() > deadline or process.poll() is not None:
                raise Failed(f"{command} does not start")
            time.sleep(0.05)
        yield container, int(found[0])
    finally:
        process.kill()
        process.wait()


def _until_it_holds(
    container: Container, first: int, name: str, probe: str, within_s: float = 60
) -> None:
    deadline = time.monotonic() + within_s
    while (done := container.beside(first, ["bash", "-c", probe])).returncode:
        if time.monotonic() > deadline:
            raise Failed(f"{name}: {probe}: {done.stdout}{done.stderr}")
        time.sleep(0.5)


def _end(first: int, number: signal.Signals) -> None:
    os.kill(first, number)
    deadline = time.monotonic() + 25  # of the 30 s that Kubernetes gives
    while Path(f"/proc/{first}").exists():
        if time.monotonic() > deadline:
            raise Failed(f"the container does not end within 25 s of {number.name}")
        time.sleep(0.1)
