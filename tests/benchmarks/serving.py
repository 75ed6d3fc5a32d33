"""The posterior service: small requests, bulk and overload, in one run with what it is compared to.

``python -m tests.benchmarks.serving`` prints the table; ``--seconds 2`` is quick, ``--replicas``
chooses how many, ``--store`` takes a trained experiment. Load comes from wrk (bulk: from aiohttp),
on the same machine and the same cores: all that is measured shares them. Small requests are one
observation x 1,000 draws. Compared are: an empty application on Ray Serve behind the same proxy and
behind Ray's own; the bare sampler, one process of one thread for each replica, with nothing beside
it; and sbi's posterior behind FastAPI.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import pyarrow as pa
import torch

from sbi_dist.posterior.posterior import Posterior

__all__ = ["run"]

CONNECTIONS = (1, 16, 64, 256)
BULK = 1000  # observations of a bulk request
DRAWS = 1000  # of an observation
OVERLOAD = 3  # times the measured capacity
_ARROW = "application/vnd.apache.arrow.stream"


class Load(NamedTuple):
    """What came of a load: good answers a second; seconds of all answers; how many were not good.

    Attributes:
        refused: answers that are not 2xx.
        lost: connections that failed, and answers that did not come in time.
    """

    rate: float
    p50: float
    p99: float
    refused: int
    lost: int


def run(arguments: Sequence[str] = ()) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.serving")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args(list(arguments))
    if shutil.which("wrk") is None:
        print("\nServing: there is no program wrk")
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        store = given.store or _trained(place)
        small = json.dumps({"x": [0.5, 0.5, 0.5], "num_samples": DRAWS, "seed": 1}).encode()
        print(f"\nServing (load from wrk on the same {os.cpu_count()} CPUs)")
        empty, peer, bulk = _peers(place, small, given.seconds, given.no_peers)
        for replicas in given.replicas:
            _service(place, store, small, replicas, given.seconds, empty, peer, bulk)


def _peers(
    place: Path, small: bytes, seconds: float, skip: bool
) -> tuple[dict[int, Load], dict[int, Load], float]:
    empty: dict[int, Load] = {}
    if skip:
        return {}, {}, 0.0
    _head("Ray Serve, empty application, one replica")
    for proxy in ("ray", "haproxy"):
        with _peer(proxy) as url:
            for connections in CONNECTIONS:
                load = _load(place, url, small, connections, seconds)
                _row(f"{proxy}, {connections} connections", load)
                if proxy == "haproxy":
                    empty[connections] = load
    peer: dict[int, Load] = {}
    _head("FastAPI + sbi, one process")
    with _peer("sbi") as url:
        for connections in (1, 16):
            peer[connections] = _load(place, url, small, connections, seconds)
            _row(f"sample((1000,), x), {connections} connections", peer[connections])
    command = [sys.executable, "-m", "tests.benchmarks.serving_peers", "sbi-bulk", str(seconds)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    bulk = float(printed.split()[-1])
    print(f"{'sample_batched, no HTTP':44}{bulk / 1e6:>10.4f} M draws/s")
    return empty, peer, bulk


def _service(
    place: Path,
    store: Path,
    small: bytes,
    replicas: int,
    seconds: float,
    empty: dict[int, Load],
    peer: dict[int, Load],
    peer_bulk: float,
) -> None:
    bare = _bare(store, replicas, seconds)
    _head(f"The service, {replicas} replica(s) of one CPU")
    print(f"{'bare samplers, 1 x 1,000':44}{bare[0]:>10.0f} requests/s")
    capacity = 1.0
    with _served(store, replicas) as (url, process):
        ways = (
            ("sample", "application/json"),
            ("sample", _ARROW),
            ("summary", "application/json"),
        )
        for operation, wanted in ways:
            target = f"{url}/v1/models/promoted/{operation}"
            name = operation + (", Arrow" if wanted == _ARROW else ", JSON")
            _load(place, target, small, 16, 1.0, wanted)
            for connections in CONNECTIONS:
                load = _load(place, target, small, connections, seconds, wanted)
                notes = []
                if connections in empty:
                    notes.append(f"{load.rate / empty[connections].rate:.2f} of empty")
                if operation == "sample":
                    notes.append(f"{load.rate / bare[0]:.2f} of bare")
                    if connections in peer and wanted != _ARROW:
                        notes.append(f"{load.rate / peer[connections].rate:.1f}x sbi")
                    if wanted != _ARROW and not load.refused:
                        capacity = max(capacity, load.rate)
                _row(f"{name}, {connections} connections", load, ", ".join(notes))
        body = _many()
        target = f"{url}/v1/models/promoted/sample?num_samples={DRAWS}&seed=1"
        for flight in (1, 4):
            load = asyncio.run(_bulk(target, body, flight, seconds))
            draws = load.rate * BULK * DRAWS
            note = f"{draws / 1e6:.2f} M draws/s, {draws / bare[1]:.2f} of bare"
            if peer_bulk:
                note += f", {draws / peer_bulk:.0f}x sbi"
            _row(f"{BULK:,} x {DRAWS:,}, Arrow, {flight} in flight", load, note)
        print(f"{'bare samplers, 1,000 x 1,000':44}{bare[1] / 1e6:>10.2f} M draws/s")
        before = _memory(process)
        target = f"{url}/v1/models/promoted/sample"
        for _ in range(2):
            print(_overload(place, target, small, OVERLOAD * capacity, max(5.0, seconds)))
        after = _memory(process)
        print(f"{'   replicas, resident':44}{before:>10.0f} MB before, {after:.0f} MB after")


# ---- load ---------------------------------------------------------------------------------------


def _load(
    place: Path,
    url: str,
    body: bytes,
    connections: int,
    seconds: float,
    wanted: str = "application/json",
    given: str = "application/json",
) -> Load:
    """What wrk finds, with so many connections that each wait for their answers."""
    found = _wrk(place, "load", url, body, connections, seconds, GIVEN=given, WANTED=wanted)
    good = found["n"] - found["status"]
    return Load(
        good / (found["us"] / 1e6), found["p50"] / 1e6, found["p99"] / 1e6,
        found["status"], found["lost"],
    )  # fmt: skip


def _wrk(
    place: Path,
    script: str,
    url: str,
    body: bytes,
    connections: int,
    seconds: float,
    **given: str,
) -> dict[str, Any]:
    (place / "body").write_bytes(body)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s"]
    command += ["-s", str(Path(__file__).with_name(f"{script}.lua")), url]
    environment = {**os.environ, "BODY": str(place / "body"), **given}
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


def _overload(place: Path, url: str, body: bytes, rate: float, seconds: float) -> str:
    """What comes of so many requests a second, whether or not they are answered."""
    # Each connection sends every 2 s: it rests for as long as a third of them do not wait, for the
    # 2 s that the service lets a request wait for.
    connections = max(1, round(2 * rate))
    rest_ms = round(2 * 2000 * (1 - 1 / OVERLOAD))
    found = _wrk(place, "overload", url, body, connections, seconds, REST_MS=str(rest_ms))
    taken, took = np.array(found["taken"][:-1]) / 1e6, found["us"] / 1e6
    sent = len(taken) + found["refused"] + found["other"]
    p99 = np.percentile(taken, 99) if len(taken) else float("nan")
    return (
        f"{f'offered {sent / took:.0f}/s':44}{len(taken) / took:>10.1f} answered/s, p99 of "
        f"them {p99:.2f} s, {found['refused'] / sent:.0%} refused (503), {found['other']} failed"
    )


async def _bulk(url: str, body: bytes, flight: int, seconds: float) -> Load:
    """So many requests at a time, over and over; those refused are sent again."""
    headers = {"Content-Type": _ARROW, "Accept": _ARROW}
    took: list[float] = []
    refused = 0
    began = time.perf_counter()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=headers
    ) as session:

        async def ask() -> None:
            nonlocal refused
            while time.perf_counter() - began < seconds:
                start, answered = time.perf_counter(), False
                while not answered:
                    async with session.post(url, data=body) as answer:
                        async for _ in answer.content.iter_chunked(1 << 20):
                            pass
                        answered = answer.status == 200
                        refused += not answered
                    if not answered:
                        await asyncio.sleep(float(answer.headers["Retry-After"]))
                took.append(time.perf_counter() - start)

        await asyncio.gather(*(ask() for _ in range(flight)))
    rate = len(took) / (time.perf_counter() - began)
    return Load(rate, float(np.median(took)), float(np.percentile(took, 99)), refused, 0)


def _many() -> bytes:
    x = np.random.default_rng(1).uniform(-1, 3, (BULK, 3)).astype(np.float32)
    table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(x)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


# ---- what is measured ---------------------------------------------------------------------------


def _trained(place: Path) -> Path:
    for stage in ("simulate", "train"):
        command = [sys.executable, "-m", "sbi_dist", stage, "gaussian"]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
    return place / "runs"


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _peer(name: str) -> Iterator[str]:
    port = _port()
    command = [sys.executable, "-m", "tests.benchmarks.serving_peers", name, str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        _wait_for(process, b"ready")
        time.sleep(1)
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.stdin.close()
            process.wait(60)


@contextlib.contextmanager
def _served(store: Path, replicas: int) -> Iterator[tuple[str, int]]:
    port = _port()
    command = [sys.executable, "-m", "sbi_dist", "serve", "gaussian", "--store", str(store)]
    command += ["--port", str(port), "--set", f"serve.min_replicas={replicas}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        _wait_for(process, b"Ctrl-C")
        time.sleep(1)
        try:
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.send_signal(2)
            process.communicate(timeout=90)


def _wait_for(process: subprocess.Popen[bytes], word: bytes) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise RuntimeError(f"{process.args!r} ended before it was ready")


def _memory(root: int) -> float:
    """Resident memory of the replicas below a process, in MB."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            parents[int(path.name)] = int(fields[1])
    total = 0
    for pid in parents:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        with contextlib.suppress(OSError):
            if above == root and b"ray::ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes():
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    if not total:
        raise RuntimeError("the service has no replica among its processes")
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


