"""Experiment files: what is read, what is refused and with which sentence, and fingerprints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.catalog.options import InferOptions
from sbi_dist.errors import InputError
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.experiment import Experiment, digest, load_experiment, shipped
from sbi_dist.options import Options, nearest, option
from sbi_dist.simulation.options import SimulateOptions

MINIMAL = "problem: a.b:c\n"


@pytest.fixture
def load(tmp_path: Path):
    def run(text: str | bytes, *overrides: str) -> Experiment:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        experiment, folder = load_experiment(str(path), list(overrides))
        assert folder == tmp_path
        return experiment

    return run


# ---- what is read -------------------------------------------------------------------------------


def test_defaults(load) -> None:
    experiment = load(MINIMAL)
    assert experiment == Experiment(name="mine", problem="a.b:c")
    assert experiment.simulate == SimulateOptions() and experiment.train == TrainOptions()
    assert load(MINIMAL + "simulate:\ntrain: {}\n") == experiment  # empty sections


def test_fields_and_types(load) -> None:
    experiment = load(
        MINIMAL + "name: other\nstore: /tmp/x\nstore_patience_s: 30\n"
        "simulate: {num_simulations: 12, timeout_s: 3, shard_size: null}\n"
        "train: {learning_rate: 1e-3, estimator: maf}\n"  # which YAML reads as text
    )
    assert (experiment.name, experiment.store) == ("other", "/tmp/x")
    assert experiment.store_patience_s == 30.0 and load(MINIMAL).store_patience_s == 600.0
    assert experiment.simulate == SimulateOptions(num_simulations=12, timeout_s=3.0)
    assert experiment.train == TrainOptions(learning_rate=1e-3, estimator="maf")
    assert experiment.resolved()["simulate"]["timeout_s"] == 3.0


def test_shipped_experiments_are_valid_and_known_by_name() -> None:
    assert {"gaussian", "lynx_hare"} <= set(shipped())
    for name, path in shipped().items():
        experiment, folder = load_experiment(name)
        assert experiment.name == name and folder == path.parent
        assert load_experiment(str(path))[0] == experiment


def test_overrides(load) -> None:
    experiment = load(
        MINIMAL + "simulate: {num_simulations: 12}\ntrain:\n",
        "simulate.num_simulations=7",
        "simulate.num_simulations = 8",  # the last one counts
        "train.estimator=maf",
        "infer.num_samples=5",
        "train.patience=null",
        "name=other",
    )
    assert experiment == Experiment(
        name="other",
        problem="a.b:c",
        simulate=SimulateOptions(num_simulations=8),
        train=TrainOptions(estimator="maf"),
        infer=InferOptions(num_samples=5),
    )


_number_options = st.sampled_from(
    [("simulate", "num_simulations"), ("simulate", "seed"), ("train", "seed"), ("infer", "seed")]
)


@given(st.dictionaries(_number_options, st.integers(1, 10**9)))
@settings(deadline=None, max_examples=25)
def test_an_override_is_as_good_as_a_line_in_the_file(tmp_path_factory, values) -> None:
    folder = tmp_path_factory.mktemp("experiment")
    lines, overrides = [MINIMAL], []
    for section in ("simulate", "train", "infer"):
        fields = {key: value for (owner, key), value in values.items() if owner == section}
        lines.append(f"{section}: {fields}\n")
        overrides += [f"{section}.{key}={value}" for key, value in fields.items()]
    (folder / "full.yaml").write_text("name: x\n" + "".join(lines))
    (folder / "bare.yaml").write_text("name: x\n" + MINIMAL)
    full, _ = load_experiment(str(folder / "full.yaml"))
    bare, _ = load_experiment(str(folder / "bare.yaml"), overrides)
    assert full == bare
    for (section, key), value in values.items():
        assert getattr(getattr(full, section), key) == value


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        # unknown keys, with the nearest one
        (
            MINIMAL + "simulate: {num_simulation: 3}",
            "unknown key 'simulate.num_simulation'; did you mean 'simulate.num_simulations'?",
        ),
        (MINIMAL + "simulat: {}", "unknown key 'simulat'; did you mean 'simulate'?"),
        (
            MINIMAL + "zzz: 3",
            "unknown key 'zzz'; allowed: name, problem, store, store_patience_s, simulate, ",
        ),
        (MINIMAL + "infer: {zzz: 3}", "unknown key 'infer.zzz'; allowed: num_samples, seed, "),
        (MINIMAL + "1: 2", "unknown key '1'; allowed: name, problem"),
        # wrong types
        ("problem: 3", "problem is 3; it must be of type string"),
        (MINIMAL + "store: null", "store is None; it must be of type string"),
        (
            MINIMAL + "store_patience_s: 0",
            "store_patience_s is 0.0; it must be greater than 0",
        ),
        (
            MINIMAL + "store_patience: 5",
            "unknown key 'store_patience'; did you mean 'store_patience_s'?",
        ),
        (MINIMAL + "simulate: 3", "simulate is 3; it must be a section with fields"),
        (MINIMAL + "simulate: []", "simulate is []; it must be a section with fields"),
        (
            MINIMAL + "simulate: {num_simulations: many}",
            "simulate.num_simulations is 'many'; it must be of type integer",
        ),
        (
            MINIMAL + "simulate: {num_simulations: 1.5}",
            "simulate.num_simulations is 1.5; it must be of type integer",
        ),
        (
            MINIMAL + "train: {learning_rate: fast}",
            "train.learning_rate is 'fast'; it must be of type number",
        ),
        (
            MINIMAL + "infer: {observations: [a]}",
            "infer.observations is ['a']; it must be of type string",
        ),
        # bounds and choices
        (
            MINIMAL + "simulate: {num_simulations: 0}",
            "simulate.num_simulations is 0; it must be at least 1",
        ),
        (
            MINIMAL + "simulate: {timeout_s: -1}",
            "simulate.timeout_s is -1.0; it must be greater than 0",
        ),
        (MINIMAL + "simulate: {rounds: 11}", "simulate.rounds is 11; it must be at most 10"),
        (MINIMAL + "train: {dropout: 1}", "train.dropout is 1.0; it must be less than 1"),
        (
            MINIMAL + "train: {learning_rate: .nan}",
            "train.learning_rate is nan; it must be greater than 0",
        ),
        (
            MINIMAL + "train: {estimator: nfs}",
            "train.estimator is 'nfs'; allowed: nsf, maf (did you mean 'nsf'?)",
        ),
        (MINIMAL + "name: a b", "name is 'a b'; it must be 1 to 100 letters, digits"),
        (MINIMAL + "name: ../up", "name is '../up'; it must be 1 to 100 letters, digits"),
        ("", "problem is missing; give 'package.module:attribute' or"),
        # no YAML mapping
        ("a: [", "mine.yaml, line 1 is no valid YAML ("),
        (MINIMAL + "\n  bad: : x", "mine.yaml, line 3 is no valid YAML ("),
        ("- 1\n- 2", "mine.yaml holds a list; it must be a mapping of fields"),
        ("just text", "mine.yaml holds a str; it must be a mapping of fields"),
        (b"\xff\xfe\x00\x80", "mine.yaml is no valid YAML (not text)"),
    ],
)
def test_bad_files(load, text, sentence) -> None:
    with pytest.raises(InputError) as caught:
        load(text)
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message
    # Files are named with their path; fields begin the sentence.
    assert message.startswith(sentence) or sentence.startswith("mine.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("simulate.seed", "--set 'simulate.seed' must be key.path=value"),
        ("=3", "--set '=3' must be key.path=value"),
        ("simulate.seed=[", "--set 'simulate.seed=[': the value is no valid YAML"),
        ("name.x=3", "--set 'name.x=3': name is no section"),
        ("train.estimatr=maf", "unknown key 'train.estimatr'; did you mean 'train.estimator'?"),
        ("train.transforms=0", "train.transforms is 0; it must be at least 1"),
        ("train.seed.x=0", "train.seed is {'x': 0}; it must be of type integer"),
        ("simulate=5", "simulate is 5; it must be a section with fields"),
        ("problem=", "problem is None; it must be of type string"),
    ],
)
def test_bad_overrides(load, override, sentence) -> None:
    with pytest.raises(InputError) as caught:
        load("name: x\n" + MINIMAL, override)
    assert str(caught.value).startswith(sentence)


def test_unknown_experiments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'lynxhare' is neither .*\(did you mean 'lynx_hare'\?\)"):
        load_experiment("lynxhare")
    with pytest.raises(InputError, match="neither a file nor a shipped experiment; shipped are"):
        load_experiment(str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="neither a file nor"):
        load_experiment(str(tmp_path))


# ---- options and fingerprints -------------------------------------------------------------------

RUNNING_ONLY: list[tuple[Options, dict[str, Any]]] = [
    (SimulateOptions(), {"actors": 7}),
    (SimulateOptions(), {"num_simulations": 9, "rounds": 2, "max_failure_fraction": 0.5}),
    (SimulateOptions(), {"cpus_per_actor": 2.0, "gpus_per_actor": 1.0}),
    (TrainOptions(), {"workers": 4, "cpus_per_worker": 2.0, "gpus_per_worker": 1.0}),
    (TrainOptions(), {"checkpoint_every_s": 1.0}),
    (InferOptions(), {"observations": "catalog.csv"}),
]
OUTCOMES: list[tuple[Options, dict[str, Any]]] = [
    (SimulateOptions(), {"seed": 1}),
    (SimulateOptions(), {"batch_size": 10}),
    (SimulateOptions(), {"shard_size": 10}),
    (SimulateOptions(), {"timeout_s": 1.0}),
    (TrainOptions(), {"seed": 1}),
    (TrainOptions(), {"estimator": "maf"}),
    (TrainOptions(), {"batch_size": 10}),
    (TrainOptions(), {"max_seconds": 10.0}),
    (InferOptions(), {"seed": 1}),
    (InferOptions(), {"num_samples": 1}),
]


@pytest.mark.parametrize(("options", "changes"), RUNNING_ONLY)
def test_how_a_stage_runs_is_not_in_its_fingerprint(options, changes) -> None:
    changed = dataclasses.replace(options, **changes)
    assert changed != options
    assert digest(changed.outcome()) == digest(options.outcome())


@pytest.mark.parametrize(("options", "changes"), OUTCOMES)
def test_what_a_stage_computes_is_in_its_fingerprint(options, changes) -> None:
    changed = dataclasses.replace(options, **changes)
    assert digest(changed.outcome()) != digest(options.outcome())


def test_digest() -> None:
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert len(digest({})) == 12 and len(digest({}, 8)) == 8 and int(digest({}), 16) >= 0


def test_option_defaults_are_not_shared() -> None:
    fields = [
        ("values", list, option([1], "numbers")),
        ("size", Any, option("auto", "a positive number, or auto", gt=0)),
    ]
    made = dataclasses.make_dataclass("Made", fields, bases=(Options,), frozen=True)
    first, second = made(), made(size=2)
    first.values.append(2)
    assert second.values == [1]
    with pytest.raises(InputError, match="size is 0; it must be greater than 0"):
        made(size=0)


def test_nearest() -> None:
    assert nearest("sed", ["seed", "store"]) == "seed"
    assert nearest("xyz", ["seed", "store"]) is None
    assert nearest("a", []) is None
