"""A catalog of a million observations, 100 draws of each, summarized: rate, memory, and kills.

The rate is compared with that of the bare sampler on the same cores in the same minutes. The job's
time is that of the command, with the start of Python and of the actors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sbi_dist.posterior.posterior import Posterior
from sbi_dist.problems.gaussian import HIGH, LOW, NOISE_SD, SHIFT
from sbi_dist.session import connected

__all__ = ["run"]

CORES, SAMPLES = 2, 100
_BARE = 30_000  # observations that each process draws for


def run(observations: int = 1_000_000) -> None:
    """Print the table."""
    import ray

    with tempfile.TemporaryDirectory() as folder, connected():
        place = Path(folder)
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        for stage in ("simulate", "train"):
            command = [sys.executable, "-m", "sbi_dist", stage, "gaussian"]
            subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True)
        _write_catalog(place / "catalog.parquet", observations)
        before = _bare(place)
        calm = _job(place, "calm", environment, [])
        after = _bare(place)
        killed = _job(place, "killed", environment, [0.2, 0.45, 0.7])
    bare = (before + after) / 2
    rate = observations * SAMPLES / calm["seconds"]
    drawing = observations * SAMPLES / calm["drawing_s"]
    what = f"{observations:,} observations x {SAMPLES} draws, summaries"
    rows = [
        (
            what,
            f"{rate / 1e6:.2f} M/s",
            f"{bare / 1e6:.2f} M/s, {CORES} bare samplers",
            rate / bare,
        ),
        (
            "   without the start of the command",
            f"{drawing / 1e6:.2f} M/s",
            f"{before / 1e6:.2f} before, {after / 1e6:.2f} after",
            drawing / bare,
        ),
        (
            "   killed three times, all commands together",
            f"{killed['seconds']:.0f} s",
            f"{calm['seconds']:.0f} s, not killed",
            killed["seconds"] / calm["seconds"],
        ),
    ]
    print("\nCatalog")
    print(f"{'':58}{'measured':>14}{'compared with':>34}{'ratio':>8}")
    for name, measured, compared, ratio in rows:
        print(f"{name:58}{measured:>14}{compared:>34}{ratio:>8.2f}")
    print(f"{'   most memory of the driver':58}{calm['driver_mb']:>11.0f} MB")
    print(f"{'   most memory of an actor':58}{calm['actor_mb']:>11.0f} MB")
    same = "bit for bit" if calm["digest"] == killed["digest"] else "NO"
    print(f"{'   the same results after the kills':58}{same:>14}")


def _write_catalog(path: Path, observations: int) -> None:
    rng = np.random.default_rng(0)
    theta = rng.uniform(LOW, HIGH, (observations, 3))
    x = theta + SHIFT + NOISE_SD * rng.standard_normal(theta.shape)
    x = x.astype(np.float32)
    table = pa.table(
        {
            "observation_id": pa.array(np.arange(observations)).cast(pa.string()),
            "x": pa.FixedShapeTensorArray.from_numpy_ndarray(x),
        }
    )
    pq.write_table(table, path)


# ---- the sampler alone --------------------------------------------------------------------------


def _draw(arguments: tuple[str, int]) -> float:
    """Seconds of drawing for so many observations, a thousand at a time, in one thread."""
    model, count = arguments
    torch.set_num_threads(1)
    posterior = Posterior.load(model)
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 3, (count, 3)).astype(np.float32))
    posterior.draws(x[:1000], SAMPLES, 0)
    started = time.perf_counter()
    for some in x.split(1000):
        posterior.draws(some, SAMPLES, 0)
    return time.perf_counter() - started


def _bare(place: Path) -> float:
    """Draws a second of a sampler on each core."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        model = str(place / "runs/gaussian")
        seconds = pool.map(_draw, [(model, _BARE)] * CORES, chunksize=1)
    return CORES * _BARE * SAMPLES / max(seconds)


# ---- the job ------------------------------------------------------------------------------------


def _job(
    place: Path, name: str, environment: dict[str, str], kills: list[float]
) -> dict[str, float | str]:
    """Run the command to its end; it or an actor is killed when so much of it is done."""
    target = place / name
    command = [sys.executable, "-m", "sbi_dist", "infer", "gaussian"]
    command += ["--observations", "catalog.parquet", "--output", name]
    command += ["--num-samples", str(SAMPLES), "--set", "infer.output=summary"]
    command += ["--set", f"infer.actors={CORES}"]
    began = time.perf_counter()
    waits = [_actor, _driver, _politely]
    with _watched_memory() as memory:
        while True:
            process = subprocess.Popen(command, cwd=place, env=environment)
            while process.poll() is None:
                time.sleep(0.05)
                if kills and _part_done(target) > kills[0]:
                    kills.pop(0)
                    waits.pop(0)(process)
            if process.returncode == 0:
                break
    digest = hashlib.sha256()
    for path in sorted(target.glob("part-*")):
        digest.update(path.read_bytes())
    manifest = json.loads((target / "manifest.json").read_text())
    return {
        "seconds": time.perf_counter() - began,
        "drawing_s": manifest["seconds"],
        "digest": digest.hexdigest(),
        "driver_mb": memory["sbi_dist"],
        "actor_mb": memory["ray::CatalogActor"],
    }


def _part_done(target: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        request = json.loads((target / "request.json").read_text())
        parts = -(-request["observations"] // request["rows_per_part"])
        return len(list(target.glob("part-*"))) / parts
    return 0.0


def _actor(_: subprocess.Popen[bytes]) -> None:
    os.kill(next(pid for pid, title in _processes() if title == "ray::CatalogActor"), 9)


def _driver(process: subprocess.Popen[bytes]) -> None:
    process.kill()


def _politely(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)


def _processes() -> Iterator[tuple[int, str]]:
    """The actors and the command, with what they are."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if words[0].startswith(b"ray::CatalogActor"):
                yield int(path.name), "ray::CatalogActor"
            elif words[1:4] == [b"-m", b"sbi_dist", b"infer"]:
                yield int(path.name), "sbi_dist"


@contextlib.contextmanager
def _watched_memory() -> Iterator[dict[str, float]]:
    """The largest resident memory of these processes, in MB."""
    most: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for pid, title in _processes():
                with contextlib.suppress(OSError, StopIteration):
                    status = Path(f"/proc/{pid}/status").read_text().splitlines()
                    peak = next(line for line in status if line.startswith("VmHWM"))
                    most[title] = max(most.get(title, 0.0), int(peak.split()[1]) / 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


if __name__ == "__main__":
    run(*(int(word) for word in sys.argv[1:2]))
