"""Answers: columns become JSON, with the bytes of tensors after it where they are wanted so."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from sbi_dist.serving.open_inference.protocol import HEAD_LENGTH, OUTPUTS, VERSION
from sbi_dist.serving.open_inference.request import InferRequest

__all__ = ["write_response"]


def write_response(
    request: InferRequest, model_id: str, columns: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an answer.

    Args:
        request: what was asked for.
        model_id: the model that made it.
        columns: the outputs that are wanted, by name: draws (B, N, D), out_of_distribution (B,),
            out_of_distribution_p (B,) and log_prob (B, N), float32; status, B strings. What is
            not finite is null in JSON.
    """
    outputs: list[dict[str, Any]] = []
    tensors: list[bytes | memoryview] = []
    for name, binary in request.outputs.items():
        datatype, values = OUTPUTS[name][0], columns[name]
        output: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": datatype}
        if binary:
            tensors.append(_strings(values) if datatype == "BYTES" else _floats(values))
            output["parameters"] = {"binary_data_size": len(tensors[-1])}
        elif datatype == "BYTES":
            output["data"] = values.tolist()
        else:
            output["data"] = np.ascontiguousarray(values, np.float32).reshape(-1)
        outputs.append(output)
    document: dict[str, Any] = {"model_name": model_id, "model_version": VERSION}
    if request.id is not None:
        document["id"] = request.id
    document["parameters"] = {"num_samples": request.num_samples, "seed": request.seed}
    document["outputs"] = outputs
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tensors:
        return head, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEAD_LENGTH: str(len(head))}
    return b"".join([head, *tensors]), headers


def _floats(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values, "<f4").reshape(-1).data.cast("B")


def _strings(values: np.ndarray) -> bytes:
    """Each with its length before it."""
    texts = values.tolist()
    forms = {each: struct.pack("<I", len(each.encode())) + each.encode() for each in set(texts)}
    return b"".join(map(forms.__getitem__, texts))
