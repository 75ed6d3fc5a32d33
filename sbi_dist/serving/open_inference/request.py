"""Requests: bytes become observations, or are refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbi_dist.serving.open_inference.document import (
    InputTensor,
    RequestedOutput,
    RequestParameters,
    malformed,
    read_document,
)
from sbi_dist.serving.open_inference.protocol import DATATYPES, HEAD_LENGTH, OUTPUTS

__all__ = ["InferRequest", "read_request"]


@dataclasses.dataclass(frozen=True)
class InferRequest:
    """What is asked for.

    Attributes:
        id: the client's own name of the request.
        x: float32 in the shape that was given, (B, ...).
        null: whether a number of an observation is missing; bool of shape (B,).
        num_samples: draws of each observation.
        seed: of the draws.
        outputs: those that are wanted, and whether each is wanted in binary.
        timeout_s: how long the client waits, if it says so.
    """

    id: str | None
    x: np.ndarray
    null: np.ndarray
    num_samples: int
    seed: int
    outputs: Mapping[str, bool]
    timeout_s: float | None = None

    @property
    def with_log_prob(self) -> bool:
        """Whether the density of the draws is wanted too."""
        return "log_prob" in self.outputs

    def require_shape(self, x_shape: Sequence[int]) -> None:
        """Check that these can be observations of a model.

        Raises:
            Refusal: they have another shape than (B, *x_shape).
        """
        if self.x.shape[1:] != tuple(x_shape):
            expected = ", ".join(["observations", *map(str, x_shape)])
            raise malformed(
                f"inputs.x.shape is {list(self.x.shape)}; for this model it is [{expected}]"
            )


def read_request(body: bytes, headers: Mapping[str, str]) -> InferRequest:
    """Read a request.

    Args:
        body: without its content coding.
        headers: their names in lower case, or a mapping that ignores case.

    Raises:
        Refusal: 400 for whatever is wrong with it.
    """
    head, binary = _split(body, headers.get(HEAD_LENGTH.lower()))
    document = read_document(head)
    parameters = document.parameters or RequestParameters()
    outputs = _wanted(document.outputs or [], parameters.binary_data_output)
    x, null = _values(document.inputs[0], binary)
    timeout_s = parameters.timeout / 1e6 if parameters.timeout else None
    return InferRequest(
        document.id, x, null, parameters.num_samples, parameters.seed, outputs, timeout_s
    )


def _split(body: bytes, length: str | None) -> tuple[bytes, memoryview]:
    """The JSON, and the bytes of tensors."""
    if length is None:
        return body, memoryview(b"")
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise malformed(f"{HEAD_LENGTH} is {length[:40]!r}; it must be a number of bytes")
    size = int(length)
    if size > len(body):
        raise malformed(f"{HEAD_LENGTH} is {size}, but the body has {len(body):,} bytes")
    return body[:size], memoryview(body)[size:]


def _wanted(outputs: Sequence[RequestedOutput], binary: bool) -> dict[str, bool]:
    if not outputs:
        return {name: binary for name, (_, default) in OUTPUTS.items() if default}
    wanted: dict[str, bool] = {}
    for output in outputs:
        if output.name in wanted:
            raise malformed(f"outputs names {output.name!r} twice")
        own = output.parameters.binary_data if output.parameters else None
        wanted[output.name] = binary if own is None else own
    return wanted


def _values(tensor: InputTensor, binary: memoryview) -> tuple[np.ndarray, np.ndarray]:
    """x, and whether a number of an observation is missing."""
    size = tensor.parameters.binary_data_size if tensor.parameters else None
    if size is not None and tensor.data is not None:
        raise malformed("inputs.x has both data and binary_data_size; send one of them")
    if len(binary) != (size or 0):
        raise malformed(
            f"{len(binary):,} bytes follow the JSON, but binary_data_size is {size or 0:,}; "
            f"{HEAD_LENGTH} must be the length of the JSON"
        )
    if size is not None:
        x = _of_bytes(binary, tensor)
        return x, np.zeros(len(x), dtype=bool)
    if tensor.data is None:
        raise malformed(
            "inputs.x has no data; give numbers in data, or binary_data_size and bytes after "
            "the JSON"
        )
    return _of_lists(tensor.data, tensor)


def _of_bytes(binary: memoryview, tensor: InputTensor) -> np.ndarray:
    datatype = np.dtype(DATATYPES[tensor.datatype])
    size = math.prod(tensor.shape) * datatype.itemsize
    if len(binary) != size:
        raise malformed(
            f"inputs.x.parameters.binary_data_size is {len(binary):,}; shape {tensor.shape} of "
            f"{tensor.datatype} has {size:,} bytes"
        )
    with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and so not usable
        return np.array(np.frombuffer(binary, datatype), dtype=np.float32).reshape(tensor.shape)


def _of_lists(data: list[Any], tensor: InputTensor) -> tuple[np.ndarray, np.ndarray]:
    numbers, size = data, math.prod(tensor.shape)
    if data and isinstance(data[0], list):
        numbers = [data]
        for length in tensor.shape:
            if set(map(type, numbers)) != {list} or set(map(len, numbers)) != {length}:
                raise malformed(f"inputs.x.data is not nested as its shape {tensor.shape} says")
            numbers = list(itertools.chain.from_iterable(numbers))
    if len(numbers) != size:
        raise malformed(
            f"inputs.x.data has {len(numbers):,} numbers; shape {tensor.shape} has {size:,}"
        )
    kinds = set(map(type, numbers))
    whole = "INT" in tensor.datatype
    if not kinds <= {int, type(None)} | (set() if whole else {float}):
        raise malformed(f"inputs.x.data has something that is not of datatype {tensor.datatype}")
    exact = whole and type(None) not in kinds
    try:
        with np.errstate(over="ignore"):
            x = np.array(numbers, DATATYPES[tensor.datatype] if exact else np.float64)
            x = x.astype(np.float32).reshape(tensor.shape)
    except OverflowError:
        raise malformed(
            f"inputs.x.data has a number that is out of the range of {tensor.datatype}"
        ) from None
    null = np.zeros(size, dtype=bool)
    if type(None) in kinds:
        null[:] = [number is None for number in numbers]
    return x, np.any(null.reshape(len(x), -1), axis=1)
