"""What an experiment came to, to compare the ways to run it by."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np

from sbi_dist.catalog.table import read_draws
from sbi_dist.store import LocalStore, ObjectStore
from tests.ray.conftest import command

__all__ = ["dataset_name", "posterior_draws", "run_alone"]


def run_alone(folder: Path, name: str = "experiment") -> ObjectStore:
    """Run ``experiment.yaml``, of that name, on this machine alone, in a store of its own."""
    done = subprocess.run(
        command("run", "experiment.yaml", "--store", "alone"),
        cwd=folder,
        env={**os.environ, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return LocalStore(folder / "alone" / name)


def dataset_name(store: ObjectStore) -> str:
    """Of the one that an experiment has: its fingerprint."""
    (name,) = store.folders("simulations/")
    return name


def posterior_draws(store: ObjectStore) -> np.ndarray:
    """What the stage ``infer`` left for the problem's own data."""
    (name,) = store.folders("posteriors/")
    return np.asarray(read_draws(store.child(f"posteriors/{name}")).draws)
