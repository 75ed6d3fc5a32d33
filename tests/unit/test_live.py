"""What a training tells while it runs, and how it is shown."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from sbi_dist import metrics
from sbi_dist.errors import StageError
from sbi_dist.estimation import live as live_module
from sbi_dist.estimation import live_view
from sbi_dist.estimation.live import Live, Snapshot, shown
from sbi_dist.estimation.live_view import curve, describe, panel
from sbi_dist.estimation.snapshot import METRICS
from sbi_dist.store import LocalStore

LABELS = {"experiment": "e", "model": "m"}
STEPS = 10  # of an epoch


def history(epochs: int, **more: Any) -> dict[str, Any]:
    """Of a training with so many epochs behind it."""
    losses = [2.0 - 0.1 * epoch for epoch in range(epochs + 1)]
    return {
        "epoch": list(range(epochs + 1)),
        "training_loss": [None, *losses[1:]],
        "validation_loss": losses,
        "learning_rate": [0.0] + [1e-3] * epochs,
        "best_epoch": epochs,
        "best_validation_loss": losses[-1],
        "seconds": 1.5 * epochs,
        "training_simulations": 500,
        "batch_size": 50,
        **more,
    }


def snapshot(epoch: int, step: int, **more: Any) -> Snapshot:
    values: dict[str, Any] = {
        "epoch": epoch,
        "step": step,
        "steps": STEPS,
        "max_epochs": 500,
        "training_loss": 2.0 - 0.01 * step,
        "validation_loss": 2.0 - 0.1 * (epoch - 1),
        "best_validation_loss": 1.0,
        "best_epoch": epoch - 1,
        "learning_rate": 5e-4,
        "simulations_per_second": 12345.6,
        "seconds": 123.0,
        "input_wait": [0.25, 0.5],
    }
    return Snapshot(**{**values, **more})


def train(live: Live, epochs: int, begin: int = 0, end: int | None = None) -> list[Snapshot]:
    """The calls that a training makes from a step to another one; the snapshots that were taken."""
    taken: list[Snapshot] = []

    def take(epoch: int, step: int) -> Callable[[], Snapshot]:
        def now() -> Snapshot:
            taken.append(snapshot(epoch, step))
            return taken[-1]

        return now

    for number in range(begin, epochs * STEPS if end is None else end):
        epoch, step = number // STEPS + 1, number % STEPS + 1
        live(take(epoch, step), history(epoch - 1))
    return taken


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / METRICS).read_text())


# ---- metrics.json -------------------------------------------------------------------------------


def test_metrics_json_is_the_history_and_how_things_stand(tmp_path: Path) -> None:
    live = Live(LocalStore(tmp_path), LABELS, every_s=0.0)
    live(lambda: snapshot(2, 4, note="something"), history(1))
    deadline = time.monotonic() + 30
    while not (tmp_path / METRICS).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    content = stored(tmp_path)
    assert content.pop("now") == dataclasses.asdict(snapshot(2, 4, note="something"))
    assert content == history(1)

    assert live.close(history(2)) == ""
    content = stored(tmp_path)
    now = content.pop("now")
    assert content == history(2)
    assert (now["epoch"], now["seconds_left"]) == (2, 0.0)
    assert now["validation_loss"] == now["best_validation_loss"] == 1.8
    live(lambda: pytest.fail("told after the end"), history(3))
    assert live.close(history(3)) == "" and "now" in stored(tmp_path)


def test_snapshots_come_back_as_they_were_told(tmp_path: Path) -> None:
    told = snapshot(3, 2, seconds_left=math.inf, training_loss=math.nan, data="device", restarts=2)
    with Live(LocalStore(tmp_path), LABELS) as live:
        live(lambda: told, history(2))
    read = Snapshot.read(stored(tmp_path))
    assert repr(read) == repr(told)  # in which NaN equals itself


def test_a_snapshot_is_taken_once_in_a_while(tmp_path: Path) -> None:
    live = Live(LocalStore(tmp_path), LABELS, every_s=0.1)
    calls, began = 0, time.monotonic()
    taken = 0

    def now() -> Snapshot:
        nonlocal taken
        taken += 1
        return snapshot(1, 1)

    while time.monotonic() - began < 0.45:
        live(now, history(0))
        calls += 1
    elapsed = time.monotonic() - began
    live.close(history(0))
    assert 2 <= taken <= 1 + elapsed / 0.1 and calls > 10 * taken


def test_a_bucket_is_asked_less_often_than_a_disk(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert Live(store, LABELS)._every_s == 1.0
    store.uri = "s3://bucket/prefix"
    assert Live(store, LABELS)._every_s == 5.0
    assert Live(store, LABELS, every_s=2.0)._every_s == 2.0


def test_workers_behind_the_first_tell_nothing(tmp_path: Path) -> None:
    with Live(LocalStore(tmp_path), LABELS, rank=1, every_s=0.0) as live:
        assert train(live, 1) == [] and live.close(history(1)) == ""
    assert list(tmp_path.iterdir()) == []


# ---- stores that do not do their part -----------------------------------------------------------


class Stuck(LocalStore):
    """Does not come back from the first write until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached, self.let_go, self.writes = threading.Event(), threading.Event(), 0

    def put(self, key: str, data: bytes) -> None:
        self.writes += 1
        self.reached.set()
        assert self.let_go.wait(60)
        super().put(key, data)


