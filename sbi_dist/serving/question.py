"""Questions to the service, as JSON or Arrow, checked: observations, how many draws, which seed.

What arrives is untrusted. Its size is bounded before this; its depth is looked at before it is
parsed; and each observation that can't be used keeps its place with a status, as in a catalog.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pydantic
from pydantic import Field

from sbi_dist.catalog.rows import Rows
from sbi_dist.options import nearest
from sbi_dist.serving.arrow_stream import require_plain_buffers
from sbi_dist.serving.drawing import Summarized
from sbi_dist.serving.observations import (
    as_batch,
    rows_of_json,
    rows_of_table,
    theta_of_json,
    theta_of_table,
)
from sbi_dist.serving.refusal import Refusal

__all__ = [
    "ARROW",
    "BODIES",
    "Limits",
    "Question",
    "check_count",
    "check_draws",
    "from_arrow",
    "from_json",
]

ARROW = "application/vnd.apache.arrow.stream"
Operation = Literal["sample", "summary", "log_prob"]
_DEEPEST = 8
_LEVELS = [0.025, 0.05, 0.16, 0.5, 0.84, 0.95, 0.975]
_MOST_LEVELS = 200

# Numbers in any nesting: what fits depends on the model.
Numbers = Annotated[
    list[Any],
    Field(
        description="numbers: one observation, or a list of them; null where one is missing",
        examples=[[[0.9, 1.1, 1.0], [1.2, 0.8, 1.0]]],
    ),
]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1, description="seed of the draws")]
Count = Annotated[int, Field(ge=1, description="posterior draws of each observation")]
Ids = Annotated[list[str | int], Field(description="names of the observations, default 0, 1, ...")]


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    x: Numbers
    observation_ids: Ids | None = None


class SampleBody(_Body):
    """Draws from the posterior of each observation."""

    num_samples: Count = 1000
    seed: Seed = 0
    with_log_prob: Annotated[bool, Field(description="give the density of each draw too")] = False


class SummaryBody(_Body):
    """Summaries of draws from the posterior of each observation."""

    num_samples: Annotated[int, Field(ge=2, description="draws that a summary is of")] = 1000
    seed: Seed = 0
    quantiles: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]],
        Field(min_length=1, max_length=_MOST_LEVELS, description="levels of the quantiles"),
    ] = _LEVELS
    hdi: Annotated[float, Field(gt=0, lt=1, description="mass of the interval")] = 0.9


class LogProbBody(_Body):
    """Densities of parameters under the posterior of each observation."""

    theta: Annotated[
        list[Any],
        Field(
            description="parameters (N, D) for all observations, or (B, N, D)",
            examples=[[[0.0, 0.1, -0.2]]],
        ),
    ]


BODIES: dict[str, type[_Body]] = {
    "sample": SampleBody,
    "summary": SummaryBody,
    "log_prob": LogProbBody,
}
_QUERY = {  # of the same, where x comes as Arrow
    "sample": ("num_samples", "seed", "with_log_prob"),
    "summary": ("num_samples", "seed", "quantiles", "hdi"),
    "log_prob": (),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_observations: int
    max_draws: int
    max_total_draws: int


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        rows: the observations.
        theta: float32 of shape (B, N, D) or (1, N, D), for densities.
        num_samples: draws of each observation, or N.
    """

    operation: Operation
    rows: Rows
    num_samples: int = 1000
    seed: int = 0
    with_log_prob: bool = False
    summarized: Summarized | None = None
    theta: np.ndarray | None = None


def from_json(
    operation: Operation, body: bytes, x_shape: tuple[int, ...], size: int, limits: Limits
) -> Question:
    """A question in JSON.

    Raises:
        Refusal: 400 it is no JSON, 422 it asks for what can't be, 413 it asks for too much.
    """
    _check_depth(body)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "Malformed body", f"the body is no valid JSON ({error})") from None
    asked = _checked(BODIES[operation], content)
    x = as_batch(asked.x, x_shape)
    check_count(len(x), limits)
    rows = rows_of_json(x, asked.observation_ids, x_shape)
    given = None if operation != "log_prob" else theta_of_json(asked.theta, len(x), size)
    return _question(operation, rows, asked, limits, given)


