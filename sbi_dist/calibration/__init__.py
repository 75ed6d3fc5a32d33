"""Is an amortized posterior calibrated? Checked with simulations that it was not trained on.

Held-out pairs (theta_i, x_i) come from the joint distribution, so theta_i is one more draw of the
exact posterior of x_i. Every test here asks whether it looks like one more of the model's draws.
Import from the files; this one imports nothing. ``stage`` has Ray actors make the table; all else
here is mathematics on arrays.

**Before** (once, on simulations of the training, never on held-out ones)::

    reference.Scale.of(theta)                       # (M, D) -> mean and sd of each parameter
    reference.Regression.fit(theta, x, seed=0)      # (M, D), (M, *x_shape) -> guesses theta of x
    regression.predict(x)                           # (B, *x_shape) -> (B, D)

**A block** of B held-out rows with N draws each is reduced to a compact table; B may differ from
call to call, N and the seed may not. What a row becomes depends on that row, its identifier, the
scale and the seed alone, so any division into blocks gives the same table, bit for bit::

    reduce.reduce_block(
        row,                # (B,) int64: identifiers of the simulations, unique in the table
        theta,              # (B, D)
        draws,              # (B, N, D)
        log_q=None,         # (B, N) log density of the draws, and
        log_q_theta=None,   # (B,) of theta: both or neither
        scale=scale,
        reference=None,     # (B, D): regression.predict(x)
        ood=None,           # (B,) out-of-distribution p-values, only kept
        failed=None,        # (B,) bool: rows for which there are no draws
        seed=0,
    ) -> table.Ranks
    table.merge([ranks, ...]) -> table.Ranks        # any order; sorted by row
    table.to_arrow(ranks, names) -> pyarrow.Table   # what ranks.parquet holds
    table.from_arrow(table) -> (table.Ranks, names)

**Tests** take the whole table; each gives a ``finding.Finding``: statistic, p-value corrected for
the number of parameters, effect, and the effect's bound::

    sbc.sbc(ranks, names)                       Talts et al. 2018, arXiv:1804.06788
    coverage.coverage(ranks)                    Hermans et al. 2022, arXiv:2110.06581
    tarp.tarp(ranks), tarp.tarp_data(ranks)     Lemos et al. 2023, arXiv:2302.03026
    shrinkage.shrinkage(ranks, names)           Betancourt 2018, arXiv:1803.08393
    tails.tails(ranks, names)
    data_averaged.data_averaged(ranks, names)   Talts et al. 2018

and one, of one observation and draws of its posterior, a ``finding.Part``::

    local.local_c2st(ranks, draws, reference)   Linhart et al. 2023, arXiv:2306.03580

**Verdict**::

    verdict.judge(ranks, names, local=None) -> dict, JSON-ready:
        {"verdict": "pass" | "warn" | "fail", "summary": str,
         "held_out": int, "failed": int, "draws": int, "alpha_warn": float, "alpha_fail": float,
         "tests": [{"name", "verdict", "statistic", "p_value", "effect", "threshold", "kind",
                    "sentence", "parameters": [{"name", ...}]}, ...]}
    verdict.curves(ranks, names, alpha=0.05) -> dict, JSON-ready: for plots; levels, the empirical
        distribution of each kind of rank at these levels, and its simultaneous band.

A correct posterior's verdict is ``fail`` at most once in a hundred times, and other than ``pass``
at most once in twenty, whatever the number of parameters (see ``verdict``).
"""
