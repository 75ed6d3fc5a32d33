"""Pass, warn or fail: what the findings add up to.

A test **fails** where a deviation is significant *and* its effect reaches the bound: with many
held-out simulations harmless deviations are significant, with few of them chance effects are
large. It **warns** where a deviation is significant and smaller, or large and not as sure; that
of one observation also where the observation is unlike the simulations.

A p-value is significant below 0.01 (to fail) or 0.05 (to warn), divided by the number of tests;
each test corrects for its parameters itself. So all tests together fail a correct posterior at
most once in a hundred times, and do not pass it at most once in twenty, whatever their dependence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbi_dist.calibration.coverage import coverage
from sbi_dist.calibration.data_averaged import data_averaged
from sbi_dist.calibration.finding import Finding, Part
from sbi_dist.calibration.sbc import sbc
from sbi_dist.calibration.shrinkage import shrinkage
from sbi_dist.calibration.table import STATUSES, Ranks
from sbi_dist.calibration.tails import tails
from sbi_dist.calibration.tarp import tarp, tarp_data
from sbi_dist.calibration.uniformity import band, curve, levels
from sbi_dist.calibration.wording import SUBJECTS, is_unlike, joined, sentence

__all__ = ["FAIL_RATE", "WARN_RATE", "curves", "findings", "judge"]

# Of a correct posterior, in the long run.
FAIL_RATE, WARN_RATE = 0.01, 0.05
_ORDER = ("pass", "warn", "fail")
# Share of held-out simulations without draws. They are the hard ones, not random ones, so their
# share is what coverage may be off by unseen: the bound of over-confidence. And what to mention.
_FAILED, _SOME_FAILED = 0.05, 0.001
# Half the width of the band for coverage, twice the bound: then a pass says too little.
_UNSEEN = 0.1


def findings(ranks: Ranks, names: Sequence[str], local: Part | None = None) -> list[Finding]:
    """All tests that the table has the numbers for, and that of one observation if it was made."""
    found = [
        sbc(ranks, names),
        coverage(ranks),
        tarp(ranks),
        tarp_data(ranks),
        shrinkage(ranks, names),
        tails(ranks, names),
        data_averaged(ranks, names),
        None if local is None else Finding("local", [local]),
    ]
    return [each for each in found if each is not None]


def judge(ranks: Ranks, names: Sequence[str], local: Part | None = None) -> dict[str, Any]:
    """The verdict on a table of held-out simulations, as JSON-ready data.

    Args:
        ranks: at best 2,000 rows or more; errors of coverage below 0.05 go unseen in fewer.
        names: of the parameters.
        local: what ``local.local_c2st`` found at the observed data.
    """
    rows = int(ranks.ok.sum())
    found = findings(ranks, names, local) if rows else []
    count = max(1, sum(any(p.p_value is not None for p in each.parts) for each in found))
    alphas = {"warn": WARN_RATE / count, "fail": FAIL_RATE / count}
    tests = [_held_out(ranks, alphas["fail"])]
    tests += [_judged(each, alphas, rows) for each in found]
    verdict = _worst(test["verdict"] for test in tests)
    return {
        "verdict": verdict,
        "summary": _summary(verdict, tests, rows, ranks.draws),
        "held_out": len(ranks),
        "failed": len(ranks) - rows,
        "draws": ranks.draws,
        "alpha_warn": alphas["warn"],
        "alpha_fail": alphas["fail"],
        "tests": tests,
    }


def curves(ranks: Ranks, names: Sequence[str], alpha: float = 0.05) -> dict[str, Any]:
    """What to plot, as JSON-ready data: distribution functions of ranks and their band.

    ``low`` and ``high`` hold the one of uniform ranks at all levels with probability 1 - alpha.
    """
    used = ranks.usable()
    low, high = band(len(used), ranks.draws, alpha)

    def shares(values: np.ndarray) -> list[float] | None:
        if not len(values) or (values < 0).any():
            return None
        return (curve(values, ranks.draws).counts / len(values)).tolist()

    return {
        "levels": (np.array(levels(ranks.draws)) / (ranks.draws + 1)).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "alpha": alpha,
        "sbc": {name: shares(each) for name, each in zip(names, used.rank.T, strict=True)},
        "coverage": shares(used.hpd_rank),
        "tarp": shares(used.tarp_rank),
        "tarp_data": shares(used.tarp_data_rank),
    }


# ---- one test ----------------------------------------------------------------------------------


def _judged(found: Finding, alphas: Mapping[str, float], rows: int) -> dict[str, Any]:
    verdicts = [_verdict(part, alphas, found.meets_bound) for part in found.parts]
    verdict = _worst(verdicts)
    if found.name == "shrinkage" and found.parts[0].p_value is None:
        # That one parameter can't be known is no fault; that none can be is worth a look.
        verdict = min(verdicts, key=_ORDER.index)
    hit = [part for part, each in zip(found.parts, verdicts, strict=True) if each == verdict]
    worst = max(hit, key=lambda part: part.severity)
    text = sentence(found.name, verdict, hit, worst, rows)
    if is_unlike(worst):
        verdict = _worst([verdict, "warn"])
    p_values = [part.p_value for part in found.parts if part.p_value is not None]
    return {
        "name": found.name,
        "verdict": verdict,
        "statistic": _number(worst.statistic),
        "p_value": _number(min(p_values)) if p_values else None,
        "effect": _number(worst.effect),
        "threshold": worst.bound,
        "kind": worst.kind,
        "sentence": text,
        "parameters": [
            {
                **{
                    key: _number(value) if isinstance(value, float) else value
                    for key, value in dataclasses.asdict(part).items()
                    if key != "more"
                },
                "verdict": each,
                **{key: _number(value) for key, value in part.more.items()},
            }
            for part, each in zip(found.parts, verdicts, strict=True)
        ],
    }


def _verdict(part: Part, alphas: Mapping[str, float], meets_bound: str) -> str:
    if part.p_value is None:
        return meets_bound if part.severity >= 1 else "pass"
    if part.p_value <= alphas["fail"] and part.severity >= 1:
        return "fail"
    return "warn" if part.p_value <= alphas["warn"] else "pass"


def _held_out(ranks: Ranks, alpha: float) -> dict[str, Any]:
    """Are there rows enough, and draws for all of them? No hypothesis, only counts."""
    rows, total = int(ranks.ok.sum()), len(ranks)
    share = 1 - rows / total if total else 1.0
    low, high = band(rows, ranks.draws, alpha)
    at = np.array(levels(ranks.draws)) / (ranks.draws + 1)
    unseen = float(max((high - at).max(), (at - low).max()))
    counts = np.bincount(ranks.status, minlength=len(STATUSES))
    by_status = {name: int(n) for name, n in zip(STATUSES, counts, strict=True)}
    reasons = joined([f"{n:,} ({name})" for name, n in list(by_status.items())[1:] if n])
    verdict = "pass"
    text = (
        f"{rows:,} held-out simulations with {ranks.draws:,} draws each; coverage that is off by "
        f"more than {unseen:.2g} in them is significant."
    )
    if unseen > _UNSEEN:
        verdict = "warn"
        text = (
            f"{rows:,} held-out simulations are few: coverage that is off by less than "
            f"{unseen:.2g} in them may be chance. Take 2,000 or more."
        )
    kind, effect, threshold = "few", unseen, _UNSEEN
    if share > 0:
        text += (
            f" Of {total:,} simulations {total - rows:,} have no finite draws or densities and "
            f"are in no other test: {reasons}."
        )
    if share > _SOME_FAILED:
        verdict = "fail" if share > _FAILED else "warn"
        kind, effect, threshold = "failed", share, _FAILED
        text += " Check the scale of x and of the parameters, and train on more simulations."
    return {
        "name": "held_out",
        "verdict": verdict,
        "statistic": _number(share),
        "p_value": None,
        "effect": _number(effect),
        "threshold": threshold,
        "kind": kind,
        "sentence": text,
        "parameters": [],
        "statuses": by_status,
    }


# ---- all of them -------------------------------------------------------------------------------


def _summary(verdict: str, tests: Sequence[Mapping[str, Any]], rows: int, draws: int) -> str:
    hit = [test for test in tests if test["verdict"] == verdict]
    basis = f"{rows:,} held-out simulations with {draws:,} draws each"
    if verdict == "pass":
        return (
            f"Calibrated as far as {basis} can tell: coverage off by more than "
            f"{tests[0]['effect']:.2g} in them would have been significant."
        )
    # What is said is the test with the largest effect, by its own measure.
    first = max(hit, key=lambda test: (test["effect"] or 0.0) / test["threshold"])
    others = [SUBJECTS[test["name"]] for test in hit if test is not first]
    opening = "Not calibrated" if verdict == "fail" else "To be used with care"
    also = (
        f" {'Also failing' if verdict == 'fail' else 'Also'}: {joined(others)}." if others else ""
    )
    by = "" if first["name"] == "held_out" else f", by {basis}"
    return f"{opening}{by}. {first['sentence']}{also}"


def _worst(verdicts: Any) -> str:
    return max(verdicts, key=_ORDER.index)


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
