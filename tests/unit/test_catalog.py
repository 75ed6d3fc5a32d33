"""Catalogs of observations: the files that are read, and the sentences for those that are not."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from sbi_dist.catalog import source
from sbi_dist.catalog.file import open_file
from sbi_dist.catalog.rows import STATUSES, Rows
from sbi_dist.catalog.source import Source, open_catalog
from sbi_dist.errors import InputError, StageError
from sbi_dist.store import LocalStore

X = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
ROWS = X.reshape(3, 8).tolist()


@dataclasses.dataclass
class Catalog:
    """All rows of a source."""

    source: Source

    def __post_init__(self) -> None:
        self.name = self.source.name
        rows = self.source.read(0, len(self.source))
        self.ids, self.x, self.usable = rows.ids.to_pylist(), rows.x, rows.usable
        self.status = [STATUSES[code] for code in rows.status]
        assert rows.x.dtype == np.float32 and rows.x.flags.c_contiguous


def read_catalog(path: str, x_shape: tuple[int, ...]) -> Catalog:
    return Catalog(open_catalog(path, x_shape))


@pytest.fixture
def read(tmp_path: Path):
    """Write content to a file of its kind and read that."""

    def run(content: Any, x_shape: tuple[int, ...], name: str | None = None) -> Catalog:
        if isinstance(content, np.ndarray):
            path = tmp_path / (name or "catalog.npy")
            np.save(path, content)
        elif isinstance(content, str):
            path = tmp_path / (name or "catalog.csv")
            path.write_text(content)
        elif isinstance(content, bytes):
            path = tmp_path / (name or "catalog.npy")
            path.write_bytes(content)
        else:
            path = tmp_path / (name or "catalog.parquet")
            pq.write_table(pa.table(content), path)
        return read_catalog(str(path), x_shape)

    return run


def columns(names: str = "abcdefgh", **more: Any) -> dict[str, Any]:
    return {name: np.array(ROWS)[:, number] for number, name in enumerate(names)} | more


def csv(rows: list[list[float]]) -> str:
    header = ",".join(f"c{number}" for number in range(len(rows[0])))
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def tensors(array: np.ndarray) -> pa.ExtensionArray:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(array)


# ---- what is read -------------------------------------------------------------------------------

# Lists whose values lie in memory in another order than the rows.
REVERSED = pa.array(ROWS[::-1]).take(pa.array([2, 1, 0]))
PERMUTED = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.float32(), [4, 2], permutation=[1, 0]),
    pa.FixedSizeListArray.from_arrays(pa.array(X.transpose(0, 2, 1).ravel()), 8),
)

SAME = {
    "npy": X,
    "npy, flat": X.reshape(3, 8),
    "npy, double": X.astype(np.float64),
    "npy, integers": X.astype(np.int16),
    "npy, by columns": np.asfortranarray(X),
    "csv": csv(ROWS),
    "csv, integers": csv(X.reshape(3, 8).astype(int).tolist()),
    "lists": {"x": ROWS},
    "lists of float32": {"x": pa.array(ROWS, pa.list_(pa.float32()))},
    "large lists": {"x": pa.array(ROWS, pa.large_list(pa.float64()))},
    "fixed-size lists": {"x": pa.array(ROWS, pa.list_(pa.float32(), 8))},
    "nested lists": {"x": X.tolist()},
    "tensors": {"x": tensors(X)},
    "flat tensors": {"x": tensors(X.reshape(3, 8))},
    "chunks": {"x": pa.chunked_array([pa.array(ROWS[:1]), pa.array(ROWS[1:])])},
    "columns": columns(),
    "columns of several types": columns(c=pa.array([2, 10, 18], pa.uint8())),
    "rows of another order in memory": {"x": REVERSED},
    "tensors with their axes permuted": {"x": PERMUTED},
    "with other columns": {"x": ROWS, "comment": ["u", "v", "w"]},
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME.keys())
def test_formats(read, content) -> None:
    catalog = read(content, (2, 4))
    np.testing.assert_array_equal(catalog.x, X)
    assert catalog.ids == ["0", "1", "2"] and catalog.status == ["ok"] * 3
    assert catalog.usable.tolist() == [0, 1, 2]


def test_one_observation_in_npy(read) -> None:
    for content in (X[1], X[1].ravel(), X[1:2], np.asfortranarray(X[1]), X[1].T.copy().T):
        np.testing.assert_array_equal(read(content, (2, 4)).x, X[1:2])
    np.testing.assert_array_equal(read(X[1], (2, 4)).ids, ["0"])


@pytest.mark.parametrize("x_shape", [(), (1,), (1, 1)], ids=str)
def test_observations_of_one_number(read, x_shape) -> None:
    values = np.array([3.0, 5.0], dtype=np.float32)
    for content in (values, values[:, None], "x\n3\n5\n", {"x": [3, 5]}, {"x": [[3.0], [5.0]]}):
        np.testing.assert_array_equal(read(content, x_shape).x, values.reshape(2, *x_shape))
    assert read(np.array(3.0), x_shape).x.shape == (1, *x_shape)


@given(
    st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 4)),
        elements=st.floats(width=32, allow_subnormal=False),
    )
)
@settings(deadline=None, max_examples=40)
def test_csv_and_npy_say_the_same(tmp_path_factory, x) -> None:
    assume(np.isfinite(x).all(axis=1).any())
    folder = tmp_path_factory.mktemp("catalog")
    np.save(folder / "c.npy", x)
    (folder / "c.csv").write_text(csv(x.tolist()))
    from_npy, from_csv = (
        read_catalog(str(folder / name), x.shape[1:]) for name in ("c.npy", "c.csv")
    )
    expected = np.where(np.isfinite(x).all(axis=1, keepdims=True), x, np.nan)
    np.testing.assert_array_equal(from_npy.x, expected)
    np.testing.assert_array_equal(from_csv.x, expected)
    assert from_csv.ids == from_npy.ids
    assert from_csv.status == from_npy.status
    np.testing.assert_array_equal(from_npy.usable, np.flatnonzero(np.isfinite(x).all(axis=1)))


# ---- identifiers and names ----------------------------------------------------------------------


def test_identifiers(read) -> None:
    text = "a,observation_id,b\n1,007,2\n3,7,4\n5,1e3,6\n"  # which are three different ones
    catalog = read(text, (2,))
    assert catalog.ids == ["007", "7", "1e3"]
    np.testing.assert_array_equal(catalog.x, [[1, 2], [3, 4], [5, 6]])
    assert read({"x": ROWS, "observation_id": ["u", "v", "w"]}, (8,)).ids == ["u", "v", "w"]
    assert read({"x": ROWS, "observation_id": [3, 1, 2]}, (8,)).ids == ["3", "1", "2"]
    # As many rows as the first length of x are not one observation.
    two = {"x": X[:2, 0].tolist(), "observation_id": ["u", "v"]}
    with pytest.raises(InputError, match=r"an observation there has shape \(4,\), the model takes"):
        read(two, (2, 4))


def test_name_changes_with_the_content(read) -> None:
    names = {
        read(X, (2, 4)).name,
        read(X + 1, (2, 4)).name,
        read(X, (2, 4), "other file!.npy").name,
        read(csv(ROWS), (8,)).name,
    }
    assert len(names) == 4
    assert read(X, (2, 4)).name in names
    assert any(name.startswith("other-file--") for name in names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


# ---- rows without an observation ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "second", "third"),
    [
        ({"x": [[1.0, 2.0], None, [3.0, None], [5.0, 6.0]]}, "null", "null"),
        ({"x": [[1.0, 2.0], [1.0], [np.nan, 2.0], [5.0, 6.0]]}, "wrong_length", "nonfinite"),
        ({"x": [[1.0, 2.0], [1.0, None, 2.0], [], [5.0, 6.0]]}, "wrong_length", "wrong_length"),
        (
            {"x": pa.array([[1, 2], None, [3, None], [5, 6]], pa.list_(pa.float32(), 2))},
            "null",
            "null",
        ),
        ({"a": [1.0, None, 3.0, 5.0], "b": [2.0, 1.0, np.inf, 6.0]}, "null", "nonfinite"),
        ({"a": [1, None, 3, 5], "b": [2, 1, None, 6]}, "null", "null"),
        ("a,b\n1,2\n,1\n3,\n5,6\n", "null", "null"),
        ("a,b\n1,2\nnan,1\n3,inf\n5,6\n", "nonfinite", "nonfinite"),
        (np.array([[1, 2], [np.nan, 1], [3, -np.inf], [5, 6]]), "nonfinite", "nonfinite"),
        # too large for float32
        (np.array([[1, 2], [1e300, 1], [3, -1e39], [5, 6]]), "nonfinite", "nonfinite"),
        ({"x": [[1.0, 2.0], [1e300, 1.0], None, [5.0, 6.0]]}, "nonfinite", "null"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_rows_keep_their_place(read, content, second, third) -> None:
    catalog = read(content, (2,))
    assert catalog.status == ["ok", second, third, "ok"]
    assert catalog.usable.tolist() == [0, 3] and len(catalog.ids) == 4
    np.testing.assert_array_equal(catalog.x[catalog.usable], [[1, 2], [5, 6]])
    assert np.isnan(catalog.x[1:3]).all()


def test_bad_rows_of_tensors(read) -> None:
    catalog = read({"x": NULL_TENSOR}, (2,))
    assert catalog.status == ["ok", "null"] and np.isnan(catalog.x[1]).all()


def test_bad_rows_of_nested_lists(read) -> None:
    good = X[0].tolist()
    rows = [good, None, [good[0]], [good[0], good[1][:3]], [good[0], None], good]
    catalog = read({"x": rows}, (2, 4))
    assert catalog.status == ["ok", "null", "wrong_length", "wrong_length", "null", "ok"]
    np.testing.assert_array_equal(catalog.x[[0, 5]], [X[0], X[0]])


_NUMBERS = st.one_of(
    st.none(), st.sampled_from([float("nan"), float("inf"), 1e300]), st.floats(-9, 9, width=32)
)


@given(
    st.lists(st.one_of(st.none(), st.lists(_NUMBERS, max_size=4)), min_size=1, max_size=12),
    st.integers(0, 11),
    st.integers(1, 12),
)
@settings(deadline=None, max_examples=150)
def test_rows_of_lists_are_what_a_loop_says(rows, start, count) -> None:
    """Also of slices, whose values begin somewhere in an array's buffers."""
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float64())):
        column = pa.array([[0.0], *rows], kind).slice(1).slice(start, count)
        expected = rows[start : start + count]
        read_rows = Rows.of_lists(pa.array([""] * len(column)), column, (2,))
        for row, x, code in zip(expected, read_rows.x, read_rows.status, strict=True):
            if row is None:
                status = "null"
            elif len(row) != 2:
                status = "wrong_length"
            elif None in row:
                status = "null"
            else:
                status = "ok" if np.abs(row).max() < 1e38 else "nonfinite"
            assert STATUSES[code] == status
            if status == "ok":
                assert x.tolist() == row
            else:
                assert np.isnan(x).all()


