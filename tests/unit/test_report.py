"""The report package: posterior tables, plots and the self-contained page."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sbi_dist import report
from sbi_dist.estimation.loop import split
from sbi_dist.report import (
    DatasetFacts,
    FailureFacts,
    ModelFacts,
    ObservationFacts,
    PredictiveAxes,
    RecoveryFacts,
    ReportContent,
)
from sbi_dist.report.coverage import chance_range, recovered
from sbi_dist.report.recovery import held_out, recover
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.simulation.shard import Simulations, encode_shard
from sbi_dist.store import open_store

NAMES = ["rate", "<b>bold</b> & co"]
HISTORY = {
    "epoch": [1, 2, 3],
    "training_loss": [2.0, 1.0, 0.5],
    "validation_loss": [2.1, 1.2, 1.3],
    "learning_rate": [1e-3, 1e-3, 5e-4],
    "best_epoch": 2,
}
VOID = {"meta", "img", "br", "hr", "link", "input"}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def make_content(rng: np.random.Generator, count: int = 1, **changes: Any) -> ReportContent:
    draws = rng.normal([1.0, 100.0], [0.1, 5.0], size=(400, 2))
    predictive = rng.normal(size=(60, 21, 2))
    observed = np.zeros((21, 2))
    observed[:3, 1] = 50.0
    fields: dict[str, Any] = {
        "experiment": "Trial <script>alert(1)</script>",
        "problem": "First paragraph.\n\nSecond paragraph.",
        "reference": "A. Author (2020), https://example.org/paper?a=1&b=2",
        "parameter_names": NAMES,
        "units": ["1/s", None],
        "prior_draws": rng.normal([1.0, 100.0], [1.0, 50.0], size=(500, 2)),
        "prior_description": ["rate ~ Normal(1, 1)"],
        "dataset": DatasetFacts(
            "set-1",
            100,
            {"ok": 97, "error": 3},
            rng.uniform(0.1, 0.2, 100),
            [FailureFacts("ValueError: <boom>", 2, [1.5, 90.0]), ("other", 1, [0.5, 80.0])],
        ),
        "model": ModelFacts("model-1", "neural spline flow", 12345, 75.0, HISTORY, 1.2),
        "observations": [
            ObservationFacts(
                f"obs-{index}",
                draws,
                true_parameters=np.array([1.0, 300.0]),
                observed=observed,
                predictive=predictive,
            )
            for index in range(count)
        ],
        "created": "2025-01-01 00:00 UTC",
        "settings": {"training": {"batch_size": 64, "flow": {"layers": [32, 32]}}, "seed": 1},
        "versions": {"numpy": "2.0"},
        "notes": ["3 % failed <i>"],
        "axes": PredictiveAxes(series_names=["prey", "predator"]),
    }
    return ReportContent(**{**fields, **changes})


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made but not drawn, for the tests of a page's words."""
    from matplotlib.figure import Figure

    from sbi_dist.report import style

    blank = style.to_png(Figure((1, 1)))
    monkeypatch.setattr(style, "to_png", lambda figure: blank)