def test_a_slow_store_does_not_hold_up_training(tmp_path: Path) -> None:
    store = Stuck(tmp_path)
    live = Live(store, LABELS, every_s=0.0)
    train(live, 1, end=1)
    assert store.reached.wait(60)
    # With the store stuck in a write, all of the training goes by.
    assert len(train(live, 20, begin=1)) == 20 * STEPS - 1
    assert store.writes == 1
    threading.Timer(0.1, store.let_go.set).start()
    assert live.close(history(20)) == ""
    content = stored(tmp_path)
    assert content.pop("now")["epoch"] == 20 and content == history(20)
    # What was told meanwhile is written at once, and no point of it is lost.
    assert store.writes == 3
    assert scalars(tmp_path)["loss/training"] == [
        (number + 1, single(2.0 - 0.01 * (number % STEPS + 1))) for number in range(20 * STEPS)
    ]


def test_a_history_that_grows_while_it_is_written_is_told_as_it_was(tmp_path: Path) -> None:
    store = Stuck(tmp_path)
    with Live(store, LABELS, every_s=0.0) as live:
        train(live, 1, end=1)
        assert store.reached.wait(60)
        grows = history(1)
        live(lambda: snapshot(2, 1), grows)
        grows["epoch"].append(2)
        grows["validation_loss"].append(9.0)
        store.let_go.set()
    content = stored(tmp_path)
    assert content.pop("now")["epoch"] == 2 and content == history(1)
    assert [step for step, _ in scalars(tmp_path)["loss/validation"]] == [0, STEPS]


class Failing(LocalStore):
    """Fails so many times."""

    def __init__(self, root: Path, failures: float) -> None:
        super().__init__(root)
        self.failures, self.failed = failures, threading.Event()

    def put(self, key: str, data: bytes) -> None:
        if self.failures > 0:
            self.failures -= 1
            self.failed.set()
            raise StageError(f"{key} can't be written (the disk is full)")
        super().put(key, data)


def test_a_store_that_fails_does_not_end_the_training_and_is_told(tmp_path: Path) -> None:
    live = Live(Failing(tmp_path, math.inf), LABELS, every_s=0.0)
    train(live, 2)
    trouble = live.close(history(2))
    assert "metrics.json: could not be written" in trouble and "the disk is full" in trouble
    assert "TensorBoard's files: could not be written 1 time, last StageError" in trouble
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_noted_in_the_next_snapshot(tmp_path: Path) -> None:
    store = Failing(tmp_path, 1)
    live = Live(store, LABELS, every_s=0.0)
    train(live, 1, end=1)
    assert store.failed.wait(30)
    live(lambda: snapshot(1, 2, note="a note"), history(0))
    trouble = live.close(history(1))
    note = stored(tmp_path)["now"]["note"]
    assert note == f"a note; {trouble}"
    assert trouble == (
        "metrics.json: could not be written 1 time, last StageError: metrics.json can't be written "
        "(the disk is full)"
    )
    assert "the disk is full" in describe(stored(tmp_path))


