"""A search's space, its list of trials, its table and what it proposes; without Ray."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.experiment import Experiment, load_experiment
from sbi_dist.report.gather import _search
from sbi_dist.report.page import render
from sbi_dist.store import LocalStore
from sbi_dist.tuning.options import TuneOptions
from sbi_dist.tuning.records import (
    TrialRecord,
    keep_records,
    read_losses,
    read_records,
    save_losses,
    save_record,
    tidy,
)
from sbi_dist.tuning.search import Search, plan_search
from sbi_dist.tuning.space import Choices, Range
from sbi_dist.tuning.stage import SEARCH, SUMMARY, latest_summary, searches
from sbi_dist.tuning.table import (
    HEADINGS,
    best_yaml,
    cells,
    make_rows,
    optimism,
    override_lines,
    table_text,
    verdict,
)
from tests.unit.test_report import make_content

MINIMAL = "problem: a.b:c\n"
DATA = {"dataset": "d", "shards": [[0, "x"]]}


@pytest.fixture
def load(tmp_path: Path):
    def run(text: str, *overrides: str) -> Experiment:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_experiment(str(path), list(overrides))[0]

    return run


# ---- the section in the experiment file ---------------------------------------------------------


def test_a_space_is_read_from_the_file_and_overridden(load) -> None:
    experiment = load(
        MINIMAL + "tune: {trials: 5, space: {estimator: [nsf], batch_size: [null, 100]}}",
        "tune.space.learning_rate={low: 1e-4, high: 1e-2, log: true}",  # YAML reads 1e-4 as text
        "tune.space.transforms={low: 2, high: 4}",
    )
    assert experiment.tune.values() == {
        "batch_size": Choices((None, 100)),
        "estimator": Choices(("nsf",)),
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "transforms": Range(2, 4, whole=True),
    }
    assert load(MINIMAL + "tune:").tune == TuneOptions()


@pytest.mark.parametrize(
    ("tune", "sentence"),
    [
        ("space: {hiden_features: [5]}", "tune.space has 'hiden_features', which is no field of "),
        ("space: {hiden_features: [5]}", "did you mean 'hidden_features'?"),
        ("space: {workers: [1]}", "can't be searched: it changes how a training runs"),
        ("space: {seed: [1, 2]}", "trials that are validated on other simulations"),
        ("space: {max_epochs: [5]}", "set tune.max_epochs"),
        ("space: {ensemble: [2]}", "every trial trains one estimator"),
        ("space: {hidden_features: [0]}", "tune.space.hidden_features is 0; it must be at least 1"),
        ("space: {estimator: [nfs]}", "tune.space.estimator is 'nfs'; allowed: nsf, maf"),
        ("space: {hidden_features: [many]}", "tune.space.hidden_features has 'many'; it must be"),
        ("space: {hidden_features: [true]}", "it must not be true or false"),
        ("space: {hidden_features: [2.5]}", "tune.space.hidden_features has 2.5; it must be"),
        ("space: {hidden_features: 5}", "it must be a list of values, or have low, high"),
        ("space: {hidden_features: []}", "is an empty list"),
        ("space: {}", "tune.space is empty"),
        ("space: {estimator: {low: 1, high: 2}}", "it must be a list of nsf, maf"),
        ("space: {learning_rate: {low: 1}}", "it must have both low and high"),
        ("space: {learning_rate: {low: 0.1, hi: 1}}", "has 'hi'; allowed: low, high and log; did"),
        ("space: {learning_rate: {low: 0.1, high: 0.1}}", "low must be less"),
        ("space: {learning_rate: {low: 0.1, high: 2}}", "learning_rate is 2.0; it must be at most"),
        ("space: {learning_rate: {low: 0.1, high: .nan}}", "learning_rate is nan; it must be"),
        ("space: {learning_rate: {low: 0.1, high: 1, log: 2}}", "log is 2; it must be true or"),
        ("space: {weight_decay: {low: 0, high: 1, log: true}}", "with log it must be greater than"),
        ("trials: 0", "tune.trials is 0; it must be at least 1"),
        ("reduction: 1", "tune.reduction is 1"),
        ("trails: 5", "did you mean 'tune.trials'?"),
    ],
)
def test_what_is_refused(load, tune: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load(MINIMAL + f"tune: {{{tune}}}\n")
    assert sentence in str(caught.value)


# ---- places in a space --------------------------------------------------------------------------

places = st.floats(0, 1, exclude_max=True)


@given(places, st.integers(1, 500), st.integers(1, 500), st.booleans())
def test_whole_numbers_stay_in_their_range(place, low, more, log) -> None:
    value = Range(low, low + more, log, whole=True).at(place)
    assert isinstance(value, int) and low <= value <= low + more


@given(places, st.floats(1e-6, 1), st.floats(1.01, 1e4), st.booleans())
def test_numbers_stay_in_their_range(place, low, factor, log) -> None:
    high = low * factor
    value = Range(low, high, log).at(place)
    assert low <= value <= high
    assert value in (low, high) or float(f"{value:.3g}") == value


@pytest.mark.parametrize("log", [False, True])
def test_a_range_is_covered_evenly(log) -> None:
    grid = (np.arange(4000) + 0.5) / 4000
    values = np.array([Range(1, 4, log, whole=True).at(place) for place in grid])
    counts = np.array([(values == each).mean() for each in (1, 2, 3, 4)])
    edges = np.log(np.arange(1, 6)) if log else np.arange(1.0, 6.0)
    # A grid of 4,000 places counts each interval to one place.
    assert np.abs(counts - np.diff(edges) / (edges[-1] - edges[0])).max() <= 1.01 / 4000
    middle = Range(1e-4, 1e-2, log).at(0.5)
    assert middle == pytest.approx(1e-3 if log else 5.05e-3)


# ---- the list of trials -------------------------------------------------------------------------

spaces = st.fixed_dictionaries(
    {"learning_rate": st.just({"low": 1e-4, "high": 1e-2, "log": True})},
    optional={
        "transforms": st.just({"low": 2, "high": 6}),
        "estimator": st.sampled_from([["nsf", "maf"], ["maf"]]),
        "bins": st.just([4, 8]),
        "dropout": st.just({"low": 0.0, "high": 0.5}),
    },
)


@given(spaces, st.integers(1, 30), st.integers(0, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_more_trials_keep_those_before(space, trials, more, seed) -> None:
    def plan(count: int) -> Search:
        return plan_search(TuneOptions(trials=count, space=space, seed=seed), TrainOptions(), DATA)

    few, many = plan(trials), plan(trials + more)
    assert few.id == many.id and few.trials == many.trials[:trials]
    assert few == plan(trials)
    assert few.trials[0].settings == {} and few.trials[0].options == TrainOptions()
    ids = [trial.id for trial in many.trials]
    assert len(ids) == len(set(ids)) == trials + more
    for trial in many.trials:
        assert trial.options == dataclasses.replace(TrainOptions(), **trial.settings)
        assert set(trial.settings) <= set(space)
        # What does nothing for the estimator makes no other trial.
        assert trial.options.estimator == "nsf" or "bins" not in trial.settings


def test_the_order_of_fields_and_what_changes_no_outcome_make_no_other_search() -> None:
    a, b = {"blocks": [1, 2, 3]}, {"transforms": {"low": 2, "high": 8}}
    one = plan_search(TuneOptions(space={**a, **b}), TrainOptions(), DATA)
    other = plan_search(
        TuneOptions(space={**b, **a}, concurrent=3, cpus_per_trial=2), TrainOptions(workers=2), DATA
    )
    assert one.id == other.id
    assert [each.id for each in one.trials] == [each.id for each in other.trials]
    for changed in (
        plan_search(TuneOptions(space={**a, **b}, seed=1), TrainOptions(), DATA),
        plan_search(TuneOptions(space={**a, **b}, grace_epochs=5), TrainOptions(), DATA),
        plan_search(TuneOptions(space={**a, **b}), TrainOptions(seed=1), DATA),
        plan_search(TuneOptions(space={**a, **b}), TrainOptions(), {**DATA, "shards": []}),
    ):
        assert changed.id != one.id


def test_a_small_space_is_tried_in_full_and_once() -> None:
    space = {"estimator": ["nsf", "maf"], "blocks": [1, 2, 3], "bins": [5, 10]}
    found = plan_search(TuneOptions(trials=100, space=space), TrainOptions(), DATA).trials
    # Bins do nothing for a maf: 6 nsf and 3 maf, one of which is the train section's own.
    assert len(found) == 9
    named = {(t.options.estimator, t.options.blocks, t.options.bins) for t in found}
    assert named == {("nsf", b, k) for b in (1, 2, 3) for k in (5, 10)} | {
        ("maf", b, 10) for b in (1, 2, 3)
    }


def test_places_cover_the_space_better_than_chance() -> None:
    space = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "dropout": {"low": 0.0, "high": 0.5},
        "weight_decay": {"low": 0.0, "high": 1.0},
    }
    for seed in range(5):
        trials = plan_search(TuneOptions(trials=65, space=space, seed=seed), TrainOptions(), DATA)
        chosen = [trial.options for trial in trials.trials[1:]]
        cells_hit = {
            (
                int(2 * (math.log10(each.learning_rate) + 4)),
                int(8 * each.dropout),
                int(4 * each.weight_decay),
            )
            for each in chosen
        }
        # 64 independent points leave 64 (1 - 1/64)^64 = 23 of 64 cells empty, with an sd of
        # sqrt(64 (e^-1 - 2 e^-2)) = 2.5; fewer than 23 - 3 * 2.5 = 16 is no chance.
        assert len(cells_hit) > 64 - 16


def test_all_trials_are_validated_alike() -> None:
    train = TrainOptions(ensemble=3, warm_start=True, seed=7, max_epochs=50, bins=5)
    search = plan_search(TuneOptions(max_epochs=9), train, DATA)
    for trial in search.trials:
        alike = {"ensemble": 1, "warm_start": False, "seed": 7, "max_epochs": 9, "bins": 5}
        assert {name: getattr(trial.options, name) for name in alike} == alike


# ---- records ------------------------------------------------------------------------------------


def test_records_are_written_once_and_read_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = TrialRecord("a", {"bins": 5}, "finished", loss=1.5, validation_loss=[2.0, None, 1.5])
    assert save_record(store, record) and not save_record(store, TrialRecord("a", {}, "stopped"))
    save_record(store, TrialRecord("b", {}, "failed", "its process died", again=True))
    store.put("trial-c.json", b'{"cut')
    assert read_records(store, ["a", "c", "d"]) == {"a": record}
    assert record.best_until() == [2.0, 2.0, 1.5]
    # What may come out otherwise is begun again.
    assert keep_records(store, ["a", "b", "c"]) == {"a": record}
    assert list(store.list("trial-")) == ["trial-a.json"]
    for key in ("a/checkpoints/1", "a/checkpoints/2", "b/checkpoints/1", "d/checkpoints/1"):
        store.put(key, b"")
    tidy(store, ["a"])
    assert [key for key in store.list() if "/" in key] == ["b/checkpoints/1", "d/checkpoints/1"]
    tidy(store, ["a", "b"])
    assert [key for key in store.list() if "/" in key] == ["d/checkpoints/1"]
    losses = np.array([1.0, 2.5], dtype=np.float32)
    save_losses(store, "a", losses)
    found = read_losses(store, "a")
    assert found is not None and found.tolist() == [1.0, 2.5]
    assert read_losses(store, "b") is None


# ---- the table and what follows from it ---------------------------------------------------------


def searched(**train: Any) -> tuple[Search, dict[str, TrialRecord]]:
    """A search of four trials that has ended: the third is the best, the last failed."""
    space = {"hidden_features": [20, 30, 40], "dropout": [0.25]}
    options = TuneOptions(trials=4, space=space)
    search = plan_search(options, TrainOptions(**train), DATA)
    own, stopped, best, failed = search.trials
    return search, {
        own.id: TrialRecord(own.id, {}, "finished", loss=1.0, epochs=9, held_out=100),
        stopped.id: TrialRecord(stopped.id, stopped.settings, "stopped", loss=1.25, held_out=100),
        best.id: TrialRecord(
            best.id, best.settings, "finished", loss=0.75, held_out=100, weights=4710
        ),
        failed.id: TrialRecord(failed.id, failed.settings, "failed", "train: out of memory"),
    }


def test_rows_are_ordered_and_compared_by_pairs() -> None:
    search, records = searched()
    rng = np.random.default_rng(0)
    hard = 10 * rng.standard_normal(50)
    own, _, best, failed = (trial.id for trial in search.trials)
    losses = {own: hard, best: hard + np.tile([0.0, -0.5], 25)}
    rows = make_rows(search, records, losses.get)
    assert [row.rank for row in rows] == [1, 2, 3, None]
    assert rows[0].record.trial == best and rows[3].record.trial == failed
    assert rows[0].difference == -0.25 and rows[1].difference is None
    assert rows[2].difference == 0.25 and rows[2].error is None
    # Differences of 0 and -0.5 have an sd of 0.25 sqrt(50 / 49); the loss is a mean of 100.
    assert rows[0].error == pytest.approx(0.25 * math.sqrt(50 / 49) / 10)
    expected = 0.25 * math.sqrt(50 / 49) / 10 * math.sqrt(2 * math.log(3))
    assert optimism(rows) == pytest.approx(expected)
    assert "-0.2500 ± 0.0253 from that of the train section" in verdict(rows)
    assert f"by {expected:.2g} nats at most on average" in verdict(rows)
    text = table_text(rows)
    lines = text.splitlines()
    assert lines[0].split() == list(HEADINGS) and len({len(line) for line in lines[:2]}) <= 2
    assert f"{failed} failed: train: out of memory" == lines[-1]
    assert cells(rows[0])["weights"] == "4,710" and cells(rows[1])["difference"] == ""
    starts = {line.index("finished") for line in lines if "finished" in line}
    assert starts == {lines[0].index("status")}


def test_the_expected_optimism_is_below_its_bound() -> None:
    """For independent errors, the worst case of Gaussian ones, and for equal ones."""
    rng = np.random.default_rng(1)
    for count in (2, 5, 50):
        least = rng.standard_normal((20_000, count)).min(1).mean()
        rows = make_rows(*_alike(count), lambda name: None)
        assert optimism(rows) is None
        rows = [dataclasses.replace(row, error=1.0) for row in rows]
        bound = optimism(rows)
        # The mean of 20,000 minima has a standard error below 1 / sqrt(20,000) = 0.007.
        assert bound is not None and -least < bound + 0.03
        assert bound < 2.5 * -least  # and it is not far above


def _alike(count: int) -> tuple[Search, dict[str, TrialRecord]]:
    options = TuneOptions(trials=count, space={"weight_decay": {"low": 0.0, "high": 1.0}})
    search = plan_search(options, TrainOptions(), DATA)
    return search, {
        trial.id: TrialRecord(trial.id, trial.settings, "finished", loss=1.0)
        for trial in search.trials
    }


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_epochs": st.integers(1, 10**6),
            "learning_rate": st.floats(1e-9, 1),
            "batch_size": st.none() | st.integers(1, 10**6),
            "hidden_features": st.integers(1, 4096),
            "workers": st.just("auto") | st.integers(0, 1024),
            "clip_norm": st.floats(1e-3, 1e3),
        },
    )
)
@settings(deadline=None, max_examples=40)
def test_the_proposed_settings_are_what_the_file_gives(tmp_path_factory, train) -> None:
    search, records = searched(**train)
    rows = make_rows(search, records, lambda name: None)
    wanted = dataclasses.replace(TrainOptions(**train), **rows[0].record.settings)
    folder = tmp_path_factory.mktemp("best")
    (folder / "pasted.yaml").write_text(MINIMAL + best_yaml(search, rows))
    assert load_experiment(str(folder / "pasted.yaml"))[0].train == wanted
    # And as arguments, on top of the file as it was.
    (folder / "before.yaml").write_text(MINIMAL + f"train: {json.dumps(train)}\n")
    words = [line.removeprefix("--set ") for line in override_lines(rows)]
    assert load_experiment(str(folder / "before.yaml"), words)[0].train == wanted


def test_where_the_train_section_is_best_nothing_is_proposed() -> None:
    search, records = searched()
    own = search.trials[0].id
    records[own] = dataclasses.replace(records[own], loss=0.5)
    rows = make_rows(search, records, lambda name: None)
    assert verdict(rows).startswith("The settings of the train section have the least")
    assert override_lines(rows) == [] and best_yaml(search, rows) == "train: {}\n"


# ---- status and report --------------------------------------------------------------------------


def test_status_and_report_show_a_search(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    search, records = searched()
    folder = store.child(f"tune/{search.id}")
    names = [trial.id for trial in search.trials]
    folder.put(SEARCH, json.dumps({"dataset": "d", "trials": names}).encode())
    for record in list(records.values())[:3]:
        save_record(folder, record)
    (found,) = searches(store)
    assert found["trials"] == "3 of 4" and found["best_loss"] == 0.75
    assert "hidden_features=" in found["best"]
    assert latest_summary(store, "d") is None and _search(store, "d") is None  # not ended

    rows = make_rows(search, records, lambda name: None)
    shown = [{**cells(row), "reason": row.record.reason} for row in rows]
    for name, ended in (("older", "2025-01-01"), (search.id, "2026-01-01")):
        content = {"search": name, "dataset": "d", "ended": ended, "rows": shown}
        store.child(f"tune/{name}").put(
            SUMMARY, json.dumps({**content, "verdict": "It is <found>."}).encode()
        )
    assert _search(store, "another") is None
    facts = _search(store, "d")
    assert facts is not None and facts.search_id == search.id and len(facts.rows) == 4
    page = render(make_content(np.random.default_rng(0), tune=facts))["index.html"].decode()
    assert "Hyperparameter search" in page and "It is &lt;found&gt;." in page
    assert "train: out of memory" in page and page.count('<td class="mono">stopped</td>') == 1
