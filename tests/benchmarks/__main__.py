"""Run all benchmarks, or those named: ``python -m tests.benchmarks [tutorial simulation ...]``."""

from __future__ import annotations

import sys

from tests.benchmarks import (
    calibration,
    catalog,
    sampling,
    serving,
    simulation,
    steps,
    streaming,
    training,
    tutorial,
)

BENCHMARKS = {
    "tutorial": tutorial.run,
    "simulation": simulation.run,
    "training": training.run,
    "steps": steps.run,
    "sampling": sampling.run,
    "streaming": streaming.run,
    "catalog": catalog.run,
    "calibration": calibration.run,
    "serving": serving.run,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHMARKS:
        BENCHMARKS[name]()