def test_an_error_of_the_training_leaves_no_thread(tmp_path: Path) -> None:
    def fails() -> None:
        with live:
            train(live, 2)
            raise RuntimeError("of the training")

    live = Live(LocalStore(tmp_path), LABELS, every_s=0.0)
    with pytest.raises(RuntimeError, match="of the training"):
        fails()
    assert not live._thread.is_alive()
    assert stored(tmp_path)["now"]["epoch"] == 2
    assert Live(LocalStore(tmp_path), LABELS).close({}) == ""  # never called


# ---- TensorBoard --------------------------------------------------------------------------------


def accumulated(folder: Path) -> Any:
    """What TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = accumulated(folder)
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def single(value: float) -> float:
    """As in TensorBoard's files, whose scalars have single precision."""
    return pytest.approx(value, rel=1e-6)


def test_tensorboard_shows_what_was_told(tmp_path: Path) -> None:
    options = {"estimator": "nsf", "learning_rate": 0.0005}
    live = Live(
        LocalStore(tmp_path), LABELS, hyperparameters=options, every_s=0.0, events_every_s=0.0
    )
    taken = train(live, 3)
    live.close(history(3), snapshot(3, STEPS))
    found = scalars(tmp_path)
    for tag, name in [
        ("loss/training", "training_loss"),
        ("learning_rate", "learning_rate"),
        ("simulations_per_second", "simulations_per_second"),
    ]:
        told = [(now.steps_in_all, single(getattr(now, name))) for now in taken]
        assert found.pop(tag) == told
    for rank in range(2):
        told = [(now.steps_in_all, single(now.input_wait[rank])) for now in taken]
        assert found.pop(f"input_wait/rank-{rank}") == told
    assert found.pop("loss/validation") == [
        (epoch * STEPS, single(2.0 - 0.1 * epoch)) for epoch in range(4)
    ]
    assert not found
    (text,) = accumulated(tmp_path).Tensors("hyperparameters/text_summary")
    assert b"| learning_rate | 0.0005 |" in text.tensor_proto.string_val[0]


def test_files_that_were_written_are_not_touched_again(tmp_path: Path) -> None:
    live = Live(LocalStore(tmp_path), LABELS, every_s=0.0, events_every_s=0.0)
    seen: dict[str, bytes] = {}
    folder = tmp_path / "tensorboard"
    for epoch in range(1, 4):
        live(lambda epoch=epoch: snapshot(epoch, 1), history(epoch - 1))
        deadline = time.monotonic() + 30
        while not folder.exists() or len(list(folder.glob("events*"))) < epoch:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen |= {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in seen}
    live.close(history(3))
    for name, data in seen.items():
        assert (folder / name).read_bytes() == data
    assert [step for step, _ in scalars(tmp_path)["loss/training"]] == [1, 11, 21, 30]


def test_a_run_that_goes_on_replaces_what_was_lost(tmp_path: Path) -> None:
    first = Live(LocalStore(tmp_path), LABELS, every_s=0.0)
    train(first, 3, end=25)
    first.close(history(2), snapshot(3, 5))
    # Its last checkpoint was written after step 17.
    second = Live(LocalStore(tmp_path), LABELS, every_s=0.0)
    train(second, 3, begin=17)
    second.close(history(3), snapshot(3, STEPS))
    found = scalars(tmp_path)
    steps = [step for step, _ in found["loss/training"]]
    assert steps == [*range(1, 17), *range(18, 31)]
    assert [step for step, _ in found["loss/validation"]] == [0, 10, 20, 30]


# ---- metrics ------------------------------------------------------------------------------------