# ---- ranges -------------------------------------------------------------------------------------

LARGE = np.random.default_rng(0).standard_normal((1000, 2, 3)).astype(np.float32)


@pytest.fixture(params=["npy", "npy, by columns", "parquet", "parquet, tensors", "csv"])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """A catalog of many row groups and of several batches."""
    kind = request.param
    path = tmp_path / f"c.{kind.partition(',')[0]}"
    if kind.startswith("npy"):
        np.save(path, np.asfortranarray(LARGE) if "columns" in kind else LARGE)
    elif kind == "csv":
        path.write_text(csv(LARGE.reshape(1000, 6).tolist()))
    else:
        x = tensors(LARGE) if "tensors" in kind else LARGE.tolist()
        pq.write_table(pa.table({"x": x}), path, row_group_size=170)
    return open_catalog(str(path), (2, 3))


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 400)), min_size=1, max_size=6))
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_range_in_any_order(large: Source, ranges) -> None:
    for start, count in ranges:
        stop = min(start + count, 1000)
        rows = large.read(start, stop)
        assert rows.x.tobytes() == LARGE[start:stop].tobytes()
        assert rows.ids.to_pylist() == [str(row) for row in range(start, stop)]


def test_ranges_in_another_process(large: Source) -> None:
    large.read(300, 310)
    there = pickle.loads(pickle.dumps(large))
    assert there.name == large.name and len(there) == 1000
    np.testing.assert_array_equal(there.read(171, 690).x, LARGE[171:690])