class Page(HTMLParser):
    """Collects text and attributes, and insists that tags match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def is_png(data: bytes) -> bool:
    import matplotlib.image

    picture = matplotlib.image.imread(io.BytesIO(data), format="png")
    # More than one colour: something is drawn.
    return picture.ndim == 3 and min(picture.shape[:2]) > 50 and float(np.ptp(picture)) > 0


def normalised(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


# --- tables -----------------------------------------------------------------------------------


def test_table_numbers_agree_with_numpy(rng: np.random.Generator) -> None:
    draws = rng.gamma(2.0, size=(1000, 2)).astype(np.float32)
    first, second = report.posterior_table(draws, ["a", "b"], ["m", None], [0.5, np.nan])
    column = draws[:, 0].astype(np.float64)
    assert first["parameter"] == "a" and first["unit"] == "m" and first["truth"] == 0.5
    assert first["mean"] == pytest.approx(column.mean())
    assert first["sd"] == pytest.approx(column.std(ddof=1))
    quantiles = [first["q05"], first["q50"], first["q95"]]
    assert quantiles == pytest.approx(np.quantile(column, [0.05, 0.5, 0.95]))
    assert second["unit"] is None and second["truth"] is None
    assert second["mean"] == pytest.approx(draws[:, 1].mean(dtype=np.float64))


@pytest.mark.parametrize(
    ("mean", "sd", "shown_mean", "shown_sd"),
    [
        (0.55432, 0.0671, "0.554", "0.067"),
        (33.14159, 2.96, "33.1", "3.0"),
        (12345.6, 678.0, "12350", "680"),
        (1.234567e-9, 4.5e-11, "1.235e-09", "4.5e-11"),
        (-0.001, 5.0, "0.0", "5.0"),
        (2.0, 0.0, "2", "0"),
    ],
)
def test_numbers_are_rounded_to_the_uncertainty(
    mean: float, sd: float, shown_mean: str, shown_sd: str
) -> None:
    row = {"parameter": "a", "unit": None, "mean": mean, "sd": sd, "truth": None}
    row |= {"q05": mean, "q50": mean, "q95": mean}
    cells = report.format_table([row]).splitlines()[2].split()
    assert cells[:3] == ["a", shown_mean, shown_sd]


def test_terminal_table_is_aligned_and_leaves_out_empty_columns(rng: np.random.Generator) -> None:
    draws = rng.normal(size=(50, 2)) * [1, 1000]
    lines = report.format_table(report.posterior_table(draws, ["a", "long_name"])).splitlines()
    assert "truth" not in lines[0] and "unit" not in lines[0]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    with_all = report.posterior_table(draws, ["a", "long_name"], ["m", "kg"], [0.0, 0.0])
    assert report.format_table(with_all).splitlines()[0].split()[-1] == "truth"


def test_table_errors_name_the_field(rng: np.random.Generator) -> None:
    draws = rng.normal(size=(50, 2))
    with pytest.raises(ValueError, match=r"parameter_names is \['a'\]; allowed: 2 names"):
        report.posterior_table(draws, ["a"])
    with pytest.raises(ValueError, match=r"units"):
        report.posterior_table(draws, ["a", "b"], ["m"])
    with pytest.raises(ValueError, match=r"truth has shape \(3,\)"):
        report.posterior_table(draws, ["a", "b"], truth=[1, 2, 3])


# --- pair plot --------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_matplotlib() -> None:
    code = "import sys, sbi_dist.report as r; assert 'pairplot' in dir(r); " + (
        "assert not [m for m in sys.modules if m.split('.')[0] in ('matplotlib', 'corner')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_pairplot_accepts_torch_and_leaves_matplotlib_alone(rng: np.random.Generator) -> None:
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    torch = pytest.importorskip("torch")
    before = dict(matplotlib.rcParams)
    windows = pyplot.get_fignums()
    options: dict[str, Any] = {"hist_kwargs": {"alpha": 0.3}}
    figure, axes = report.pairplot(
        torch.tensor(rng.normal(size=(500, 3)), requires_grad=True),
        points=torch.zeros(2, 3),
        limits=[[-4, 4], [-5, 5], [-6, 6]],
        labels=["a", "b", r"bad $\nosuch$ math"],
        prior_samples=rng.uniform(-3, 3, size=(400, 3)),
        **options,
    )
    assert isinstance(figure, Figure) and axes.shape == (3, 3)
    assert axes[2, 0].get_xlabel() == "a" and axes[1, 0].get_ylabel() == "b"
    assert axes[1, 1].get_xlim() == (-5, 5) and axes[2, 1].get_xlim() == (-5, 5)
    assert axes[2, 1].get_ylim() == (-6, 6)
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == windows
    assert options == {"hist_kwargs": {"alpha": 0.3}}
    figure.canvas.draw()  # a label that is not mathtext must not raise here
    inner = axes[1, 1].xaxis.get_ticklabels() + axes[2, 1].yaxis.get_ticklabels()
    assert not any(label.get_text() for label in inner)


def test_pairplot_of_one_parameter_marks_the_truth(rng: np.random.Generator) -> None:
    figure, axes = report.pairplot(
        rng.normal(size=(300, 1)), points=7.0, prior_samples=rng.normal(size=(300, 1)) * 9
    )
    figure.canvas.draw()
    assert axes.shape == (1, 1)
    low, high = axes[0, 0].get_xlim()
    assert low < -1 and high > 7
    assert [line.get_xdata()[0] for line in axes[0, 0].get_lines()] == [7.0]


def test_pairplot_scales_the_prior_by_all_its_draws(rng: np.random.Generator) -> None:
    from matplotlib.patches import StepPatch

    _, axes = report.pairplot(
        rng.normal(size=(2000, 1)) * 0.1,
        limits=[-0.5, 0.5],
        prior_samples=rng.uniform(-5, 5, size=(20000, 1)),
    )
    (prior,) = [patch for patch in axes[0, 0].patches if isinstance(patch, StepPatch)]
    heights = np.asarray(prior.get_data()[0])
    assert heights.mean() == pytest.approx(0.1, rel=0.1)


def test_pairplot_of_a_million_draws_is_thinned_and_repeatable(rng: np.random.Generator) -> None:
    from sbi_dist.report.style import to_png

    draws = rng.normal(size=(1_000_000, 2)).astype(np.float32)
    first, second = (to_png(report.pairplot(draws)[0], dpi=50) for _ in range(2))
    assert first == second and is_png(first)


def test_pairplot_survives_a_constant_parameter_and_few_draws(rng: np.random.Generator) -> None:
    draws = rng.normal(size=(12, 3))
    draws[:, 1] = 4.0
    figure, _ = report.pairplot(draws, prior_samples=np.tile(draws, (20, 1)))
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": np.zeros(20)}, r"samples has shape \(20,\); allowed: \(N, D\)"),
        ({"samples": np.full((20, 2), np.nan)}, r"samples holds 40 non-finite .* allowed: finite"),
        ({"samples": np.zeros((4, 2))}, r"samples has 4 draws; allowed: at least 10"),
        ({"samples": [["a", "b"]] * 20}, r"samples is list and cannot be read"),
        ({"limits": [[0, 1], [3, 2]]}, r"limits\[1\] is \[3, 2\]; allowed: .* low < high"),
        ({"limits": [[0, 1]] * 3}, r"limits has shape \(3, 2\); allowed: \(2, 2\)"),
        ({"limits": [90, 91]}, r"limits\[0\] is \[90, 91\] and holds none of the samples"),
        ({"labels": ["a"]}, r"labels is \['a'\]; allowed: a list of 2 names"),
        ({"points": [1, 2, 3]}, r"points has shape \(3,\); allowed: \(2,\) or \(P, 2\)"),
        ({"points": [1, np.inf]}, r"points is .* allowed: finite"),
        ({"prior_samples": np.zeros((20, 3))}, r"prior_samples has 3 parameters; allowed: 2"),
        ({"range": [1, 2]}, r"option range=\[1, 2\] is not allowed; use limits"),
        ({"smoth": 1}, r"option smoth=1 is unknown; allowed"),
    ],
)
def test_pairplot_errors_name_field_value_and_what_is_allowed(
    arguments: dict[str, Any], message: str
) -> None:
    samples = np.random.default_rng(0).normal(size=(50, 2))
    with pytest.raises(ValueError, match=message):
        report.pairplot(**{"samples": samples, **arguments})


def overlapping(figure: Any, axes: Any) -> list[tuple[str, str]]:
    """Pairs of texts at the lower and left edge of a grid that touch."""
    figure.draw_without_rendering()
    texts = []
    for line in [axis.xaxis for axis in axes[-1]] + [axis.yaxis for axis in axes[1:, 0]]:
        texts += [line.label, line.get_offset_text(), *line.get_ticklabels()]
    return touching(texts)


def touching(texts: list[Any]) -> list[tuple[str, str]]:
    """Pairs of drawn texts that touch."""
    shown = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [
        (a, b) for (a, box), (b, other) in itertools.combinations(shown, 2) if box.overlaps(other)
    ]


@pytest.mark.parametrize(
    ("center", "sd"),
    [
        ([2.2, 3.0, 2.6], [0.4, 0.4, 0.4]),
        ([0.0, -1.2e-7, 123456.0], [1e-3, 1e-8, 3.0]),
        (
            [1000.0, -2.25, 0.12, -50.0, 1e9, 0.0025, 31.0, -9e4],
            [0.1, 0.5, 0.03, 9, 1e8, 1e-3, 1, 1],
        ),
    ],
)
def test_pairplot_labels_never_touch(
    center: list[float], sd: list[float], rng: np.random.Generator
) -> None:
    draws = rng.normal(center, sd, size=(200, len(center)))
    names = [f"a_long_name_{j} [1/(yr k lynx)]" if j % 2 else "b" for j in range(len(center))]
    figure, axes = report.pairplot(draws, labels=names)
    assert overlapping(figure, axes) == []
    for j, axis in enumerate(axes[-1]):
        labels = axis.xaxis.get_ticklabels()
        assert len(labels) >= 1 and all(label.get_text() for label in labels)
        # Neighbours' labels stay within their own panels.
        frame = axis.get_window_extent()
        for label in labels:
            box = label.get_window_extent()
            assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1
        assert axis.get_xlabel().replace("\n", " ").startswith(names[j][:8])
    assert axes[0, 0].get_xticks().tolist() == axes[-1, 0].get_xticks().tolist()


def test_ticks_have_room_and_keep_their_values() -> None:
    from sbi_dist.report.ticks import fit_ticks

    ticks = fit_ticks(-0.1, 1.1, 2.0, 9, 5)
    assert ticks.positions == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert ticks.factor == "" and 0 < ticks.width < 0.5
    assert len(fit_ticks(-0.1, 1.1, 2.0, 9, 2).positions) <= 2
    assert fit_ticks(-0.1, 1.1, 0.01, 9, 5).positions == []
    small = fit_ticks(0.0, 3e-5, 2.0, 9, 4)
    assert "10^" in small.factor and small.labels == ["1", "2"]
    assert small.positions == pytest.approx([1e-5, 2e-5])


def test_pairplot_histograms_end_at_the_bounds(rng: np.random.Generator) -> None:
    draws = np.stack([rng.uniform(0, 1, 3000), rng.exponential(size=3000)], axis=1)
    options: dict[str, Any] = {"prior_samples": draws, "bounds": [[0, 1], [0, np.inf]]}
    _, axes = report.pairplot(draws, **options)
    assert axes[0, 0].get_xlim() == (0, 1) and axes[1, 1].get_xlim()[0] == 0

    def edges(axis: Any) -> np.ndarray:
        outline = next(p for p in axis.patches if type(p).__name__ == "Polygon").get_xy()
        return np.unique(outline[:, 0].round(9))

    heights = np.histogram(draws[:, 0], edges(axes[0, 0]))[0]
    assert edges(axes[0, 0])[[0, -1]].tolist() == [0, 1]
    assert heights.min() > 0.6 * heights.mean()  # none of them half empty
    # A true value beyond the prior widens the panel, and bins still begin and end at the bounds.
    _, axes = report.pairplot(draws, points=[1.5, -1.0], **options)
    assert axes[0, 0].get_xlim()[0] == 0 and axes[0, 0].get_xlim()[1] > 1.5
    assert np.isclose(edges(axes[0, 0]), 1.0).any() and np.isclose(edges(axes[1, 1]), 0.0).any()
    with pytest.raises(ValueError, match=r"bounds is \[\[1.0, 0.0\]"):
        report.pairplot(draws, bounds=[[1, 0], [0, 1]])


# --- predictive check -------------------------------------------------------------------------


def test_coverage_counts_by_series_and_skips_missing_values() -> None:
    draws = np.linspace(0.0, 1.0, 101)[:, None, None] * np.ones((101, 4, 2))
    observed = np.array([[0.5, 2.0], [0.97, 0.5], [0.98, np.nan], [0.01, 0.5]])
    assert report.predictive_coverage(draws, observed) == [(2, 4), (2, 3)]
    assert report.predictive_coverage(draws, observed, level=0.999) == [(4, 4), (2, 3)]
    assert report.predictive_coverage(draws[:, 0, 0], 0.5) == [(1, 1)]
    with pytest.raises(ValueError, match="level is 95; allowed"):
        report.predictive_coverage(draws, observed, level=95)


@pytest.mark.parametrize(
    ("shape", "options", "panels"),
    [
        ((), {}, 1),
        ((3,), {"series_names": ["a", "b", "c"]}, 3),
        ((5,), {"coordinate": [5, 4, 3, 2, 1]}, 1),
        ((40,), {}, 1),
        ((21, 2), {"coordinate": np.arange(1900, 1921), "log_scale": True}, 2),
        ((8, 8, 3), {}, 1),
        ((30, 30), {}, 1),
    ],
)
def test_predictive_check_draws_every_shape(
    shape: tuple[int, ...], options: dict[str, Any], panels: int, rng: np.random.Generator
) -> None:
    draws = rng.poisson(2.0, size=(40, *shape)).astype(float)
    figure = report.predictive_check(draws, draws[0], **options)
    figure.canvas.draw()
    assert sum(axis.get_visible() for axis in figure.axes) == panels


def test_predictive_band_is_the_quantiles_in_coordinate_order(rng: np.random.Generator) -> None:
    draws = rng.normal(size=(300, 20)) + np.arange(20)
    coordinate = np.arange(20)[::-1]
    figure = report.predictive_check(draws, np.arange(20.0), coordinate=coordinate)
    outer = np.asarray(figure.axes[0].collections[0].get_paths()[0].vertices)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    for x, edge in ((3, low[16]), (3, high[16]), (15, low[4]), (15, high[4])):
        assert np.isclose(outer[outer[:, 0] == x, 1], edge).any()


def test_predictive_check_drops_failed_draws_and_names_errors(rng: np.random.Generator) -> None:
    draws = rng.normal(size=(30, 21, 2))
    draws[3] = np.nan
    report.predictive_check(draws, draws[0]).canvas.draw()
    assert report.predictive_coverage(draws, np.zeros((21, 2))) == [(21, 21)] * 2
    with pytest.raises(ValueError, match=r"x_draws has shape \(30, 21, 2\); allowed"):
        report.predictive_check(draws, np.zeros(21))
    with pytest.raises(ValueError, match="series_names"):
        report.predictive_check(draws, draws[0], series_names=["one"])
    with pytest.raises(ValueError, match=r"coordinate has shape \(3,\)"):
        report.predictive_check(draws, draws[0], coordinate=[1, 2, 3])
    with pytest.raises(ValueError, match="x_draws has 0 draws with finite values"):
        report.predictive_check(np.full((5, 3), np.nan), np.zeros(3))


# --- training and simulations -----------------------------------------------------------------


def test_training_curve_shows_losses_best_epoch_and_learning_rate() -> None:
    figure = report.training_curve(HISTORY)
    loss, rate = figure.axes
    lines: dict[str, Any] = {str(line.get_label()): line for line in loss.get_lines()}
    assert list(lines["Validation"].get_ydata()) == HISTORY["validation_loss"]
    assert list(lines["Training"].get_ydata()) == HISTORY["training_loss"]
    (best,) = [line for label, line in lines.items() if label.startswith("Best: epoch 2")]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (2, 1.2)
    assert np.asarray(rate.get_lines()[0].get_ydata()).tolist() == HISTORY["learning_rate"]
    constant = report.training_curve({**HISTORY, "learning_rate": [1e-3] * 3})
    assert len(constant.axes) == 1


def test_training_curve_errors() -> None:
    with pytest.raises(ValueError, match=r"lacks \['best_epoch'\]"):
        report.training_curve({k: v for k, v in HISTORY.items() if k != "best_epoch"})
    with pytest.raises(ValueError, match="lists of equal length"):
        report.training_curve({**HISTORY, "epoch": [1, 2]})


def test_simulation_outcomes_leaves_out_what_has_nothing_to_see() -> None:
    def titles(counts: dict[str, int], durations: Any) -> list[str]:
        figure = report.simulation_outcomes(counts, durations)
        figure.canvas.draw()
        return [axis.get_title("left").split(":")[0] for axis in figure.axes]

    bars, histogram = "Simulations by status", "Time a simulation"
    assert titles({"ok": 5, "timeout": 1}, [1.0, 2.0, 300.0]) == [bars, histogram]
    assert titles({"ok": 5}, np.zeros(5)) == [histogram]
    assert titles({"ok": 5, "error": 2}, []) == [bars]
    with pytest.raises(ValueError, match=r"status_counts\['ok'\] is -1"):
        report.simulation_outcomes({"ok": -1}, [1.0])
    with pytest.raises(ValueError, match="at least one simulation"):
        report.simulation_outcomes({}, [])


def test_simulation_outcomes_says_of_which_simulations_the_run_times_are() -> None:
    def label(counts: dict[str, int]) -> str:
        return report.simulation_outcomes(counts, np.ones(1500)).axes[-1].get_xlabel()

    assert label({"ok": 2000}) == "Run times of the first 1,500 simulations (s)"
    assert label({"ok": 1500}) == "Duration (s)"


# --- recovery ---------------------------------------------------------------------------------


def stored_simulations(
    folder: Path, shape: tuple[int, ...], sizes: list[int], noise: float = 0.5
) -> tuple[Dataset, dict[int, Any], dict[str, Any], np.ndarray, np.ndarray]:
    """A dataset with failures, its records, a bundle's note of it, and its usable rows."""
    rng = np.random.default_rng(5)
    store = open_store(str(folder))
    records, shards, thetas, xs = {}, [], [], []
    for index, size in enumerate(sizes):
        theta = rng.normal(size=(size, 2)).astype(np.float32)
        x = np.zeros((size, *shape), dtype=np.float32)
        x.reshape(size, -1)[:] = theta[:, :1] + noise * rng.normal(size=(size, 1))
        failed = dict.fromkeys(range(index, size, 7), ("error", "ValueError: no"))
        for row in failed:
            x[row] = np.nan
        rows = Simulations(np.arange(size), theta, x, failed, np.ones(size, dtype=np.float32))
        data, record = encode_shard(rows, {"shard": index, "x_shape": list(shape)})
        store.put(f"shard-{index:06d}.parquet", data)
        records[index] = record
        shards.append([index, record.digest])
        thetas.append(theta[rows.ok])
        xs.append(x[rows.ok])
    about = {
        "dataset": {"round": 1, "shards": shards},
        "estimator": {"validation_fraction": 0.1, "seed": 3},
    }
    return Dataset(store), records, about, np.concatenate(thetas), np.concatenate(xs)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
