"""One local Ray for the whole session, and how these tests run the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from sbi_dist.session import connected

    with connected():
        yield


@pytest.fixture(scope="session")
def ray_address(ray_session: None) -> str:
    """Address of the session's Ray, for commands in processes of their own."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture
def sbi_dist(ray_address: str, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``sbi-dist`` in an empty folder on the session's Ray; its exit code and what it says."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environment(ray_address),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def command(*arguments: str) -> list[str]:
    """The command line as a process's arguments."""
    return [sys.executable, "-m", "sbi_dist", *arguments]


def environment(address: str) -> dict[str, str]:
    """This process's environment with the Ray to use."""
    return {**os.environ, "RAY_ADDRESS": address, "COLUMNS": "200"}


# A simulator slow enough to be killed in the middle, with rows that depend on the random stream.
SLOW = """
import time

import numpy as np
import torch

from sbi_dist import BoxUniform, Problem


def simulator(theta, rng):
    time.sleep(0.004)
    return theta + 0.1 * rng.standard_normal(2)


problem = Problem(
    BoxUniform([-1.0, 0.0], [1.0, 2.0]), simulator, parameter_names=["a", "b"], observed=[0.1, 1.0]
)
"""


def write_experiment(folder: Path, source: str = SLOW, **simulate: object) -> Path:
    """An experiment file with its problem beside it."""
    import yaml

    (folder / "problem.py").write_text(source)
    content = {
        "name": "experiment",
        "problem": "problem.py:problem",
        "simulate": {"num_simulations": 400, "shard_size": 20, **simulate},
        "train": {"transforms": 2, "hidden_features": 16, "max_epochs": 3, "workers": 0},
        "infer": {"num_samples": 500, "predictive_simulations": 20},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