def test_a_range_is_read_without_the_rest(tmp_path: Path) -> None:
    """The bytes that are read for one range of a file of 9.6 MB."""
    x = np.random.default_rng(0).standard_normal((400_000, 6)).astype(np.float32)
    np.save(tmp_path / "c.npy", x)
    pq.write_table(pa.table({"x": tensors(x)}), tmp_path / "c.parquet", row_group_size=5000)
    for name in ("c.npy", "c.parquet"):
        catalog = open_catalog(str(tmp_path / name), (6,))
        counting = CountingStore(tmp_path)
        object.__setattr__(catalog._file, "store", counting)
        catalog.read(50_100, 50_200)
        # 2,400 bytes of numbers in one file; in the other the row groups of a batch of 16,384.
        assert 2400 <= counting.bytes <= (2400 if name == "c.npy" else 1_000_000)


class CountingStore(LocalStore):
    """Counts the bytes that it gives."""

    bytes = 0

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = super().get_range(key, start, length)
        self.bytes += len(data)
        return data


# ---- a file that changes ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "cut", "removed"])
@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_a_file_that_changes_is_noticed(tmp_path: Path, ending: str, how: str) -> None:
    def write(x: np.ndarray) -> Path:
        path = tmp_path / f"new.{ending}"
        if ending == "npy":
            np.save(path, x)
        else:
            pq.write_table(pa.table({"x": tensors(x)}), path, row_group_size=10)
        return path

    x = np.arange(200, dtype=np.float32).reshape(100, 2)
    path = tmp_path / f"c.{ending}"
    write(x).rename(path)
    catalog = open_catalog(str(path), (2,))
    catalog.check()
    if how == "replaced":
        write(x + 1).rename(path)
        os.utime(path, ns=(0, 1))  # a clock that is too coarse must not be what it depends on
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 8)
    else:
        path.unlink()

    def read() -> None:
        catalog.read(0, 100)
        catalog.check()

    with pytest.raises(StageError, match=r"c\.(npy|parquet) was changed or removed while it was"):
        read()