@pytest.fixture
def exported(monkeypatch) -> Iterator[tuple[list[tuple], dict[tuple, float]]]:
    """The gauges in the order they are set, and the sums of what is added to counters."""
    gauges: list[tuple] = []
    counters: dict[tuple, float] = {}
    set_gauge, add = metrics.set_gauge, metrics.add

    def note_gauge(name: str, value: float, labels: dict[str, str]) -> None:
        set_gauge(name, value, labels)  # which checks
        gauges.append((name, value, tuple(labels.values())))

    def note_counter(name: str, amount: float, labels: dict[str, str]) -> None:
        add(name, amount, labels)
        key = (name, *labels.values())
        counters[key] = counters.get(key, 0.0) + amount

    monkeypatch.setattr(metrics, "set_gauge", note_gauge)
    monkeypatch.setattr(metrics, "add", note_counter)
    return gauges, counters


def test_metrics_of_a_training(tmp_path: Path, exported) -> None:
    gauges, counters = exported
    live = Live(LocalStore(tmp_path), LABELS, every_s=0.0)
    train(live, 2)
    last = snapshot(
        2,
        STEPS,
        skipped_steps=3,
        checkpoints=2,
        input_wait_seconds=[0.5, 1.5],
        training_loss=math.nan,
        seconds_left=7.0,
    )
    gauges.clear()
    assert live.close(history(2), last) == ""
    told = {name: value for name, value, labels in gauges if labels == ("e", "m")}
    assert told == {
        "sbi_train_validation_loss": 1.9,
        "sbi_train_best_validation_loss": 1.0,
        "sbi_train_learning_rate": 5e-4,
        "sbi_train_epoch": 2.0,
        "sbi_train_simulations_per_second": 12345.6,
        "sbi_train_seconds_left": 7.0,
    }
    assert counters == {
        ("sbi_train_simulations_total", "e", "m"): 2 * STEPS * 50.0,
        ("sbi_train_skipped_steps_total", "e", "m"): 3.0,
        ("sbi_train_checkpoints_total", "e", "m"): 2.0,
        ("sbi_train_input_wait_seconds_total", "e", "m", "0"): 0.5,
        ("sbi_train_input_wait_seconds_total", "e", "m", "1"): 1.5,
    }


def test_a_run_that_goes_on_counts_only_what_it_does_itself(tmp_path: Path, exported) -> None:
    _, counters = exported
    live = Live(LocalStore(tmp_path), LABELS, every_s=0.0)
    for step in (8, 9, STEPS):
        live(lambda step=step: snapshot(4, step, skipped_steps=5, restarts=2), history(3))
    live.close(history(4), snapshot(4, STEPS, skipped_steps=6, restarts=2))
    assert counters == {
        ("sbi_train_simulations_total", "e", "m"): 3 * 50.0,
        ("sbi_train_skipped_steps_total", "e", "m"): 1.0,
        ("sbi_train_restarts_total", "e", "m"): 1.0,
    }


def test_gauges_are_set_again_during_a_long_step(tmp_path: Path, exported, monkeypatch) -> None:
    gauges, _ = exported
    monkeypatch.setattr(live_module, "_SET_AGAIN_EVERY_S", 0.02)
    with Live(LocalStore(tmp_path), LABELS) as live:
        live(lambda: snapshot(1, 1), history(0))
        deadline = time.monotonic() + 30
        while sum(name == "sbi_train_epoch" for name, *_ in gauges) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# ---- in words -----------------------------------------------------------------------------------


def content(now: Snapshot, **more: Any) -> dict[str, Any]:
    return {**history(max(0, now.epoch - 1), **more), "now": dataclasses.asdict(now)}


def test_a_line() -> None:
    now = snapshot(
        4,
        7,
        seconds_left=3 * 3600.0,
        seconds_left_at_most=True,
        restarts=1,
        skipped_steps=2,
        note="the\nnote",
    )
    assert describe(content(now), quiet_s=61.0) == (
        "train: epoch 4, step 7 of 10, validation loss 1.7000 (best 1.0000 at 3), learning rate "
        "5.0e-04, 12,346 simulations/s, 2 min 03 s, at most 3 h 00 min left, 1 restart, 2 skipped "
        "steps, waited for input 25% 50% by rank, the note, no news for 61 s"
    )


