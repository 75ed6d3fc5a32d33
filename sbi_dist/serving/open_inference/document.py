"""The JSON of a request: its members, what they may be, and a sentence for what they are not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sbi_dist.options import nearest
from sbi_dist.serving.open_inference.protocol import DATATYPES, OUTPUTS
from sbi_dist.serving.refusal import Refusal

__all__ = [
    "InputTensor",
    "RequestDocument",
    "RequestParameters",
    "RequestedOutput",
    "malformed",
    "read_document",
]

# Of a name or a value that comes back in a message.
_LONGEST = 60
# Parameters of one thing, more than are known.
_MOST = 32


class _Part(BaseModel):
    """A part of the document. Members that it does not know are left unread, as in the protocol."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Parameters(_Part):
    """Parameters. One that is not known is refused: it was meant to change the answer."""

    model_config = ConfigDict(extra="forbid")

    content_type: str | None = Field(default=None, description="left unread: a client's own codec")

    @model_validator(mode="before")
    @classmethod
    def _few(cls, members: Any) -> Any:
        """Refuse a flood of members at once, rather than with an error for each."""
        if isinstance(members, dict) and len(members) > _MOST:
            raise ValueError(f"there are at most {_MOST} parameters, not {len(members):,}")
        return members


class InputParameters(_Parameters):
    """Parameters of the input."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class OutputParameters(_Parameters):
    """Parameters of an output."""

    binary_data: bool | None = None


class RequestParameters(_Parameters):
    """Parameters of a request."""

    num_samples: int = Field(default=1000, ge=1, lt=2**31, description="draws of each observation")
    seed: int = Field(default=0, ge=-(2**63), lt=2**63, description="seed of the draws")
    operation: Literal["sample"] = "sample"
    binary_data_output: bool = Field(default=False, description="of the outputs that do not say")
    timeout: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="microseconds, 0: none"
    )
    priority: int | None = Field(default=None, description="left unread: there is one queue")
    headers: dict[str, Any] | None = Field(default=None, description="left unread")


class InputTensor(_Part):
    """The observations."""

    name: Literal["x"]
    shape: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(
        min_length=1, max_length=32, fail_fast=True
    )
    datatype: Literal[tuple(DATATYPES)]  # type: ignore[valid-type]
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(
        default=None, description="row by row, flat or nested; null: missing"
    )


class RequestedOutput(_Part):
    """An output that is wanted."""

    name: Literal[tuple(OUTPUTS)]  # type: ignore[valid-type]
    parameters: OutputParameters | None = None


class RequestDocument(_Part):
    """The JSON of a request."""

    id: Annotated[str, Field(max_length=1024)] | None = None
    parameters: RequestParameters | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=1, fail_fast=True)
    outputs: (
        Annotated[list[RequestedOutput], Field(max_length=len(OUTPUTS), fail_fast=True)] | None
    ) = None


def read_document(text: bytes) -> RequestDocument:
    """Parse and check.

    Raises:
        Refusal: 400 for the first thing that is wrong.
    """
    try:
        return RequestDocument.model_validate_json(text)
    except ValidationError as error:
        raise malformed(_sentence(error.errors(include_url=False)[0])) from None


def malformed(detail: str) -> Refusal:
    """What a request is refused with that is not in the protocol."""
    return Refusal(400, "Malformed request", detail)


# What others serve with parameters that are refused here.
_UNSUPPORTED = {
    "shared_memory": "shared memory is not supported; send tensors in the body",
    "classification": "classification is not supported: parameters have no classes",
    "sequence": "sequences are not supported: each request is by itself",
}


def _sentence(error: ErrorDetails) -> str:
    loc = [str(each)[:_LONGEST] for each in error["loc"]]
    where, name = ".".join(loc), loc[-1] if loc else ""
    if error["type"] == "json_invalid":
        return f"the JSON can't be read: {error['ctx']['error']}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden":
        for start, why in _UNSUPPORTED.items():
            if name.startswith(start):
                return f"{where}: {why}"
        kinds: dict[str, type[_Parameters]] = {
            "inputs": InputParameters,
            "outputs": OutputParameters,
        }
        known = kinds.get(loc[0], RequestParameters).model_fields
        near = nearest(name, known)
        meant = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
        return f"{where} is not known; {meant}"
    value, message = error["input"], error["msg"].removeprefix("Value error, ")
    if isinstance(value, str):
        value = value[:_LONGEST]
    said = f" is {value!r}"[:_LONGEST] if isinstance(value, (str, int, float, type(None))) else ""
    return f"{where or 'the request'}{said}: {message[0].lower()}{message[1:]}"