def from_arrow(
    operation: Operation,
    body: bytes,
    query: dict[str, str],
    x_shape: tuple[int, ...],
    size: int,
    limits: Limits,
) -> Question:
    """A question whose observations are an Arrow stream, and whose rest is in the query string.

    Raises:
        Refusal: as :func:`from_json`.
    """
    content: dict[str, Any] = {"x": []}
    for name, value in query.items():
        content[name] = _parsed(name, value)
    if operation == "log_prob":
        content.setdefault("theta", [])
    asked = _checked(BODIES[operation], content, ("x", "theta"), _QUERY[operation])
    try:
        require_plain_buffers(body)
        with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(400, "Malformed body", f"the body is no Arrow stream ({reason})") from None
    check_count(len(table), limits)
    rows = rows_of_table(table, x_shape)
    given = None if operation != "log_prob" else theta_of_table(table, size)
    return _question(operation, rows, asked, limits, given)


def _question(
    operation: Operation, rows: Rows, asked: Any, limits: Limits, theta: np.ndarray | None
) -> Question:
    if theta is not None:
        check_draws(len(rows), theta.shape[1], limits, "theta has", "parameter vectors")
        return Question(operation, rows, theta.shape[1], theta=theta)
    check_draws(len(rows), asked.num_samples, limits, "num_samples is", "draws")
    if operation == "summary":
        summarized = Summarized(tuple(asked.quantiles), asked.hdi)
        return Question(operation, rows, asked.num_samples, asked.seed, summarized=summarized)
    return Question(operation, rows, asked.num_samples, asked.seed, asked.with_log_prob)


# ---- limits -------------------------------------------------------------------------------------


def check_count(observations: int, limits: Limits) -> None:
    """Refuse a request (422, 413) for none, or for too many observations."""
    if observations == 0:
        raise Refusal(422, "Invalid request", "x holds no observation; give one or more")
    if observations > limits.max_observations:
        raise Refusal(
            413,
            "Request too large",
            f"x holds {observations:,} observations; a request may have "
            f"{limits.max_observations:,}; divide it into several",
            extra={"limit": limits.max_observations},
        )


def check_draws(observations: int, draws: int, limits: Limits, field: str, of: str) -> None:
    """Refuse a request (413) for too many draws of each observation, or in all."""
    if draws > limits.max_draws:
        raise Refusal(
            413,
            "Request too large",
            f"{field} {draws:,}; an observation may have {limits.max_draws:,} {of}",
            extra={"limit": limits.max_draws},
        )
    if observations * draws > limits.max_total_draws:
        raise Refusal(
            413,
            "Request too large",
            f"{observations:,} observations x {draws:,} {of} are {observations * draws:,}; a "
            f"request may ask for {limits.max_total_draws:,}; divide it into several",
            extra={"limit": limits.max_total_draws},
        )


_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _check_depth(body: bytes) -> None:
    """Refuse JSON that is nested too deeply, before it is parsed."""
    # Brackets in strings do not count; these are only taken out where it matters.
    if _depth(body) > _DEEPEST and _depth(_STRINGS.sub(b"", body)) > _DEEPEST:
        raise Refusal(
            400,
            "Malformed body",
            f"the body is nested deeper than {_DEEPEST} levels, the most allowed",
        )


def _depth(body: bytes) -> int:
    """How many brackets are open at most."""
    given = np.frombuffer(body, dtype=np.uint8)
    step = np.zeros(len(given), dtype=np.int8)
    step[(given == ord("[")) | (given == ord("{"))] = 1
    step[(given == ord("]")) | (given == ord("}"))] = -1
    return int(np.cumsum(step, dtype=np.int32).max(initial=0))


# ---- fields -------------------------------------------------------------------------------------


def _checked(
    kind: type[_Body], content: Any, hidden: tuple[str, ...] = (), known: Any = None
) -> Any:
    if not isinstance(content, dict):
        raise Refusal(
            422,
            "Invalid request",
            f"the body is a JSON {type(content).__name__}; it must be an object with the key x",
        )
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "body"
        if first["type"] == "extra_forbidden":
            names = known if known is not None else kind.model_fields
            allowed = [name for name in names if name not in hidden]
            near = nearest(field, allowed)
            hint = f"; did you mean {near!r}?" if near else ""
            raise Refusal(
                422,
                "Invalid request",
                f"unknown key {field[:80]!r}{hint or '; allowed: ' + ', '.join(allowed)}",
            ) from None
        message = first["msg"].replace("Input should be", "must be")
        given = "" if isinstance(first["input"], (list, dict)) else f" is {first['input']!r:.80}"
        raise Refusal(
            422, "Invalid request", f"{field}{given}; it {message[0].lower()}{message[1:]}"
        ) from None


def _parsed(name: str, value: str) -> Any:
    """A value of the query string: JSON, or levels with commas between them."""
    if name == "quantiles":
        value = value if value.startswith("[") else f"[{value}]"
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