def test_a_line_about_a_history_alone() -> None:
    """At the end, and where another version wrote it."""
    assert describe(history(4)) == (
        "train: epoch 4, validation loss 1.6000 (best 1.6000 at 4), learning rate 1.0e-03, "
        "333 simulations/s, 6 s"
    )
    assert describe({"epoch": [0], "validation_loss": [math.nan]}) == (
        "train: epoch 0, validation loss nan (best none yet at 0), learning rate 0.0e+00, "
        "0 simulations/s, 0 s"
    )


def test_nothing_to_tell() -> None:
    for nothing in ({}, {"failed": {"kind": "InputError"}}, {"epoch": []}, {"now": None}):
        assert describe(nothing) == ""


def test_input_wait_of_many_workers() -> None:
    waits = [0.0] * 63 + [0.64]
    line = describe(content(snapshot(1, 1, input_wait=waits)))
    assert "waited for input 1% on average, most 64% (rank 63)" in line
    assert "input" not in describe(content(snapshot(1, 1, input_wait=[0.01, 0.02])))


# ---- in a panel ---------------------------------------------------------------------------------


def drawn(told: dict[str, Any], width: int = 80, curves: bool = True, quiet_s: float = 0.0) -> str:
    sink = io.StringIO()
    Console(file=sink, width=width, force_terminal=False).print(panel(told, quiet_s, curves))
    return sink.getvalue()


def test_a_panel() -> None:
    now = snapshot(
        9,
        5,
        seconds_left=60.0,
        workers=2,
        device="cuda",
        data="streamed",
        note="epoch 3: the loss was not finite; it goes on from the best weights",
    )
    text = drawn(content(now), quiet_s=40.0)
    lines = text.splitlines()
    assert {cell_len(line) for line in lines} == {80}
    for part in (
        "9 of at most 500, step 5 of 10",
        "1.9500",  # training loss
        "1.2000, best 1.0000 at epoch 8",
        curve(history(8)["validation_loss"], 50),
        "5.0e-04",
        "12,346 simulations/s",
        "2 min 03 s, 60 s left",
        "25% 50% by rank",
        "2 on cuda, data streamed",
        "epoch 3: the loss was not finite",
        "no news for 40 s",
    ):
        assert part in text, part
    assert text.count("━") > 15  # half of the bar
    assert len(drawn(content(now), width=200).splitlines()[0]) == 100
    assert drawn(content(now), curves=False).isascii() is False  # the border
    assert "█" not in drawn(content(now), curves=False)


def test_the_first_moment() -> None:
    first = Snapshot(epoch=1, max_epochs=10)
    assert {cell_len(line) for line in drawn({"now": dataclasses.asdict(first)}).splitlines()} == {
        80
    }
    assert "none yet" in drawn({"now": {}})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(10**400), 10**400)
    | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=20,
)
FIELDS = [field.name for field in dataclasses.fields(Snapshot)]
NAMES = [
    "epoch",
    "training_loss",
    "validation_loss",
    "learning_rate",
    "seconds",
    "now",
    "best_epoch",
]
anything = st.dictionaries(st.sampled_from(NAMES), json_values) | st.fixed_dictionaries(
    {"now": st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=len(FIELDS))},
    optional=dict.fromkeys(NAMES[:-2], json_values),
)


@given(anything)
@settings(deadline=None, max_examples=40)
def test_whatever_is_in_the_file_is_shown(told) -> None:
    line = describe(told)
    assert "\n" not in line and "\x1b" not in line
    for width in (80, 30):
        text = drawn(told, width)
        assert "\x1b" not in text
        assert all(cell_len(each) <= width for each in text.split("\n"))


@given(
    st.lists(st.none() | st.floats(), max_size=200),
    st.integers(1, 60),
)
@settings(deadline=None, max_examples=100)
def test_curves_of_any_losses(losses, width) -> None:
    line = curve(losses, width)
    assert len(line) in (0, min(width, len(losses)))
    assert set(line) <= set(" ▁▂▃▄▅▆▇█")


