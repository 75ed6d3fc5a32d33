"""The Open Inference Protocol, written and read by tritonclient's own code."""

from __future__ import annotations

import copy
import gzip
import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from tritonclient.http import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.utils import np_to_triton_dtype

from sbi_dist.serving.compression import compress, decompress, wanted
from sbi_dist.serving.open_inference.about import model_config, model_metadata
from sbi_dist.serving.open_inference.protocol import DATATYPES, HEAD_LENGTH
from sbi_dist.serving.open_inference.request import InferRequest, read_request
from sbi_dist.serving.open_inference.response import write_response
from sbi_dist.serving.refusal import Refusal

X = np.arange(24, dtype=np.float32).reshape(3, 2, 4)


def tensor(x: np.ndarray, binary: bool) -> InferInput:
    given = InferInput("x", list(x.shape), np_to_triton_dtype(x.dtype))
    return given.set_data_from_numpy(x, binary_data=binary)


def encoded(*inputs: InferInput, **more: Any) -> tuple[bytes, dict[str, str]]:
    """What tritonclient sends."""
    body, length = InferenceServerClient.generate_request_body(list(inputs), **more)
    return body, {} if length is None else {HEAD_LENGTH.lower(): str(length)}


def refused(body: bytes, headers: dict[str, str]) -> str:
    with pytest.raises(Refusal) as caught:
        read_request(body, headers)
    assert caught.value.status == 400 and len(caught.value.detail) < 500
    return caught.value.detail


