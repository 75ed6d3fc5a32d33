"""Benchmarks against named peers: scripts that print tables. Run with ``make benchmark``."""
