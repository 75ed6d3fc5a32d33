"""Questions in JSON and Arrow: whatever arrives is a question or is refused."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.catalog.rows import STATUSES
from sbi_dist.serving.question import Limits, Question, from_arrow, from_json
from sbi_dist.serving.refusal import Refusal

LIMITS = Limits(100, 1000, 20_000)
OPERATIONS = st.sampled_from(["sample", "summary", "log_prob"])
SHAPES = st.sampled_from([(3,), (2, 2), (1,)])

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)
FIELDS = (
    "x",
    "theta",
    "num_samples",
    "seed",
    "quantiles",
    "hdi",
    "observation_ids",
    "with_log_prob",
)
bodies = values | st.dictionaries(st.sampled_from(FIELDS), values)


def either(read: Any, *given_: Any) -> Question | Refusal:
    try:
        return read(*given_)
    except Refusal as error:
        refusal = error
    assert refusal.status in (400, 413, 422) and refusal.detail
    return refusal


def ask(x_shape: tuple[int, ...] = (3,), operation: Any = "sample", **body: Any) -> Any:
    return either(from_json, operation, json.dumps(body).encode(), x_shape, 2, LIMITS)


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as to:
        to.write_table(table)
    return sink.getvalue()


def arrow(body: bytes | pa.Table, operation: Any = "sample", x_shape: Any = (3,), **query: str):
    body = body if isinstance(body, bytes) else stream(body)
    return either(from_arrow, operation, body, query, x_shape, 2, LIMITS)


def statuses(question: Any) -> list[str]:
    assert isinstance(question, Question), question.detail
    return [STATUSES[each] for each in question.rows.status]


@given(OPERATIONS, bodies, SHAPES)
@settings(deadline=None, max_examples=300)
def test_any_json(operation, body, x_shape) -> None:
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    either(from_json, operation, text, x_shape, 2, LIMITS)


@given(OPERATIONS, st.binary(max_size=60))
@settings(deadline=None)
def test_any_bytes(operation, body) -> None:
    either(from_json, operation, body, (3,), 2, LIMITS)
    assert isinstance(arrow(body, operation), Refusal)


@given(st.data(), OPERATIONS)
@settings(deadline=None, max_examples=200)
def test_any_damage_to_a_stream(data, operation) -> None:
    body = bytearray(stream(pa.table({"x": [[1.0, 2, 3]], "theta": [[0.0, 1]]})))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    arrow(bytes(body), operation)


def test_statuses_of_rows() -> None:
    rows = [[1, 2, 3], [1, None, 3], [1, 2], None, [1e300, 0, 0]]
    expected = ["ok", "null", "wrong_length", "null", "nonfinite"]
    assert statuses(ask(x=rows)) == expected
    assert statuses(arrow(pa.table({"x": pa.array(rows, pa.list_(pa.float64()))}))) == expected
    assert statuses(ask(x=[1, 2, 3])) == ["ok"]
    assert statuses(ask((2, 2), x=[[1, 2], [3, 4]])) == ["ok"]


ODD = {
    "dictionary": (pa.array([1.0, 2.0]).dictionary_encode(), None),
    "decimal": (pa.array([[1, 2, 3]]).cast(pa.list_(pa.decimal128(30, 2))), None),
    "large_list": (pa.array([[1.0, 2, 3]], pa.large_list(pa.float64())), ["ok"]),
    "list_view": (pa.array([[1.0, 2, 3]], pa.list_view(pa.float64())), None),
    "null": (pa.nulls(2), None),
    "null_lists": (pa.array([None, [None] * 3], pa.list_(pa.null())), ["null", "null"]),
    "ragged": (pa.array([[1.0], [1.0, 2, 3]]), ["wrong_length", "ok"]),
    "sliced": (pa.array([[9.0], [1.0, 2, 3], [2.0, 3, 4]])[1:], ["ok", "ok"]),
    "strings": (pa.array([["a", "b", "c"]]), None),
    "tensor": (
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, 3), np.float32)),
        ["ok", "ok"],
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_types(kind) -> None:
    column, expected = ODD[kind]
    for operation in ("sample", "log_prob"):
        arrow(pa.table({"x": column, "theta": column}), operation)
    found = arrow(pa.table({"x": column}))
    if expected is None:
        assert isinstance(found, Refusal) and found.status == 422
    else:
        assert statuses(found) == expected


def test_no_rows_and_columns_of_one_name() -> None:
    assert arrow(pa.table({"x": pa.array([], pa.list_(pa.float64()))})).status == 422
    twice = pa.Table.from_arrays([pa.array([[1.0, 2, 3]])] * 2, names=["x", "x"])
    assert arrow(twice).status == 422
    assert arrow(pa.table({"a": [1.0], "b": [2], "c": [3.0]})).rows.x.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_buffers_are_not_unpacked(codec) -> None:
    """A stream of some kilobytes would else take gigabytes."""
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(30_000_000)), 3_000_000)
    before = pa.total_allocated_bytes()
    body = stream(pa.table({"x": zeros}), compression=codec)
    assert len(body) < 2_000_000
    found = arrow(body)
    assert found.status == 400 and "compressed" in found.detail
    assert pa.total_allocated_bytes() <= before + 1_000_000


def test_depth_and_strings_with_brackets() -> None:
    assert either(from_json, "sample", b"[" * 10**6, (3,), 2, LIMITS).status == 400
    name = '[[[[[[[[[["\\' * 3
    assert ask(x=[[1, 2, 3]], observation_ids=[name]).rows.ids.to_pylist() == [name]


@pytest.mark.parametrize(
    "body",
    [
        {"x": [[1, 2, 3]] * 101},
        {"x": [[1, 2, 3]], "num_samples": 1001},
        {"x": [[1, 2, 3]] * 100, "num_samples": 201},
    ],
)
def test_too_much(body) -> None:
    assert ask(**body).status == 413


@pytest.mark.parametrize(
    ("theta", "shape"),
    [
        ([[0, 1]] * 4, (1, 4, 2)),
        ([0, 1], (1, 1, 2)),
        ([[[0, 1]] * 3] * 2, (2, 3, 2)),
        ([[0, 1, 2]], None),
        ([[[0, 1]]] * 3, None),
        ([], None),
        ([["a", 1]], None),
        ([[1e300, 1]], None),
        ([[True, False]], None),
    ],
)
def test_shapes_of_theta(theta, shape) -> None:
    found = ask(operation="log_prob", x=[[1, 2, 3]] * 2, theta=theta)
    if shape is None:
        assert found.status == 422
    else:
        assert found.theta.shape == shape


def test_a_tensor_s_axes_are_in_the_order_that_it_means() -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    kind = pa.fixed_shape_tensor(pa.float32(), (3, 2), permutation=[1, 0])
    stored = np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(2, 6)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), 6)
    question = arrow(pa.table({"x": pa.ExtensionArray.from_storage(kind, storage)}), x_shape=(2, 3))
    assert isinstance(question, Question) and np.array_equal(question.rows.x, x)
    refused = arrow(pa.table({"x": pa.ExtensionArray.from_storage(kind, storage)}), x_shape=(3, 2))
    assert isinstance(refused, Refusal) and "(2, 3)" in refused.detail


def test_theta_of_another_shape_is_not_taken_for_one_that_fits() -> None:
    """Three vectors of two numbers are not two of three."""
    question = {"x": [[1.0, 2, 3]], "theta": [[[0.0, 1], [2, 3], [4, 5]]]}
    assert isinstance(arrow(pa.table(question), "log_prob"), Question)
    uneven = {"x": [[1.0, 2, 3]], "theta": [[[0.0, 1, 2], [3, 4, 5]]]}
    assert isinstance(arrow(pa.table(uneven), "log_prob"), Refusal)