def test_held_out_rows_are_those_of_the_training(shape: tuple[int, ...], tmp_path: Path) -> None:
    dataset, records, about, theta, x = stored_simulations(tmp_path, shape, [70, 50, 90, 40])
    rows = split(len(theta), 0.1, 3)[1]
    found = held_out(dataset, records, about, 200)
    assert np.array_equal(found[0], theta[rows]) and np.array_equal(found[1], x[rows])
    # Only the shards that hold the first few are read.
    for index in (2, 3):
        dataset.store.delete(f"shard-{index:06d}.parquet")
    first = held_out(dataset, records, about, 5)
    assert np.array_equal(first[0], theta[rows[:5]]) and np.array_equal(first[1], x[rows[:5]])
    # A shard that is another than the one trained on, and rows behind it, are left alone.
    about["dataset"]["shards"][1][1] = "another"
    some = held_out(dataset, records, about, 200)[0]
    assert np.array_equal(some, theta[rows[rows < 60]])
    assert len(held_out(dataset, {}, about, 200)[0]) == 0


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.5, 0.96])
def test_held_out_rows_of_any_fraction(fraction: float, tmp_path: Path) -> None:
    dataset, records, about, theta, _ = stored_simulations(tmp_path, (), [1400])
    about["estimator"]["validation_fraction"] = fraction
    rows = split(len(theta), fraction, 3)[1][:200]
    assert np.array_equal(held_out(dataset, records, about, 200)[0], theta[rows])


