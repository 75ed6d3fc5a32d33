"""Reading the SBI benchmark's observations and reference draws from its files."""

from __future__ import annotations

import bz2
import functools
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sbi_dist.errors import InputError
from sbi_dist.experiment import load_experiment, shipped
from sbi_dist.problems import reference
from sbi_dist.problems.reference import (
    DRAWS,
    INSTALL,
    OBSERVATIONS,
    PROBLEMS,
    load_reference,
    parse_table,
    reference_problem,
)


def written(numbers: np.ndarray, names: list[str] | None = None, end: str = "\n") -> bytes:
    names = names or [f"parameter_{column + 1}" for column in range(numbers.shape[1])]
    rows = [",".join(repr(float(number)) for number in row) for row in numbers]
    return end.join([",".join(names), *rows, ""]).encode()


def table_of(numbers: np.ndarray, content: bytes, named: str = "x.csv") -> np.ndarray:
    return parse_table(content, *numbers.shape, named)


finite = st.floats(allow_nan=False, allow_infinity=False)
tables = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 20), st.integers(1, 6)), elements=finite
)


@functools.cache
def two_columns() -> bytes:
    return bz2.compress(written(np.random.default_rng(0).standard_normal((DRAWS, 2))))


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """A folder like the wheel's, of one task and one observation."""
    folder = tmp_path / "site/sbibm/tasks/two_moons/files/num_observation_3"
    folder.mkdir(parents=True)
    (folder / "observation.csv").write_bytes(written(np.array([[0.5, -0.25]])))
    (folder / "true_parameters.csv").write_bytes(written(np.array([[0.125, 1e-5]])))
    (folder / "reference_posterior_samples.csv.bz2").write_bytes(two_columns())
    return tmp_path / "site"


def packed(folder: Path) -> Path:
    wheel = folder.parent / "sbibm-1.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
    return wheel


def only_file(folder: Path, name: str) -> Path:
    return next(folder.rglob(name))


# ---- tables -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(tables, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_numbers_come_back_as_they_were_written(numbers, end, compressed) -> None:
    content = written(numbers, end=end)
    if compressed:
        found = table_of(numbers, bz2.compress(content), "x.csv.bz2")
    else:
        found = table_of(numbers, content)
    np.testing.assert_array_equal(found, numbers)
    assert found.dtype == np.float64


@settings(max_examples=50, deadline=None)
@given(tables, st.integers(-3, 3), st.integers(-3, 3))
def test_another_number_of_rows_or_columns_is_refused(numbers, more_rows, more_columns) -> None:
    rows, columns = numbers.shape[0] + more_rows, numbers.shape[1] + more_columns
    if (more_rows or more_columns) and rows > 0 and columns > 0:
        with pytest.raises(InputError, match=r"x\.csv .*sbibm"):
            parse_table(written(numbers), rows, columns, "x.csv")


@settings(max_examples=50, deadline=None)
@given(tables, st.data())
def test_what_is_no_finite_number_is_refused(numbers, data) -> None:
    text = [line.split(",") for line in written(numbers).decode().splitlines()]
    row = data.draw(st.integers(1, len(numbers)))
    column = data.draw(st.integers(0, numbers.shape[1] - 1))
    wrong = ["nan", "inf", "-inf", "NA", "null", "x", "1e999", '"1"', "1 2", "0x1", "--1"]
    # A line without anything is none.
    text[row][column] = data.draw(st.sampled_from(wrong + [""] * (numbers.shape[1] > 1)))
    with pytest.raises(InputError, match=r"x\.csv .*sbibm"):
        table_of(numbers, "\n".join(map(",".join, text)).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["x.csv", "x.csv.bz2"]), st.integers(1, 3))
def test_any_bytes_are_a_table_or_refused(content, named, columns) -> None:
    try:
        found = parse_table(content, 1, columns, named)
    except InputError as error:
        refused = str(error)
    else:
        refused = None
        assert found.shape == (1, columns) and np.isfinite(found).all()
    assert refused is None or (named in refused and INSTALL in refused)


@settings(max_examples=30, deadline=None)
@given(tables, st.data())
def test_a_file_that_is_cut_short_is_refused(numbers, data) -> None:
    content = bz2.compress(written(numbers))
    length = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(InputError, match=r"x\.csv\.bz2 can't be read"):
        table_of(numbers, content[:length], "x.csv.bz2")