# ---- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
@given(
    x=st.sampled_from(sorted(DATATYPES.values())).flatmap(
        lambda kind: st_numpy.arrays(kind, st_numpy.array_shapes(max_dims=4, max_side=4))
    )
)
def test_what_tritonclient_sends_is_read(x, binary):
    request = read_request(*encoded(tensor(x, binary)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(request.x, x.astype(np.float32))
    assert request.x.dtype == np.float32 and not request.null.any()
    request.require_shape(x.shape[1:])


def test_a_request_says_what_it_wants():
    outputs = [
        InferRequestedOutput("log_prob", binary_data=True),
        InferRequestedOutput("draws", binary_data=False),
    ]
    request = read_request(
        *encoded(
            tensor(X, True),
            outputs=outputs,
            request_id="mine",
            timeout=2_500_000,
            priority=3,
            parameters={"num_samples": 17, "seed": 2**63 - 1},
        )
    )
    assert (request.id, request.num_samples, request.seed) == ("mine", 17, 2**63 - 1)
    assert list(request.outputs.items()) == [("log_prob", True), ("draws", False)]
    assert request.with_log_prob and request.timeout_s == 2.5


def test_one_that_says_nothing_gets_the_defaults():
    request = read_request(*encoded(tensor(X, True)))
    assert (request.id, request.num_samples, request.seed) == (None, 1000, 0)
    # tritonclient asks for binary outputs where none are named.
    usual = ["draws", "status", "out_of_distribution", "out_of_distribution_p"]
    assert request.outputs == dict.fromkeys(usual, True)
    plain = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
    assert read_request(json.dumps(plain).encode(), {}).outputs == dict.fromkeys(usual, False)


def test_members_that_other_clients_add_are_left_unread():
    body = {
        "id": None,
        "model_name": "promoted",  # KServe's client
        "parameters": {"content_type": "np", "headers": {"a": "b"}},  # MLServer's
        "inputs": [
            {
                "name": "x",
                "shape": [3, 2, 4],
                "datatype": "FP32",
                "parameters": {"content_type": "np"},
                "data": X.tolist(),
            }
        ],
        "outputs": [],
    }
    np.testing.assert_array_equal(read_request(json.dumps(body).encode(), {}).x, X)


def test_observations_that_can_not_be_used_are_read_all_the_same():
    x = X.astype(np.float64)
    x[0, 0, 0], x[1, 0, 0] = np.nan, 1e300
    for binary in (True, False):
        request = read_request(*encoded(tensor(x, binary)))
        assert np.isfinite(request.x).all(axis=(1, 2)).tolist() == [False, False, True]
    rows: list[Any] = X.tolist()
    rows[1][0][0] = None
    document = {"name": "x", "shape": [3, 2, 4], "datatype": "INT32", "data": rows}
    whole = json.dumps({"inputs": [document]}).replace(".0", "").encode()
    request = read_request(whole, {})
    assert request.null.tolist() == [False, True, False]
    np.testing.assert_array_equal(request.x[[0, 2]], X[[0, 2]])


def test_the_shape_must_be_the_models():
    request = read_request(*encoded(tensor(X, True)))
    with pytest.raises(Refusal, match=r"\[3, 2, 4\]; for this model it is \[observations, 8\]"):
        request.require_shape((8,))


# ---- requests that are refused ------------------------------------------------------------------

VALID: dict[str, Any] = {
    "id": "1",
    "parameters": {"num_samples": 10, "seed": 1, "binary_data_output": True},
    "inputs": [
        {
            "name": "x",
            "shape": [2, 3],
            "datatype": "FP32",
            "data": [[1.5, 2, 3], [4, 5, 6]],
        }
    ],
    "outputs": [{"name": "draws", "parameters": {"binary_data": False}}],
}
BINARY = {"data": None, "parameters": {"binary_data_size": 24}}


def changed(path: tuple[str | int, ...], value: Any, base: Any = VALID) -> Any:
    """A copy with another value at a path."""
    if not path:
        return value
    document = copy.deepcopy(base)
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


X_AT = ("inputs", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "the request: input should be"),
        (("inputs",), [], "inputs: list should have at least 1"),
        (("inputs",), VALID["inputs"] * 2, "inputs: list should have at most 1"),
        (("inputs",), {}, "inputs: input should be"),
        ((*X_AT, "name"), "y", "inputs.0.name is 'y': input should be 'x'"),
        ((*X_AT, "datatype"), "BYTES", "inputs.0.datatype is 'BYTES': input should be 'FP32'"),
        ((*X_AT, "datatype"), "fp32", "inputs.0.datatype is 'fp32'"),
        ((*X_AT, "datatype"), None, "inputs.0.datatype is None"),
        ((*X_AT, "datatype"), "INT32", "something that is not of datatype INT32"),
        ((*X_AT, "shape"), [2, -3], "inputs.0.shape.1 is -3"),
        ((*X_AT, "shape"), [0, 3], "inputs.0.shape.0 is 0"),
        ((*X_AT, "shape"), [2, 3.0], "inputs.0.shape.1 is 3.0"),
        ((*X_AT, "shape"), [True, 3], "inputs.0.shape.0 is True"),
        ((*X_AT, "shape"), [2, 10**30], "inputs.0.shape.1 is 1000000"),
        ((*X_AT, "shape"), [2**31 - 1] * 32, "is not nested as its shape"),
        ((*X_AT, "shape"), [1] * 33, "inputs.0.shape: list should have at most 32"),
        ((*X_AT, "shape"), [], "inputs.0.shape: list should have at least 1"),
        ((*X_AT, "shape"), [3, 2], "is not nested as its shape [3, 2] says"),
        ((*X_AT, "shape"), [6], "is not nested"),
        ((*X_AT, "data"), [1, 2, 3, 4, 5], "has 5 numbers; shape [2, 3] has 6"),
        ((*X_AT, "data"), [], "has 0 numbers"),
        ((*X_AT, "data"), [[1, 2, 3], [4, 5]], "is not nested"),
        ((*X_AT, "data"), [[1, 2, 3], 4, 5, 6], "is not nested"),
        ((*X_AT, "data"), [[1, 2, 3], "456"], "is not nested"),
        ((*X_AT, "data"), [1, 2, 3, 4, 5, [6]], "something that is not"),
        ((*X_AT, "data"), [1, 2, 3, 4, 5, "6"], "something that is not of datatype FP32"),
        ((*X_AT, "data"), [1, 2, 3, 4, 5, True], "something that is not"),
        ((*X_AT, "data"), [1, 2, 3, 4, 5, 10**400], "out of the range of FP32"),
        ((*X_AT, "data"), "123456", "inputs.0.data is '123456'"),
        ((*X_AT, "data"), None, "inputs.x has no data"),
        ((*X_AT, "parameters"), {"binary_data_size": 24}, "both data and binary_data_size"),
        ((*X_AT, "parameters"), {"binary_data_size": -1}, "binary_data_size is -1"),
        ((*X_AT, "parameters"), {"binary_data_size": "24"}, "binary_data_size is '24'"),
        ((*X_AT, "parameters"), {"binary_dat_size": 2}, "did you mean 'binary_data_size'?"),
        (
            (*X_AT, "parameters"),
            {"shared_memory_region": "r", "shared_memory_byte_size": 24},
            "shared memory is not supported",
        ),
        (("outputs",), [{"name": "samples"}], "outputs.0.name is 'samples'"),
        (("outputs",), [{"name": "draws"}] * 2, "outputs names 'draws' twice"),
        (("outputs", 0, "parameters"), {"classification": 3}, "classification is not supported"),
        (("outputs", 0, "parameters"), {"shared_memory_region": "r"}, "shared memory is not"),
        (("parameters",), {"num_samples": 0}, "parameters.num_samples is 0"),
        (("parameters",), {"num_samples": 1.5}, "parameters.num_samples is 1.5"),
        (("parameters",), {"num_samples": True}, "parameters.num_samples is True"),
        (("parameters",), {"num_sample": 1}, "did you mean 'num_samples'?"),
        (("parameters",), {"seed": -(2**63) - 1}, "parameters.seed is -9223372036854775809"),
        (("parameters",), {"seed": 2**63}, "parameters.seed is 9223372036854775808"),
        (("parameters",), {"operation": "log_prob"}, "parameters.operation is 'log_prob'"),
        (("parameters",), {"sequence_id": 3}, "sequences are not supported"),
        (("parameters",), {"a" * 10**6: 1}, "is not known"),
        (("parameters",), dict.fromkeys(map(str, range(10**4))), "at most 32 parameters"),
        (("id",), "a" * 10**6, "id is 'aaaa"),
    ],
)
def test_a_wrong_member_is_named(path, value, message):
    assert message in refused(json.dumps(changed(path, value)).encode(), {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "EOF"),
        (b"{", "the JSON can't be read"),
        (b"\xff\xfe", "the JSON can't be read"),
        (b"null", "the request is None"),
        (b"{}", "inputs is missing"),
        (b"[" * 10**6, "recursion limit"),
        (json.dumps(VALID).replace("[1.5", "[" * 10**4).encode(), "recursion limit"),
        (json.dumps(VALID).encode() + b"\0" * 24, "trailing"),
    ],
)
def test_what_is_no_document_is_refused(body, message):
    assert message in refused(body, {})