def test_curves() -> None:
    assert curve([float(loss) for loss in range(8, 0, -1)], 10) == "█▇▆▅▄▃▂▁"
    assert curve([1.0], 10) == curve([], 10) == ""
    assert curve([2.0] * 5, 10) == "▁▁▁▁▁"
    assert curve([1.0, None, 2.0, math.nan], 10) == "▁ █ "
    falling = [math.exp(-epoch / 10) for epoch in range(1000)]
    line = curve([1e6, *falling[:40]], 50)  # the first one does not flatten the others
    assert len(line) == 41 and len(set(line)) > 5
    assert len(curve(falling, 50)) == 50 and curve(falling, 50).startswith("█")


# ---- in the driver ------------------------------------------------------------------------------


class Watched(LocalStore):
    """Counts how often it was looked into."""

    looks = 0

    def get(self, key: str) -> bytes:
        self.looks += 1
        return super().get(key)

    def await_looks(self, more: int = 3) -> None:
        goal, deadline = self.looks + more, time.monotonic() + 30
        while self.looks < goal:
            assert time.monotonic() < deadline, "nobody looks any more"
            time.sleep(0.005)


def write(folder: Path, data: str) -> None:
    (folder / METRICS).write_text(data)  # in place: a reader may see a part of it


def test_lines_are_shown_elsewhere_than_on_a_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(live_view, "_LINE_EVERY_S", 0.0)
    store = Watched(tmp_path)
    with shown(store, True, every_s=0.005):
        store.await_looks()  # nothing there
        for broken in ("", '{"epoch": [1, 2', "[1, 2]", '"text"', "\x00"):
            write(tmp_path, broken)
            store.await_looks()
        assert capsys.readouterr().err == ""
        write(tmp_path, json.dumps(content(snapshot(2, 3, validation_loss=math.nan))))
        store.await_looks()
        (tmp_path / METRICS).unlink()
        store.await_looks()
        write(tmp_path, json.dumps(history(5)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train: epoch 2, step 3 of 10, validation loss nan (best 1.0000")
    assert lines[-1] == describe(history(5))


def test_lines_come_now_and_then(tmp_path: Path, capsys) -> None:
    store = Watched(tmp_path)
    write(tmp_path, json.dumps(history(5)))
    with shown(store, True, every_s=0.005):
        store.await_looks(10)
    assert capsys.readouterr().err == describe(history(5)) + "\n"  # the one at the end


def test_a_panel_is_shown_on_a_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    store = Watched(tmp_path)
    with shown(store, True, every_s=0.02):
        store.await_looks()
        write(tmp_path, json.dumps(content(snapshot(2, 3))))
        store.await_looks(20)
        write(tmp_path, json.dumps(history(5)))
    text = capsys.readouterr().err
    assert "starting workers" in text and "╭─ train ─" in text
    assert "step 3 of 10" in text and text.endswith(describe(history(5)) + "\n")


def test_nothing_is_shown_where_it_is_not_wanted(tmp_path: Path, capsys) -> None:
    store = Watched(tmp_path)
    write(tmp_path, json.dumps(history(5)))
    with shown(store, False):
        pass
    assert store.looks == 0 and capsys.readouterr().err == ""


def test_no_news_for_long_is_told(tmp_path: Path, monkeypatch) -> None:
    news = live_view._News(LocalStore(tmp_path))
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    news.look()
    clock[0] += 100
    assert news.quiet_s() == 0.0  # nothing was told yet
    write(tmp_path, json.dumps(history(1, best_validation_loss=math.nan)))
    news.look()
    clock[0] += 29
    news.look()
    assert news.quiet_s() == 0.0
    clock[0] += 2
    news.look()
    assert news.quiet_s() == pytest.approx(31)
    write(tmp_path, json.dumps(history(2)))
    news.look()
    assert news.quiet_s() == 0.0


def test_importing_it_needs_neither_terminal_nor_tensorboard_nor_ray() -> None:
    program = (
        "import sys; from sbi_dist.estimation import live\n"
        "found = {'rich', 'tensorboardX', 'ray', 'boto3'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
