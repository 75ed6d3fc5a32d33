"""Questions to the service, as JSON or Arrow, checked: observations, how many draws, which seed.

What arrives is untrusted. Its size is bounded before this; its depth is looked at before it is
parsed; and each observation that can't be used keeps its place with a status, as in a catalog.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pydantic
from pydantic import Field

from sbi_dist.catalog.rows import ID, Rows, depth, identifiers
from sbi_dist.errors import InputError
from sbi_dist.options import nearest
from sbi_dist.serving.arrow_stream import require_plain_buffers
from sbi_dist.serving.drawing import Summarized
from sbi_dist.serving.refusal import Refusal

__all__ = ["ARROW", "BODIES", "Limits", "Question", "from_arrow", "from_json"]

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
    x = asked.x
    if (len(x) and not isinstance(x[0], list)) or (len(x_shape) > 1 and _shape(x) == x_shape):
        x = [x]
    check_count(len(x), limits)
    ids = _ids(asked.observation_ids, len(x))
    rows = _rows(x, ids, x_shape)
    return _question(operation, rows, asked, limits, lambda: _theta(asked.theta, len(x), size))


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
    names = table.column_names
    if len(set(names)) < len(names):
        raise Refusal(422, "Invalid request", "the stream has several columns of the same name")
    try:
        rows = _table_rows(table, x_shape)
    except (InputError, pa.ArrowException, TypeError, ValueError) as error:
        raise Refusal(422, "Invalid request", f"x: {_line(error)}") from None
    try:
        return _question(operation, rows, asked, limits, lambda: _arrow_theta(table, size))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise Refusal(422, "Invalid request", f"theta: {_line(error)}") from None


def _question(operation: Operation, rows: Rows, asked: Any, limits: Limits, theta: Any) -> Question:
    if operation == "log_prob":
        given = theta()
        check_draws(len(rows), given.shape[1], limits, "theta has", "parameter vectors")
        return Question(operation, rows, given.shape[1], theta=given)
    check_draws(len(rows), asked.num_samples, limits, "num_samples is", "draws")
    if operation == "summary":
        summarized = Summarized(tuple(asked.quantiles), asked.hdi)
        return Question(operation, rows, asked.num_samples, asked.seed, summarized=summarized)
    return Question(operation, rows, asked.num_samples, asked.seed, asked.with_log_prob)


# ---- limits -------------------------------------------------------------------------------------


def check_count(observations: int, limits: Limits) -> None:
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
    for text in (body, None):
        # Brackets in strings do not count; they are only taken out where it matters.
        given = np.frombuffer(_STRINGS.sub(b"", body) if text is None else text, dtype=np.uint8)
        step = np.zeros(len(given), dtype=np.int8)
        step[(given == 0x5B) | (given == 0x7B)] = 1
        step[(given == 0x5D) | (given == 0x7D)] = -1
        if int(np.cumsum(step, dtype=np.int32).max(initial=0)) <= _DEEPEST:
            return
    raise Refusal(
        400, "Malformed body", f"the body is nested deeper than {_DEEPEST} levels, the most allowed"
    )


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


def _ids(given: list[str | int] | None, count: int) -> pa.Array:
    if given is None:
        return identifiers(None, 0, count)
    if len(given) != count:
        raise Refusal(
            422,
            "Invalid request",
            f"observation_ids holds {len(given)} names; x holds {count} observations",
        )
    return pa.array([str(each) for each in given], pa.string())


def _shape(values: list) -> tuple[int, ...]:
    shape: list[int] = []
    inner: Any = values
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    return tuple(shape)


def _rows(x: list, ids: pa.Array, x_shape: tuple[int, ...]) -> Rows:
    size = math.prod(x_shape)
    try:
        values = np.asarray(x)
    except ValueError:
        values = np.asarray(None)
    if values.dtype.kind in "fiu" and values.size == len(x) * size:
        return Rows.of_arrays(ids, values, x_shape)
    try:
        # Slower, for what is missing or of another length.
        column = pa.array(x, from_pandas=False)
        while pa.types.is_nested(column.type) is False:
            raise pa.ArrowTypeError("it is no list of observations")
        inner = column.type
        while pa.types.is_list(inner):
            inner = inner.value_type
        if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or _null(inner)):
            raise pa.ArrowTypeError(f"it holds {inner} where numbers must be")
        return Rows.of_lists(ids, _as_float(column), x_shape)
    except (pa.ArrowException, InputError, TypeError, ValueError, OverflowError) as error:
        raise Refusal(
            422,
            "Invalid request",
            f"x: {_line(error)}; it must be one observation or a list of them, each of "
            f"{size} numbers",
        ) from None


def _null(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind)


def _as_float(column: pa.Array) -> pa.Array:
    """Lists of integers or of nothing as lists of floats, as deep as they are."""
    kind: pa.DataType = pa.float64()
    for _ in range(depth(column.type)):
        kind = pa.list_(kind)
    return column.cast(kind, safe=False)


def _table_rows(table: pa.Table, x_shape: tuple[int, ...]) -> Rows:
    named = ID in table.column_names
    ids = identifiers(_one(table[ID]) if named else None, 0, len(table))
    if "x" in table.column_names:
        column = _one(table["x"])
        if isinstance(column.type, pa.FixedShapeTensorType):
            column = column.storage
        _require_numbers(column.type, "x")
        if depth(column.type):
            return Rows.of_lists(ids, column, x_shape)
    names = [name for name in table.column_names if name not in (ID, "theta")]
    size = math.prod(x_shape)
    if len(names) != size:
        raise InputError(
            f"the stream has {len(names)} columns of numbers; give one column x of lists, or "
            f"{size} columns"
        )
    columns = [_one(table[name]) for name in names]
    for name, each in zip(names, columns, strict=True):
        _require_numbers(each.type, name)
        if depth(each.type):
            raise InputError(f"column {name!r} holds lists; only a column x may")
    return Rows.of_columns(ids, columns, x_shape)


def _require_numbers(kind: pa.DataType, name: str) -> None:
    inner = kind
    while pa.types.is_list(inner) or pa.types.is_large_list(inner) or _fixed(inner):
        inner = inner.value_type
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or _null(inner)):
        raise InputError(f"column {name!r} is of type {kind}, not numeric")


def _fixed(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind)


def _one(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = combined.chunk(0)
    return combined


def _theta(given: list, observations: int, size: int) -> np.ndarray:
    try:
        theta = np.asarray(given)
    except ValueError:
        theta = np.asarray(None)
    if theta.dtype.kind not in "fiu":
        raise Refusal(422, "Invalid request", "theta holds what is no number, or uneven lists")
    return _shaped(theta, observations, size)


def _arrow_theta(table: pa.Table, size: int) -> np.ndarray:
    problem = "theta: give a column of lists of numbers, of the same length for each observation"
    if "theta" not in table.column_names:
        raise Refusal(422, "Invalid request", problem)
    column = _one(table["theta"])
    if isinstance(column.type, pa.FixedShapeTensorType):
        column = column.storage
    while depth(column.type) > 1:
        inner = column.flatten()
        lengths = pa.compute.list_value_length(inner) if depth(inner.type) else None
        if (
            lengths is not None
            and len(lengths)
            and pa.compute.min_max(lengths)["min"] != (pa.compute.min_max(lengths)["max"])
        ):
            raise Refusal(422, "Invalid request", problem)
        if len(inner) % max(1, len(table)):
            raise Refusal(422, "Invalid request", problem)
        column = inner
        if depth(column.type) == 0:
            break
    values = column.flatten() if depth(column.type) else column
    if values.null_count or not (
        pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    ):
        raise Refusal(422, "Invalid request", problem)
    numbers = values.to_numpy(zero_copy_only=False)
    if len(table) == 0 or len(numbers) % (len(table) * size) or not len(numbers):
        raise Refusal(
            422,
            "Invalid request",
            f"{problem}; a multiple of {size} numbers, the number of parameters",
        )
    return _shaped(numbers.reshape(len(table), -1, size), len(table), size)


def _shaped(theta: np.ndarray, observations: int, size: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        theta = theta.astype(np.float32)
    if theta.ndim == 1:
        theta = theta[None]
    if theta.ndim == 2:
        theta = theta[None]
    if (
        theta.ndim != 3
        or theta.shape[0] not in (1, observations)
        or theta.shape[1] == 0
        or theta.shape[2] != size
    ):
        raise Refusal(
            422,
            "Invalid request",
            f"theta has shape {tuple(theta.shape)}; it must be (N, {size}) for all observations, "
            f"or ({observations}, N, {size})",
        )
    if not np.isfinite(theta).all():
        raise Refusal(422, "Invalid request", "theta holds numbers that are not finite")
    return theta


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