@pytest.mark.parametrize(
    ("length", "size", "sent", "message"),
    [
        ("{}", 24, 20, "20 bytes follow the JSON, but binary_data_size is 24"),
        ("{}", 24, 28, "28 bytes follow the JSON, but binary_data_size is 24"),
        ("{}", 20, 20, "is 20; shape [2, 3] of FP32 has 24 bytes"),
        ("{}", 0, 0, "is 0; shape [2, 3] of FP32 has 24 bytes"),
        ("{}", 2**70, 24, "24 bytes follow"),
        ("{}", None, 24, "24 bytes follow the JSON, but binary_data_size is 0"),
        ("-{}", 24, 24, "must be a number of bytes"),
        ("+{}", 24, 24, "must be a number of bytes"),
        ("1_0", 24, 24, "must be a number of bytes"),
        ("٣", 24, 24, "must be a number of bytes"),
        ("", 24, 24, "must be a number of bytes"),
        ("9" * 5000, 24, 24, "must be a number of bytes"),
        ("999999", 24, 24, "but the body has"),
        ("0", 24, 24, "the JSON can't be read"),
        ("10", 24, 24, "the JSON can't be read"),
    ],
)
def test_sizes_that_do_not_add_up_are_refused(length, size, sent, message):
    tensor = VALID["inputs"][0] | {"data": None, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {HEAD_LENGTH.lower(): length.format(len(head))}
    assert message in refused(head + b"\0" * sent, headers)


def test_binary_data_needs_the_length_of_the_json():
    body, _ = encoded(tensor(X, True))
    assert "trailing characters" in refused(body, {})
    assert "shared memory" in refused(
        *encoded(InferInput("x", [3], "FP32").set_shared_memory("region", 12))
    )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["x", "FP32", "INT8", "draws", "status"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "data", "binary_data_size", "seed"]) | st.text(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def paths(at: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where there is a value in a document."""
    keys: Any = at if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
    return [path, *(each for key in keys for each in paths(at[key], (*path, key)))]


@settings(max_examples=500)
@given(data=st.data())
def test_nothing_but_a_refusal_comes_of_a_request_that_is_not_right(data):
    document = VALID
    if data.draw(st.booleans()):
        document = changed(X_AT, VALID["inputs"][0] | BINARY)
    for _ in range(data.draw(st.integers(0, 2))):
        where = data.draw(st.sampled_from(paths(document)))
        document = changed(where, data.draw(JSON), document)
    body = json.dumps(document).encode()
    length = data.draw(st.sampled_from([None, len(body)]) | st.integers(-2, len(body) + 2))
    tail = data.draw(st.sampled_from([b"", b"\0" * 24]) | st.binary(max_size=30))
    headers = {} if length is None else {HEAD_LENGTH.lower(): str(length)}
    outcome = read_or_refuse(body + tail, headers)
    if isinstance(outcome, Refusal):
        assert outcome.status == 400 and outcome.detail
    else:
        assert outcome.x.dtype == np.float32 and outcome.x.size > 0
        assert len(outcome.null) == len(outcome.x) and outcome.outputs


def read_or_refuse(body: bytes, headers: dict[str, str]) -> InferRequest | Refusal:
    try:
        return read_request(body, headers)
    except Refusal as refusal:
        return refusal


# ---- answers ------------------------------------------------------------------------------------

COLUMNS = {
    "draws": np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32),
    "status": np.array(["ok", "nonfinite", "ok"]),
    "out_of_distribution": np.array([1.5, np.nan, 0.1], dtype=np.float32),
    "out_of_distribution_p": np.array([0.5, np.nan, 1e-30], dtype=np.float32),
    "log_prob": np.array([[-np.inf, 1, 2, 3, 4]] * 3, dtype=np.float32),
}
COLUMNS["draws"][1] = np.nan


def answered(outputs: dict[str, bool], coding: str | None = None) -> InferResult:
    """What tritonclient makes of an answer."""
    request = InferRequest("mine", X, np.zeros(3, bool), 5, 7, outputs)
    body, headers = write_response(request, "a-model", COLUMNS)
    binary = any(outputs.values())
    assert headers["Content-Type"] == f"application/{'octet-stream' if binary else 'json'}"
    if coding:
        body = compress(body, coding)
    return InferResult.from_response_body(
        body, header_length=headers.get(HEAD_LENGTH), content_encoding=coding
    )


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
@given(
    outputs=st.permutations(list(COLUMNS)).flatmap(
        lambda names: st.fixed_dictionaries(dict.fromkeys(names, st.booleans()))
    )
)
def test_tritonclient_reads_an_answer(outputs, coding):
    result = answered(outputs, coding)
    head = result.get_response()
    assert (head["id"], head["model_name"], head["model_version"]) == ("mine", "a-model", "1")
    assert head["parameters"] == {"num_samples": 5, "seed": 7}
    assert [output["name"] for output in head["outputs"]] == list(outputs)
    for name, expected in COLUMNS.items():
        values = result.as_numpy(name)
        if name == "status":
            texts = [each.decode() if isinstance(each, bytes) else each for each in values]
            assert texts == expected.tolist()
            continue
        assert values.dtype == np.float32
        if not outputs[name]:  # JSON has one word for all that is not a number
            expected = np.where(np.isfinite(expected), expected, np.nan)
        np.testing.assert_array_equal(values, expected)


def test_json_is_json():
    request = InferRequest(None, X, np.zeros(3, bool), 5, 7, dict.fromkeys(COLUMNS, False))
    body, _ = write_response(request, "a-model", COLUMNS)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(body, parse_constant=refuse)
    assert "id" not in document
    data = {output["name"]: output["data"] for output in document["outputs"]}
    assert data["draws"][10:20] == [None] * 10
    assert data["log_prob"][0] is None


def test_outputs_are_as_the_metadata_says():
    metadata = model_metadata("a-model", (2, 4), ["a", "b"])
    config = model_config("a-model", (2, 4), ["a", "b"])
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 4]}]
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 2, 4]}]
    result = answered(dict.fromkeys(COLUMNS, True)).get_response()
    for told, configured, output in zip(
        metadata["outputs"], config["output"], result["outputs"], strict=True
    ):
        assert (told["name"], told["datatype"]) == (output["name"], output["datatype"])
        assert (configured["name"], configured["dims"]) == (told["name"], told["shape"])
        for said, size in zip(told["shape"], output["shape"], strict=True):
            assert said in (-1, size)


# ---- codings ------------------------------------------------------------------------------------


def raw_deflate(body: bytes) -> bytes:
    packed = zlib.compressobj(wbits=-15)
    return packed.compress(body) + packed.flush()


PACKED = {"gzip": gzip.compress, "deflate": zlib.compress}


@given(body=st.binary(max_size=200))
def test_codings_are_undone(body):
    for coding, pack in [*PACKED.items(), ("deflate", raw_deflate), ("GZIP ", gzip.compress)]:
        assert decompress(pack(body), coding, len(body)) == body
    for coding in PACKED:
        assert decompress(compress(body, coding), coding, len(body)) == body
    assert decompress(body, None, 0) == decompress(body, "identity", 0) == body


@pytest.mark.parametrize("coding", PACKED)
def test_a_bomb_does_not_go_off(coding):
    bomb = PACKED[coding](bytes(2**28))
    assert len(bomb) < 2**19
    tracemalloc.start()
    with pytest.raises(Refusal, match="more than 1,048,576 bytes") as caught:
        decompress(bomb, coding, 2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.status == 413 and peak < 2**23


@pytest.mark.parametrize("coding", PACKED)
def test_what_is_not_in_its_coding_is_refused(coding):
    packed = PACKED[coding](b"abc" * 100)
    for body in (b"", b"{}", packed[:-1], packed + b"x", packed + packed, packed[3:], b"x" * 99):
        with pytest.raises(Refusal, match="but the body is not") as caught:
            decompress(body, coding, 2**20)
        assert caught.value.status == 400
    for other in ("br", "gzip, gzip", "x" * 10**6):
        with pytest.raises(Refusal, match="send gzip, deflate or none") as caught:
            decompress(packed, other, 2**20)
        assert caught.value.status == 415


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (None, None),
        ("", None),
        ("gzip", "gzip"),
        ("Deflate ", "deflate"),
        ("gzip;q=0.5", "gzip"),
        ("gzip; q=0", None),
        ("gzip;q=0.000", None),
        ("gzip, deflate, br, zstd", None),
        ("identity", None),
        ("br", None),
        ("*", None),
    ],
)
def test_an_answer_is_packed_for_those_who_ask_for_that(accept, coding):
    assert wanted(accept) == coding
