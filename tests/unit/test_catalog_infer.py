"""The infer stage in one process, with a posterior whose draws are known."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist import BoxUniform, Problem
from sbi_dist.catalog import infer as stage
from sbi_dist.catalog import plan, table
from sbi_dist.catalog.actor import PartWriter
from sbi_dist.catalog.infer import infer
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import ArraySource
from sbi_dist.catalog.summary import summarize
from sbi_dist.catalog.table import read_counts, read_draws
from sbi_dist.errors import InputError, StageError
from sbi_dist.store import LocalStore

SIZE = 2
NOT_FINITE, RAISES, HALF_FINITE = 100.0, 200.0, 300.0
X = np.random.default_rng(0).standard_normal((40, SIZE)).astype(np.float32)


@dataclasses.dataclass
class Estimator:
    num_parameters: int = SIZE


class Normal:
    """q(theta | x) = N(x, 1), whose draws are a function of x, seed and number."""

    estimator, x_shape, identity = Estimator(), (SIZE,), "normal"
    parameter_names = ["a", "b"]

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def draws(
        self, x: torch.Tensor, count: int, seed: int, first: int = 0, with_log_prob: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.asked.append((len(x), count))
        if (x == RAISES).any():
            raise ValueError("x is more than it can take")
        noise = np.random.default_rng(seed).standard_normal((first + count, SIZE))[first:]
        # Another scale for each, as equal noise would hide a mix-up.
        scale = 1 + 0.1 * torch.sin(50 * x)[:, None]
        theta = x[:, None] + scale * torch.from_numpy(noise)[None]
        theta[(x == NOT_FINITE).any(1)] = math.inf
        theta[(x == HALF_FINITE).any(1), -1, 1] = math.nan
        log_q = None
        if with_log_prob:
            scaled = (theta - x[:, None]) / scale
            log_q = (-0.5 * scaled**2 - scale.log()).sum(-1) - math.log(2 * math.pi)
            log_q = log_q.float()
        return theta.float(), log_q

    def out_of_distribution(self, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        score = (x**2).mean(1).numpy()
        return score, np.exp(-score)


@dataclasses.dataclass
class Job:
    """Runs the stage into a folder."""

    folder: Path

    def __call__(self, x: Any = X, problem: Problem | None = None, **options: Any) -> table.Draws:
        options = InferOptions(**{"num_samples": 30, **options})
        store = LocalStore(self.folder)
        self.posterior: Any = Normal()
        source = x if isinstance(x, ArraySource) else ArraySource.of("catalog", x)
        self.manifest = infer(
            self.posterior, store, source, options, store, problem, show_progress=False
        )
        return read_draws(store)

    def parts(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.glob("part-*"))}


@pytest.fixture
def job(tmp_path: Path, monkeypatch) -> Job:
    """Parts are written one after the other, in this process."""

    def in_order(missing, source, options, what, live) -> None:
        _, target, metadata, problem = what
        writer = PartWriter(Normal(), options, target, metadata, problem)  # type: ignore[arg-type]
        for part in missing:
            live.landed(writer.prepare(part, source.read(part.start, part.stop))())

    monkeypatch.setattr(stage, "_on_ray", in_order)
    monkeypatch.setattr(stage, "connected", lambda _: contextlib.nullcontext())
    return Job(tmp_path)


def expected(x: np.ndarray = X, count: int = 30, seed: int = 0) -> np.ndarray:
    return Normal().draws(torch.from_numpy(x), count, seed)[0].numpy()


# ---- what is kept -------------------------------------------------------------------------------


def test_samples(job: Job) -> None:
    read = job(seed=5)
    np.testing.assert_array_equal(read.draws, expected(seed=5))
    assert read.ids == [str(row) for row in range(40)] and set(read.statuses) == {"ok"}
    assert set(read.columns) == {
        "effective_sample_size", "log_evidence", "out_of_distribution", "out_of_distribution_p",
        "draws",
    }  # fmt: skip
    assert np.isnan(read.columns["log_evidence"]).all()
    np.testing.assert_allclose(read.columns["out_of_distribution"], (X**2).mean(1), rtol=1e-6)
    assert job.manifest["statuses"] == {"ok": 40} and job.manifest["draws"] == 1200
    schema = pq.ParquetFile(job.folder / "part-000000.parquet").schema_arrow
    assert schema.field("draws").type == pa.fixed_shape_tensor(pa.float32(), [30, 2])
    assert schema.field("observation_id").type == pa.string()
    assert json.loads(schema.metadata[b"parameter_names"]) == ["a", "b"]


@pytest.mark.parametrize("output", ["summary", "both"])
def test_summaries(job: Job, output: str) -> None:
    levels = [0.1, 0.5, 0.75]
    read = job(output=output, quantiles=levels, hdi=0.5)
    assert ("draws" in read.columns) == (output == "both")
    draws = expected()
    summary = summarize(draws, levels, 0.5)
    for name in ("mean", "sd", "covariance", "quantiles", "hdi"):
        np.testing.assert_array_equal(read.columns[name], getattr(summary, name))
    # The density is highest where the noise is smallest, which all of them share.
    noise = np.random.default_rng(0).standard_normal((30, SIZE))
    best = (noise**2).sum(1).argmin()
    np.testing.assert_array_equal(read.columns["map"], draws[:, best])
    schema = pq.ParquetFile(job.folder / "part-000000.parquet").schema_arrow
    assert json.loads(schema.metadata[b"quantiles"]) == levels
    assert json.loads(schema.metadata[b"hdi"]) == 0.5
    shapes = {"mean": [2], "covariance": [2, 2], "quantiles": [3, 2], "hdi": [2, 2], "map": [2]}
    for name, shape in shapes.items():
        assert schema.field(name).type == pa.fixed_shape_tensor(pa.float32(), shape)


def test_draws_that_are_too_many_for_one_call(job: Job, monkeypatch) -> None:
    monkeypatch.setattr("sbi_dist.catalog.draw._CALL_DRAWS", 7)
    read = job(output="both")
    np.testing.assert_array_equal(read.draws, expected())
    assert max(count for _, count in job.posterior.asked) == 7


# ---- bad observations ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NOT_FINITE, RAISES, HALF_FINITE, math.nan, math.inf, 1e30])
def test_one_bad_observation_leaves_the_others_as_they_are(
    job: Job, tmp_path: Path, value, capsys
) -> None:
    bad = X.copy()
    bad[17, 1] = value
    read = job(bad, output="both")
    others = np.arange(40) != 17
    calm = Job(tmp_path / "calm")(X, output="both")
    for name, column in read.columns.items():
        assert column[others].tobytes() == calm.columns[name][others].tobytes()
    status = "failed" if value in (NOT_FINITE, RAISES, HALF_FINITE) else "nonfinite"
    status = "ok" if value == 1e30 else status
    assert read.statuses[17] == status and read.statuses.count("ok") == 39 + (status == "ok")
    if status != "ok":
        for name in ("draws", "mean", "sd", "covariance", "quantiles", "hdi", "map"):
            assert np.isnan(read.columns[name][17]).all()
        assert job.manifest["statuses"] == {status: 1, "ok": 39}
        assert job.manifest["draws"] == 39 * 30
    said = capsys.readouterr().err
    if status == "failed":
        reason = "x is more than it can take" if value == RAISES else "the draws are not finite"
        assert f"1 observation(s) failed: {'ValueError: ' * (value == RAISES)}{reason}" in said


def test_where_one_raises_few_are_drawn_again(job: Job) -> None:
    bad = np.tile(X, (25, 1))
    bad[600] = RAISES
    job(bad)
    # Halves of 1,000 down to one: some 10 more calls of each size, not 1,000.
    assert len(job.posterior.asked) <= 2 * math.ceil(math.log2(1000)) + 1


def test_when_none_can_be_drawn_for_it_says_why(job: Job, monkeypatch) -> None:
    """What is wrong with all is no matter of the observations: nothing is stored of it."""
    monkeypatch.setattr(plan, "_PART_ROWS", 20)
    bad = X.copy()
    bad[20:] = RAISES
    with pytest.raises(StageError, match=r"none of 20 .* from 20 on .*x is more than it can take"):
        job(bad)
    assert list(job.parts()) == ["part-000000.parquet"]
    assert not (job.folder / "manifest.json").exists()


def test_when_no_draws_are_finite_it_says_so(job: Job) -> None:
    for reason in ("the draws are not finite", "as an earlier run said"):
        with pytest.raises(StageError, match=rf"none of 40 usable .*\({reason}\).*remove"):
            job(np.full_like(X, NOT_FINITE))
    assert not (job.folder / "manifest.json").exists()


def test_bad_rows_do_not_fail_a_catalog_without_others(job: Job) -> None:
    bad = X.copy()
    bad[1:] = np.nan
    assert job(bad).statuses.count("ok") == 1


# ---- parts --------------------------------------------------------------------------------------


def test_parts_are_in_order_and_draws_do_not_depend_on_them(
    job: Job, tmp_path: Path, monkeypatch
) -> None:
    whole = Job(tmp_path / "whole")(X, output="both")
    monkeypatch.setattr(plan, "_PART_ROWS", 7)
    read = job(X, output="both")
    assert list(job.parts()) == [f"part-{number:06d}.parquet" for number in range(6)]
    assert read.ids == whole.ids
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(read.columns[name], column)
    assert job.manifest["parts"] == 6 and job.manifest["rows_per_part"] == 7


def test_what_is_missing_is_drawn_and_comes_out_the_same(job: Job, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_PART_ROWS", 7)
    job(X, output="both")
    calm, manifest = job.parts(), job.manifest
    for name in ("part-000001.parquet", "part-000005.parquet", "manifest.json"):
        (job.folder / name).unlink()
    # A version that divides catalogs in another way goes on as this one began.
    monkeypatch.setattr(plan, "_PART_ROWS", 11)
    times = {path.name: path.stat().st_mtime_ns for path in job.folder.glob("part-*")}
    job(X, output="both")
    assert job.parts() == calm
    assert {name: (job.folder / name).stat().st_mtime_ns for name in times} == times
    assert {**job.manifest, "seconds": 0} == {**manifest, "seconds": 0}


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"num_samples": 31}, {"output": "both"}, {"hdi": 0.5}, {"x": X[:39]}]
)
def test_another_catalog_does_not_meet_these_parts(job: Job, other) -> None:
    job()
    with pytest.raises(InputError, match=r"holds draws of another catalog, model or setting"):
        job(**other)
    job()
    assert not job.posterior.asked


def test_a_damaged_part_is_named(job: Job, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_PART_ROWS", 7)
    job()
    (job.folder / "manifest.json").unlink()
    path = job.folder / "part-000002.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"nonsense!")
    with pytest.raises(InputError, match=r"part-000002\.parquet is damaged .*delete it"):
        job()
    path.unlink()
    assert job().statuses == ["ok"] * 40


def test_counts_are_found_in_a_footer_of_any_length(job: Job, monkeypatch) -> None:
    job()
    for length in (100, 10**6):
        monkeypatch.setattr(table, "_TAIL_BYTES", length)
        assert read_counts(LocalStore(job.folder), "part-000000.parquet") == {"ok": 40}


@given(
    st.integers(1, 10**7),
    st.integers(1, 10**7),
    st.integers(1, 60),
    st.sampled_from(["samples", "summary", "both"]),
    st.sampled_from([None, 1000, 10**6]),
    st.integers(1, 10**6),
)
@settings(deadline=None, max_examples=200)
def test_parts_are_bounded(observations, num_samples, size, output, proposals, length) -> None:
    num_samples = max(2, num_samples)
    options = InferOptions(num_samples=num_samples, output=output, proposals=proposals)
    rows = plan.rows_per_part(observations, options, size, (length,))
    count = -(-observations // rows)
    assert 1 <= rows <= min(65_536, observations)
    if rows > 1:
        assert rows * num_samples <= 2 * 10**6 and rows * 4 * length <= 2**25
        if output != "summary":
            assert rows * num_samples * size * 4 <= 2**25
    # Not one of a single row behind others that are full.
    assert rows - (observations - (count - 1) * rows) < max(count, rows / 2 + 1)
    at_once = plan.rows_at_once(num_samples, size, (length,))
    assert at_once == 1 or at_once * 4 * max(num_samples * size, length) <= 2**22


@pytest.mark.parametrize("field", ["num_samples", "proposals"])
def test_draws_that_no_process_can_hold_are_refused_before_anything(job: Job, field: str) -> None:
    problem = Problem(PRIOR, simulator, log_likelihood=likelihood)
    with pytest.raises(InputError, match=rf"infer\.{field} is 40000000; .*room for 16,777,216"):
        job(X, problem, **{"proposals": 1000, field: 40_000_000})
    assert not list(job.folder.iterdir())


# ---- weights ------------------------------------------------------------------------------------

WIDTH = 40.0
PRIOR = BoxUniform([-WIDTH / 2] * SIZE, [WIDTH / 2] * SIZE)
SD = 0.5


def simulator(theta: np.ndarray) -> np.ndarray:
    return theta


def likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """N(x; theta, SD^2), but that of an observation far away, which has nothing to do with x."""
    if x[0] == 5.0:
        return np.where(np.arange(len(theta)) == 2, 0.0, -1e4)
    if x[0] == 6.0:
        raise ArithmeticError("no likelihood here")
    log = -0.5 * ((theta - x) / SD) ** 2 - math.log(SD * math.sqrt(2 * math.pi))
    return log.sum(axis=1)


@pytest.mark.parametrize("num_samples", [2000, 20_000])
def test_weights(job: Job, num_samples: int) -> None:
    """The posterior is N(x, SD^2), the evidence 1 / WIDTH^2, and the sample size known too."""
    x = X[:6].copy()
    x[3, 0], x[4, 0] = 5.0, 6.0
    problem = Problem(PRIOR, simulator, log_likelihood=likelihood)
    proposals = 10_000
    read = job(x, problem, num_samples=num_samples, proposals=proposals, output="both")
    assert read.statuses == ["ok", "ok", "ok", "low_ess", "failed", "ok"]
    assert job.manifest["statuses"] == {"failed": 1, "low_ess": 1, "ok": 4}
    good = [0, 1, 2, 5]
    scale = 1 + 0.1 * np.sin(50 * x[good])
    # E w^2 / (E w)^2 of w = N(0, s^2) / N(0, 1) is 1 / (s sqrt(2 - s^2)) in one dimension.
    s = SD / scale
    spread = (1 / (s * np.sqrt(2 - s**2))).prod(axis=1)
    worth = read.effective_sample_sizes[good]
    np.testing.assert_allclose(worth, proposals / spread, rtol=0.1)
    # The relative error of a mean weight is sqrt((spread - 1) / proposals).
    error = np.sqrt((spread - 1) / proposals)
    evidence = read.columns["log_evidence"][good]
    assert (np.abs(evidence + math.log(WIDTH**2)) < 5 * error).all()
    means, sds = read.columns["mean"][good], read.columns["sd"][good]
    assert (np.abs(means - x[good]) < 5 * SD / np.sqrt(worth[:, None])).all()
    assert (np.abs(sds / SD - 1) < 5 / np.sqrt(2 * worth[:, None])).all()
    np.testing.assert_allclose(means, read.draws[good].mean(axis=1), atol=1e-5)
    # The highest of 10,000 draws' densities is near the mode, at x.
    assert (np.abs(read.columns["map"][good] - x[good]) < 0.1 * SD).all()
    # Weights that one draw has all of are given up.
    np.testing.assert_array_equal(read.draws[3], expected(x[3:4], num_samples)[0])
    assert read.effective_sample_sizes[3] == 1.0


def test_weights_without_a_likelihood_are_refused(job: Job) -> None:
    for problem in (None, Problem(PRIOR, simulator)):
        with pytest.raises(InputError, match="the problem has no log_likelihood"):
            job(X, problem, proposals=1000)
    assert not list(job.folder.iterdir())


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "sumary"}, r"output is 'sumary'; allowed: samples, summary, both"),
        ({"quantiles": []}, "quantiles is "),
        ({"quantiles": [0.5, 0.1]}, "each above the one before"),
        ({"quantiles": [0.5, 1.1]}, "levels from 0 to 1"),
        ({"hdi": 1.0}, "hdi is 1.0; it must be less than 1"),
        ({"output": "summary", "num_samples": 1}, "a summary .* takes at least 2"),
        ({"actors": 0}, "actors is 0"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(InputError, match=message):
        InferOptions(**options)