def test_the_name_tells_the_content_and_not_the_time(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", X)
    first = open_file(str(tmp_path / "c.npy")).digest()
    os.utime(tmp_path / "c.npy", ns=(5, 5))
    assert open_file(str(tmp_path / "c.npy")).digest() == first
    np.save(tmp_path / "c.npy", X + 1)
    assert open_file(str(tmp_path / "c.npy")).digest() != first


# ---- catalogs that are mostly bad ---------------------------------------------------------------


def test_what_is_usable_is_looked_for_to_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(source, "_LOOK_ROWS", 10)
    x = np.full((100, 2), np.nan)
    np.save(tmp_path / "c.npy", x)
    with pytest.raises(InputError, match=r"none of its 100 observation\(s\) is usable"):
        open_catalog(str(tmp_path / "c.npy"), (2,))
    x[99] = 1.0
    np.save(tmp_path / "c.npy", x)
    assert open_catalog(str(tmp_path / "c.npy"), (2,)).read(0, 100).usable.tolist() == [99]


# ---- what is refused ----------------------------------------------------------------------------

NULL_TENSOR = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.float32(), [2]),
    pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # the wrong shape
        (X, r"an observation there has shape \(2, 4\), the model takes \(2,\) \(2 numbers\)"),
        (X.reshape(3, 8), r"has shape \(8,\), the model takes"),
        (np.zeros(3), r"has shape \(\), the model takes"),
        (csv(ROWS), r"has shape \(8,\), the model takes"),
        ({"x": ROWS}, r"has shape \(8,\), the model takes"),
        ({"x": [1.0, 2.0]}, r"has shape \(1,\), the model takes"),
        (columns("ab", observation_id=[1, 2, 3], c=[1, 2, 3]), r"has shape \(3,\)"),
        # no rows, or none that is usable
        (np.zeros((0, 2)), "the file holds no observation"),
        ("a,b\n", "the file holds no observation"),
        ({"x": pa.array([], pa.list_(pa.float32()))}, "the file holds no observation"),
        (np.full((3, 2), np.nan), r"none of its 3 observation\(s\) is usable"),
        ("a,b\n1,\n,2\n", r"none of its 2 observation\(s\) is usable"),
        ({"x": pa.array([None], pa.list_(pa.float32()))}, r"none of its 1 observation\(s\)"),
        ({"x": [[1.0], None]}, r"null or infinite values, or the wrong length \(1 of them\)"),
        # ragged rows
        ({"x": [[1.0, 2.0, 3.0], [1.0]]}, r"has shape \(3,\), the model takes"),
        ({"x": [[[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0]]]}, r"has shape \(2, 2\), the model"),
        ("a,b\n1,2\n3\n", "no valid .csv file .*Expected 2 columns, got 1"),
        # not numbers
        ("a,b\n1,two\n", "column 'b' is of type string, not numeric"),
        ({"x": ["a"]}, "column 'x' is of type string, not numeric"),
        ({"x": [["a", "b"]]}, "column 'x' is of type list<.*string>, not numeric"),
        ({"x": [True]}, "column 'x' is of type bool, not numeric"),
        (np.array([["1", "2"]]), "dtype <U1 is not numeric"),
        (np.array([[1 + 1j, 2]]), "dtype complex128 is not numeric"),
        (np.array([[True, False]]), "dtype bool is not numeric"),
        ("observation_id\n1\n", "there is no column with numbers"),
        # identifiers
        ("observation_id,a,b\nu,1,2\nu,3,4\n", "observation_id has the same value twice"),
        ({"x": [[1.0, 2.0]] * 2, "observation_id": ["u", None]}, "observation_id is null in row 1"),
        ("observation_id,observation_id,a,b\nu,v,1,2\n", "no valid .csv file"),
        # no such files
        (b"", "no valid .npy file"),
        (b"\x93NUMPY\x01\x00 cut short", "no valid .npy file"),
        (b"PK\x03\x04 an archive of arrays", "no valid .npy file"),
        ("", "no valid .csv file .*Empty CSV file"),
    ],
)
def test_refused(read, content, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(content, (2,))
    assert str(caught.value).startswith("--observations /") and "catalog." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_transposed_observations_are_not_reshaped(read) -> None:
    transposed = np.ascontiguousarray(X.transpose(0, 2, 1))
    for content in (transposed, {"x": tensors(transposed)}):
        with pytest.raises(InputError, match=r"has shape \(4, 2\), the model takes \(2, 4\)"):
            read(content, (2, 4))


def test_objects_are_not_unpickled(tmp_path) -> None:
    path = tmp_path / "c.npy"
    np.save(path, np.array([[{}, 1]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="dtype object is not numeric"):
        read_catalog(str(path), (2,))


def test_archives_are_no_arrays(tmp_path) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, x=X)
    with pytest.raises(InputError, match=r"must end in \.parquet, \.csv or \.npy, not \.npz"):
        read_catalog(str(path), (2, 4))
    with pytest.raises(InputError, match=r"no valid \.npy file"):
        read_catalog(str(path.rename(tmp_path / "c.npy")), (2, 4))


def test_files_that_are_not_there(tmp_path) -> None:
    with pytest.raises(InputError, match=r"the file can't be read \(No such file"):
        read_catalog(str(tmp_path / "none.npy"), (2,))
    with pytest.raises(InputError, match=r"the file can't be read \(Is a directory"):
        read_catalog(str(tmp_path), (2,))
    (tmp_path / "c").write_text("")
    with pytest.raises(InputError, match="not without an ending"):
        read_catalog(str(tmp_path / "c"), (2,))


def test_upper_case_endings(read) -> None:
    assert read(csv(ROWS), (8,), "C.CSV").x.shape == (3, 8)
