"""Run all benchmarks, or those named: ``python -m tests.benchmarks [tutorial ...]``."""

from __future__ import annotations

import sys

from tests.benchmarks import tutorial

BENCHMARKS = {"tutorial": tutorial.run}

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHMARKS:
        BENCHMARKS[name]()
