"""What the OpenAPI document says of the protocol's answers and bodies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from sbi_dist.serving.documentation import answers as problems
from sbi_dist.serving.open_inference.document import RequestDocument
from sbi_dist.serving.open_inference.protocol import HEAD_LENGTH

__all__ = [
    "IndexEntry",
    "InferResponse",
    "Live",
    "ModelConfig",
    "ModelMetadata",
    "ModelReady",
    "Ready",
    "ServerMetadata",
    "answers",
    "infer_documentation",
]

_BINARY = "application/octet-stream"


class Live(BaseModel):
    """The server runs."""

    live: bool


class Ready(BaseModel):
    """The server answers requests."""

    ready: bool


class ModelReady(BaseModel):
    """The model answers requests."""

    name: str
    ready: bool


class ServerMetadata(BaseModel):
    """Name, version and extensions of the server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """An input or an output; -1 is any length."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """Inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    properties: dict[str, str]


class TensorConfig(BaseModel):
    """An input or an output, in Triton's words."""

    name: str
    data_type: str
    dims: list[int]


class ModelConfig(BaseModel):
    """Configuration of a model, in Triton's words."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[TensorConfig]
    output: list[TensorConfig]


class IndexEntry(BaseModel):
    """A model that there is."""

    name: str
    version: str
    state: str
    reason: str


class OutputTensor(TensorMetadata):
    """An output: data, or the size of its bytes after the JSON."""

    parameters: dict[str, int] | None = None
    data: list[float | str | None] | None = None


class InferResponse(BaseModel):
    """Outputs of a request."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, int]
    outputs: list[OutputTensor]


def answers(model: Any, *statuses: int, binary: bool = False) -> dict[int | str, dict[str, Any]]:
    """What may come: 200 with a model's members, and problems with the statuses given."""
    described: dict[int | str, dict[str, Any]] = {
        200: {"model": model, "description": "The answer."}
    }
    if binary:
        described[200]["content"] = {_BINARY: {"schema": {"type": "string", "format": "binary"}}}
    for status, problem in problems(*statuses).items():
        if status != 200:
            # What is refused before it gets here comes with the media type of the other routes.
            ((kind, content),) = problem["content"].items()
            schema = dict(content["schema"])
            schema["required"] = [*schema["required"], "error"]
            schema["properties"] = {"error": {"type": "string"}} | schema["properties"]
            kinds = ("application/json", kind)
            described[status] = problem | {"content": {each: {"schema": schema} for each in kinds}}
    return described


def infer_documentation() -> dict[str, Any]:
    """The body and the headers of a request for inference."""
    binary = {"type": "string", "format": "binary"}
    return {
        "requestBody": {
            "required": True,
            "description": f"JSON, or JSON and then the bytes of x, with the length of the JSON in "
            f"the header {HEAD_LENGTH}; Content-Encoding may be gzip or deflate.",
            "content": {
                "application/json": {"schema": _whole(RequestDocument)},
                _BINARY: {"schema": binary},
            },
        },
        "parameters": [
            {
                "name": "X-Timeout-S",
                "in": "header",
                "required": False,
                "description": "seconds that the caller waits at most",
                "schema": {"type": "number", "exclusiveMinimum": 0},
            }
        ],
    }


def _whole(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema without references, which here would lead out of it."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inline(at: Any) -> Any:
        if isinstance(at, list):
            return [inline(each) for each in at]
        if not isinstance(at, dict):
            return at
        if "$ref" in at:
            return inline(parts[at["$ref"].rsplit("/", 1)[-1]])
        return {key: inline(value) for key, value in at.items()}

    return inline(schema)