def _draw(arguments: tuple[str, float]) -> tuple[float, float]:
    """Calls of one observation a second, and draws a second of a thousand observations."""
    store, seconds = arguments
    torch.set_num_threads(1)
    posterior = Posterior.load(f"{store}/gaussian")
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 3, (BULK, 3)).astype(np.float32))
    rates = []
    for some in (x[:1], x):
        posterior.draws(some, DRAWS, 0)
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            posterior.draws(some, DRAWS, calls)
            calls += 1
        rates.append(calls / (time.perf_counter() - began))
    return rates[0], rates[1] * BULK * DRAWS


def _bare(store: Path, processes: int, seconds: float) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rates = pool.map(_draw, [(str(store), seconds)] * processes, chunksize=1)
    return sum(each[0] for each in rates), sum(each[1] for each in rates)


# ---- the table ----------------------------------------------------------------------------------


def _head(title: str) -> None:
    print(f"\n{title:44}{'answered/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'not 2xx':>9}", flush=True)


def _row(name: str, load: Load, note: str = "") -> None:
    bad = f"{load.refused + load.lost:>9}"
    print(
        f"{name:44}{load.rate:>10.1f}{load.p50 * 1e3:>9.1f}{load.p99 * 1e3:>9.1f}{bad}  {note}",
        flush=True,
    )


if __name__ == "__main__":
    run(sys.argv[1:])
