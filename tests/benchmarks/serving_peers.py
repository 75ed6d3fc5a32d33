"""What the service is compared with, each a process of its own that answers HTTP requests.

``python -m tests.benchmarks.serving_peers PEER PORT [SECONDS]`` prints ``ready``, and ends with its
standard input. ``haproxy`` and ``ray``: an empty application on Ray Serve, one replica, behind that
proxy, with the service's settings. ``sbi``: FastAPI and uvicorn, one process, and the posterior of
sbi's own NPE with a neural spline flow, trained on the same problem. ``sbi-bulk``: no server; draws
a second of sbi's batched sampler, within so many seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request

from sbi_dist.problems.gaussian import HIGH, LOW, NOISE_SD, SHIFT
from sbi_dist.session import connect

_SIMULATIONS, _EPOCHS = 10_000, 15


def empty(proxy: str, port: int) -> None:
    """Serve an application that does nothing."""
    from sbi_dist.serving.command import environment
    from sbi_dist.serving.options import ServeOptions

    options = ServeOptions(proxy=proxy, port=port)
    folder = tempfile.TemporaryDirectory()
    os.environ.update(environment(options, Path(folder.name)))
    connect(None)
    from ray import serve

    app = FastAPI()

    @app.post("/")
    async def nothing(request: Request) -> dict[str, bool]:
        await request.body()
        return {"ok": True}

    @serve.deployment(max_ongoing_requests=2048, ray_actor_options={"num_cpus": 1})
    @serve.ingress(app)
    class Empty:
        pass

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Empty.bind(), name="empty", route_prefix="/")  # type: ignore[attr-defined]
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
    folder.cleanup()


def sbi_posterior() -> Any:
    """The posterior of sbi's NPE, with its own defaults but for the number of epochs."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    low, high = torch.full((3,), float(np.min(LOW))), torch.full((3,), float(np.max(HIGH)))
    prior: Any = BoxUniform(low, high)
    theta = prior.sample((_SIMULATIONS,))
    shift = torch.as_tensor(SHIFT, dtype=torch.float32)
    x = theta + shift + torch.as_tensor(NOISE_SD, dtype=torch.float32) * torch.randn_like(theta)
    inference = NPE(prior, density_estimator="nsf", show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=_EPOCHS)
    return inference.build_posterior()


def sbi(port: int) -> None:
    """Serve sbi's posterior as one would by hand."""
    import uvicorn

    posterior = sbi_posterior()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        print("ready", flush=True)
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/")
    def sample(question: dict[str, Any]) -> dict[str, Any]:
        x = torch.tensor(question["x"], dtype=torch.float32)
        number = (int(question["num_samples"]),)
        return {"draws": posterior.sample(number, x, show_progress_bars=False).tolist()}

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    uvicorn.run(app, port=port, log_level="error", access_log=False)


def sbi_bulk(seconds: float) -> None:
    """Print draws a second, of the largest request that is expected to end in time."""
    posterior = sbi_posterior()
    rate, observations, took = 0.0, 10, 0.0
    while observations <= 1000 and 10 * took < seconds:
        x = torch.rand(observations, 3) * 2
        began = time.perf_counter()
        posterior.sample_batched((1000,), x, show_progress_bars=False)
        took = time.perf_counter() - began
        rate = observations * 1000 / took
        observations *= 10
    print("ready", flush=True)
    print(rate, flush=True)


if __name__ == "__main__":
    peer, number = sys.argv[1], float(sys.argv[2])
    if peer == "sbi":
        sbi(int(number))
    elif peer == "sbi-bulk":
        sbi_bulk(number)
    else:
        empty(peer, int(number))
