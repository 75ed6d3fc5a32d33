"""The SBI benchmark: train on its problems, and compare the posteriors with its reference draws.

A cell of its table is an experiment (``cell``); ``driver`` runs the cells on Ray and keeps
``records`` of what was measured; ``published`` has what others came to; ``table``, ``plot`` and
``page`` show both. The reference draws themselves are read in ``sbi_dist.problems.reference``, the
test is ``sbi_dist.calibration.c2st``.
"""
