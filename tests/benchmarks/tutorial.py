"""The sbi toolbox's tutorial on sbi_dist and on sbi itself: time and loss, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import truncnorm

__all__ = ["run"]

SEEDS = (0, 1, 2)


def run() -> None:
    """Print a table: medians over seeds, and the ratio to sbi."""
    rows: dict[str, list[dict[str, Any]]] = {"sbi": [], "sbi_dist": []}
    for seed in SEEDS:
        for library in rows:
            rows[library].append(_measure(library, seed))
    print(f"\nAmortized-Gaussian tutorial, 2,000 simulations, medians of {len(SEEDS)} seeds")
    print(f"{'':22}{'sbi':>10}{'sbi_dist':>10}{'ratio':>8}")
    for key in ("import_s", "ray_s", "simulate_s", "train_s", "total_s"):
        theirs, ours = (float(np.median([row[key] for row in rows[name]])) for name in rows)
        ratio = f"{ours / theirs:8.2f}" if theirs else f"{'':>8}"
        print(f"{key:22}{theirs:10.2f}{ours:10.2f}{ratio}")
    for key in ("validation_loss", "test_loss"):
        theirs, ours = (float(np.median([row[key] for row in rows[name]])) for name in rows)
        print(f"{key:22}{theirs:10.4f}{ours:10.4f}{'':>8}")
    print(f"{'exact test_loss':22}{_exact_loss():10.4f}")


def _measure(library: str, seed: int) -> dict[str, Any]:
    script = Path(__file__).with_name("tutorial_script.py")
    # sbi writes its logs into the working directory.
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, str(script), library, str(seed)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    row: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return row


def _exact_loss() -> float:
    """Mean of -log p(theta | x) over the prior predictive, for the exact posterior."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, 1_000_000)
    centre = theta + 0.1 * rng.standard_normal(len(theta))
    exact = truncnorm((-2 - centre) / 0.1, (2 - centre) / 0.1, loc=centre, scale=0.1)
    return -3 * float(exact.logpdf(theta).mean())