class ExactPosterior:
    """Of theta_1 ~ N(0, 1) given theta_1 + 0.5 noise: its quantiles as draws; theta_2's prior."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about

    def sample_batched(self, shape: tuple[int], x: np.ndarray, seed: int) -> Any:
        import torch

        scores = stats.norm.ppf(np.arange(1, shape[0] + 1) / (shape[0] + 1))[:, None]
        first = 0.8 * x.reshape(len(x), -1)[:, 0] + np.sqrt(0.2) * scores
        second = np.broadcast_to(scores, first.shape)
        return torch.from_numpy(np.stack([first, second], axis=2))


def test_recovery_of_an_exact_posterior(tmp_path: Path) -> None:
    dataset, records, about, theta, x = stored_simulations(tmp_path, (2, 2), [900, 900, 900])
    posterior: Any = ExactPosterior(about)
    found = recover(posterior, dataset, records)
    assert found is not None and found.notes == []
    rows = split(len(theta), 0.1, 3)[1][:200]
    truth, mean = theta[rows].astype(float), 0.8 * x[rows, 0, 0].astype(float)
    half = stats.norm.ppf(0.95)
    assert np.array_equal(found.truth, truth)
    assert found.median[:, 0] == pytest.approx(mean, abs=1e-6)
    assert found.low[:, 0] == pytest.approx(mean - half * np.sqrt(0.2), abs=1e-6)
    assert found.high[:, 0] == pytest.approx(mean + half * np.sqrt(0.2), abs=1e-6)
    inside = [
        int((np.abs(truth[:, 0] - mean) <= half * np.sqrt(0.2)).sum()),
        int((np.abs(truth[:, 1]) <= half).sum()),
    ]
    with np.errstate(invalid="ignore"):
        counts, correlations = recovered(found)
    assert counts == inside and all(171 <= count <= 188 for count in counts)
    assert correlations[0] == pytest.approx(np.corrcoef(truth[:, 0], mean)[0, 1])

    about["dataset"]["round"] = 2
    noted = recover(posterior, dataset, records, weighted=True)
    assert noted is not None and len(noted.notes) == 2
    assert "round 2, from the truncated prior" in noted.notes[0]
    assert "the network's alone, without importance weights" in noted.notes[1]
    few = {0: records[0]}
    about["dataset"]["shards"] = about["dataset"]["shards"][:1]
    about["estimator"]["validation_fraction"] = 0.02
    assert recover(posterior, dataset, few) is None


@pytest.mark.parametrize(
    ("total", "probability", "expected"), [(200, 0.9, (171, 188)), (20, 0.9, (15, 20))]
)
def test_range_by_chance_is_the_narrowest_of_its_tails(
    total: int, probability: float, expected: tuple[int, int]
) -> None:
    low, high = chance_range(total, probability)
    assert (low, high) == expected
    terms = [
        math.comb(total, k) * probability**k * (1 - probability) ** (total - k)
        for k in range(total + 1)
    ]
    assert sum(terms[:low]) < 0.025 <= sum(terms[: low + 1])
    assert sum(terms[:high]) < 0.975 <= sum(terms[: high + 1])


def made_recovery(dimension: int, count: int = 200) -> RecoveryFacts:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(count, dimension)) * np.logspace(-6, 6, dimension)
    width = np.abs(truth).max(axis=0) * np.linspace(0.1, 1, dimension)
    median = truth + width * rng.normal(size=truth.shape)
    return RecoveryFacts(truth, median - 1.6 * width, median, median + 1.6 * width)


@pytest.mark.parametrize("dimension", [1, 4, 10])
def test_recovery_panels_are_readable(dimension: int) -> None:
    names = [f"a_long_name_{j} [1/(yr k lynx)]" if j % 2 else f"b_{j}" for j in range(dimension)]
    figure = report.recovery_panels(made_recovery(dimension), names)
    figure.draw_without_rendering()
    axes: list[Any] = [axis for axis in figure.axes if axis.get_visible()]
    titles = [axis.get_title("left").replace("\n", " ") for axis in axes]
    assert all(title.startswith(name) for title, name in zip(titles, names, strict=True))
    texts = figure.legends[0].get_texts()
    for axis in axes:
        assert axis.get_xlim() == axis.get_ylim() and len(axis.get_xticks()) >= 2
        texts += axis.get_xticklabels() + axis.get_yticklabels()
        texts += [axis.xaxis.label, axis.yaxis.label, axis._left_title]
    assert touching(texts) == []


def test_page_shows_the_recovery(rng: np.random.Generator) -> None:
    truth = np.tile(np.arange(40.0)[:, None], 2)
    median = np.stack([truth[:, 0], -truth[:, 1]], axis=1)
    facts = RecoveryFacts(truth, truth - 1, median, truth + np.array([1, -0.5]), ["Note <b>."])
    facts.high[:3] = facts.low[:3]
    content = make_content(
        rng, count=0, recovery=facts, dataset=DatasetFacts("set", 90, {"ok": 90}, np.ones(64))
    )
    files = report.render(content)
    assert is_png(files["recovery.png"])
    text = normalised(Page(files["index.html"].decode()))
    assert "Recovery of known parameters" in text and "Note <b>." in text
    assert (
        "Of 40 simulations held out from training, the posterior's central 90 % interval holds "
        "the true value in 37 for rate (correlation of posterior median and true value 1.000) and "
        "0 for <b>bold</b> & co (-1.000); with an exact posterior, each number lies between "
        "32 and 39 with a probability of at least 95 %."
    ) in text
    assert "the run times of the first 64 simulations." in text
    wrong = RecoveryFacts(truth, truth, median[:5], truth)
    with pytest.raises(ValueError, match=r"recovery.median has shape \(5, 2\); allowed: \(N, 2\)"):
        report.render(make_content(rng, count=0, recovery=wrong))


# --- page -------------------------------------------------------------------------------------


def test_page_is_self_contained_and_well_formed(rng: np.random.Generator) -> None:
    files = report.render(make_content(rng))
    assert set(files) == {
        "index.html", "pairplot.png", "predictive.png", "training.png", "simulations.png",
    }  # fmt: skip
    page = Page(files["index.html"].decode())
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources)
    embedded = [base64.b64decode(source.removeprefix(prefix), validate=True) for source in sources]
    assert sorted(embedded) == sorted(v for k, v in files.items() if k.endswith(".png"))
    assert all(is_png(data) for data in embedded)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not {"href", "srcset", "background"} & set(attrs)
    style = files["index.html"].decode().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


@pytest.mark.usefixtures("blank_pictures")
def test_page_escapes_every_text(rng: np.random.Generator) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&"
    content = make_content(
        rng,
        problem=nasty,
        reference=nasty,
        settings={nasty: {"a": nasty}},
        versions={nasty: nasty},
        notes=[nasty],
        prior_description=[nasty],
        created=nasty,
        parameter_names=[nasty, NAMES[1]],
        units=[nasty, None],
        axes=PredictiveAxes(series_names=[nasty, "b"]),
    )
    page = Page(report.render(content)["index.html"].decode())
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert not {"script", "b", "i", "boom"} & {tag for tag, _ in page.tags}
    assert page.text.count(nasty) >= 10
    assert "Trial <script>alert(1)</script>" in page.text and "ValueError: <boom>" in page.text


@pytest.mark.usefixtures("blank_pictures")
def test_page_states_the_results(rng: np.random.Generator) -> None:
    content = make_content(rng)
    text = normalised(Page(report.render(content)["index.html"].decode()))
    expected = "outside the 95 % band (5 % of them, about 1.1, expected)."
    assert f"prey: 0 of 21 observed values lie {expected}" in text
    assert f"predator: 3 of 21 observed values lie {expected}" in text
    assert "how long each took" in text and "Recovery of known parameters" not in text
    assert "Of the 2 known true values, 1 lies between" in text
    assert "trained in 1 min 15 s on 100 simulations, 3 of which (3 %) failed" in text
    assert f"constrains {NAMES[0]} most" in text or f"constrains {NAMES[1]} most" in text
    assert "97 ok and 3 error" in text and "rate = 1.5" in text
    assert "training.flow.layers" in text and "[32, 32]" in text
    row = report.posterior_table(content.observations[0].draws, NAMES)[0]
    assert 0.05 < row["sd"] < 0.0995  # two digits of it make three decimals
    assert f"rate 1/s {row['mean']:.3f} {row['sd']:.3f} {row['q05']:.3f}" in text


@pytest.mark.usefixtures("blank_pictures")
def test_page_says_whether_an_observation_is_like_the_simulations(rng: np.random.Generator) -> None:
    for p_value, words, warned in (
        (0.432, "The observation is like the simulations (p = 0.43).", False),
        (0.02, "The observation is at the edge of what was simulated (p = 0.02).", False),
        (0.001, "The observation is unlike the simulations", True),
        (None, "", False),
    ):
        observations = [ObservationFacts("x", rng.normal(size=(400, 2)), p_value=p_value)]
        html = report.render(make_content(rng, observations=observations))["index.html"].decode()
        assert words in normalised(Page(html))
        assert ("The observation is" in html) == (p_value is not None)
        assert ('<p class="problem">The observation is' in html) == warned


@pytest.mark.usefixtures("blank_pictures")
def test_page_passes_units_and_bounds_to_the_pair_plot(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sbi_dist.report import plots

    passed: dict[str, Any] = {}

    def pairplot(*_: Any, **options: Any) -> None:
        passed.update(options)
        raise ValueError("enough is known")

    monkeypatch.setattr(plots, "pairplot", pairplot)
    bounds = np.array([[0, np.inf], [-1, 1e9]])
    report.render(make_content(rng, bounds=bounds))
    assert passed["labels"] == ["rate [1/s]", "<b>bold</b> & co"]
    assert passed["bounds"] is bounds


@pytest.mark.usefixtures("blank_pictures")
def test_page_limits_observations_and_says_how_many_more(rng: np.random.Generator) -> None:
    files = report.render(make_content(rng, count=4), max_observations=2)
    assert {"pairplot-0001.png", "pairplot-0002.png", "predictive-0002.png"} < set(files)
    assert "pairplot-0003.png" not in files and "pairplot.png" not in files
    text = normalised(Page(files["index.html"].decode()))
    assert "2 more observations are not shown here" in text and "Parquet" in text
    assert "Posterior for obs-1" in text and "obs-2" not in text


def test_page_survives_what_cannot_be_drawn(rng: np.random.Generator) -> None:
    observation = ObservationFacts("obs-0", np.zeros((0, 2)), status="no draws accepted")
    model = ModelFacts("m", "maf", 1, float("nan"), {}, float("nan"))
    dataset = DatasetFacts("set", 0, {}, np.zeros(0))
    content = make_content(rng, count=0, model=model, dataset=dataset, prior_draws=None, units=None)
    for observations in ([], [observation]):
        changed = ReportContent(**{**vars(content), "observations": observations})
        files = report.render(changed)
        assert set(files) == {"index.html"}
        text = normalised(Page(files["index.html"].decode()))
        assert "This picture could not be drawn: history has the keys [] and lacks" in text
    assert "status: no draws accepted" in text and "draws has 0 draws" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameter_names": ["a"]}, r"units is .* allowed: None or 1 units"),
        ({"parameter_names": []}, r"parameter_names is \[\]"),
        ({"prior_draws": np.zeros((9, 3))}, r"prior_draws has shape \(9, 3\); allowed: \(N, 2\)"),
        (
            {"observations": [ObservationFacts("o", np.zeros((9, 5)))]},
            r"observations\[0\]\.draws has shape \(9, 5\)",
        ),
        (
            {"observations": [ObservationFacts("o", np.zeros((9, 2)), true_parameters=np.ones(1))]},
            r"observations\[0\]\.true_parameters has shape \(1,\)",
        ),
    ],
)
def test_page_errors_name_the_field(
    changes: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        report.render(make_content(rng, **changes))
    with pytest.raises(ValueError, match="max_observations is 0"):
        report.render(make_content(rng), max_observations=0)
