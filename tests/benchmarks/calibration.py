"""Calibration of 10,000 x 1,000 draws on ``gaussian``: our job, and sbi's run_sbc on two cores.

The job's time is that of the command, with the start of Python and of Ray, the simulations, all
tests and the verdict. ``run_sbc`` is given the same simulations and makes the ranks alone: of the
very same model, which it samples through our posterior, and of sbi's own posterior, trained on the
same simulations. The latter is measured on fewer rows, and scaled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from sbi_dist.simulation.dataset import Dataset
from sbi_dist.store import LocalStore

__all__ = ["run"]

ROWS, DRAWS = 10_000, 1_000
_SBI_ROWS, _LIMIT_S = 200, 400


def run(rows: int = ROWS) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for stage in ("simulate", "train"):
            _command(place, stage)
        began = time.perf_counter()
        _command(place, "calibrate", "--set", f"calibrate.num_simulations={rows}")
        job = time.perf_counter() - began
        root = place / "runs/gaussian"
        found = json.loads(next(root.glob("calibration/*/calibration.json")).read_text())
        trained, held_out = (
            _read(next(iter(root.glob(f"{name}/*")))) for name in ("simulations", "*/simulations")
        )
        np.savez(
            place / "simulations.npz",
            theta=trained[0], x=trained[1], held_out_theta=held_out[0], held_out_x=held_out[1],
        )  # fmt: skip
        ours = _run_sbc(place, "ours", rows)
        theirs = _run_sbc(place, "sbi", min(rows, _SBI_ROWS))
    print(f"\nCalibration of gaussian, {rows:,} x {DRAWS:,} draws, 2 cores")
    print(f"{'':58}{'rows':>8}{'time':>12}{'to the job':>12}")
    for name, record in (
        ("sbi-dist calibrate, all tests and the start of Ray", {"rows": rows, "seconds": job}),
        ("sbi's run_sbc of the same model", ours),
        ("sbi's run_sbc of sbi's posterior", theirs),
    ):
        if record is None:
            print(f"{name:58}{'':>8}{f'> {_LIMIT_S} s':>12}")
            continue
        scaled = record["seconds"] * rows / record["rows"]
        note = "" if record["rows"] == rows else f", scaled from {record['seconds']:.0f} s"
        print(f"{name:58}{record['rows']:>8,}{scaled:>10.0f} s{scaled / job:>12.2f}{note}")
    print(f"verdict: {found['verdict']}")
    for name, record in (("the same model", ours), ("sbi's posterior", theirs)):
        if record is not None:
            print(f"run_sbc's p-values, {name}: {', '.join(f'{p:.2g}' for p in record['ks'])}")


def _command(place: Path, stage: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "sbi_dist", stage, "gaussian", *arguments],
        cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    dataset = Dataset(LocalStore(folder))
    simulations = dataset.read_all(sorted(dataset.indexes()))
    return simulations.theta, simulations.x


def _run_sbc(place: Path, peer: str, rows: int) -> dict[str, Any] | None:
    script = Path(__file__).with_name("calibration_sbi.py")
    try:
        done = subprocess.run(
            [sys.executable, str(script), peer, str(rows), str(DRAWS)],
            cwd=place, check=True, capture_output=True, text=True, timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