def test_what_unpacks_to_too_much_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(reference, "_LARGEST", 1000)
    bomb = bz2.compress(b"a\n" + b"0\n" * 10_000)
    assert len(bomb) < 100
    with pytest.raises(InputError, match="larger than 1,000 bytes"):
        parse_table(bomb, 10_000, 1, "x.csv.bz2")


# ---- places -------------------------------------------------------------------------------------


def test_a_folder_the_package_in_it_and_a_wheel_hold_the_same(unpacked) -> None:
    read = [
        load_reference("two_moons", 3, place)
        for place in (unpacked, str(unpacked / "sbibm"), packed(unpacked))
    ]
    for each in read:
        assert (each.task, each.number) == ("two_moons", 3)
        np.testing.assert_array_equal(each.observation, [0.5, -0.25])
        np.testing.assert_array_equal(each.true_parameters, [0.125, 1e-5])
        np.testing.assert_array_equal(each.draws, read[0].draws)
    expected = np.random.default_rng(0).standard_normal((DRAWS, 2))
    np.testing.assert_array_equal(read[0].draws, expected)


def test_the_installed_package_is_found(unpacked, monkeypatch) -> None:
    information = unpacked / "sbibm-1.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sbibm\nVersion: 1.1.0\n")
    monkeypatch.syspath_prepend(str(unpacked))
    assert load_reference("two_moons", 3).draws.shape == (DRAWS, 2)


def test_no_package_is_a_sentence(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(reference.metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"not installed here.*pip install --no-deps sbibm==1\.1"):
        load_reference("two_moons", 3)


@pytest.mark.parametrize(
    ("task", "number", "sentence"),
    [
        ("two_moon", 3, r"reference.task is 'two_moon' \(did you mean 'two_moons'\?\); .*slcp"),
        ("two_moons", 0, "reference.observation is 0; it must be an integer from 1 to 10"),
        ("two_moons", 11, "reference.observation is 11; it must be an integer from 1 to 10"),
        ("two_moons", True, "reference.observation is True; it must be an integer from 1 to 10"),
        ("two_moons", 1.0, r"reference.observation is 1.0; it must be an integer from 1 to 10"),
        ("two_moons", 4, r"has no tasks/two_moons/files/num_observation_4/observation\.csv; give"),
        ("sir", 3, r"has no tasks/sir/files/num_observation_3/observation\.csv; give the wheel"),
    ],
)
def test_what_is_asked_for_and_is_not_there(unpacked, task, number, sentence) -> None:
    for place in (unpacked, packed(unpacked)):
        with pytest.raises(InputError, match=sentence):
            load_reference(task, number, place)


def test_places_that_hold_no_package(tmp_path) -> None:
    (tmp_path / "text.whl").write_text("no zip file")
    for place, sentence in {
        tmp_path / "nowhere.whl": "which is not there",
        tmp_path / "text.whl": "which is no wheel",
        tmp_path: "which has no tasks/two_moons",
    }.items():
        with pytest.raises(InputError, match=f"reference.source is .*{sentence}.*; give the wheel"):
            load_reference("two_moons", 3, place)


@pytest.mark.parametrize("name", ["observation.csv", "reference_posterior_samples.csv.bz2"])
def test_a_damaged_file_is_named(unpacked, name) -> None:
    file = only_file(unpacked, name)
    file.write_bytes(file.read_bytes()[:-30])
    for place in (unpacked, packed(unpacked)):
        with pytest.raises(InputError, match=f"reference.source: .*{name} "):
            load_reference("two_moons", 3, place)


def test_a_damaged_wheel_is_refused(unpacked) -> None:
    wheel = packed(unpacked)
    content = bytearray(wheel.read_bytes())
    content[200:1200] = bytes(1000)  # in the first files, of which the directory is at the end
    wheel.write_bytes(content)
    with pytest.raises(InputError, match=r"reference.source: .* can't be read"):
        load_reference("two_moons", 3, wheel)


def test_a_file_larger_than_any_is_refused(unpacked, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_LARGEST", 10)
    for place in (unpacked, packed(unpacked)):
        with pytest.raises(InputError, match="is larger than 10 bytes, which no file of sbibm is"):
            load_reference("two_moons", 3, place)


# ---- problems -----------------------------------------------------------------------------------


def test_each_problem_has_an_experiment() -> None:
    assert len(OBSERVATIONS) == 10
    for task in PROBLEMS:
        assert task in shipped()
        experiment, _ = load_experiment(task)
        assert experiment.problem == f"sbi_dist.problems.{task}:problem"
        assert reference_problem(task).observed is not None
