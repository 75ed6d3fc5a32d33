"""A question about observations, checked against a model and divided into requests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sbi_dist.catalog.rows import ID, Rows
from sbi_dist.catalog.source import ArraySource, Source
from sbi_dist.errors import InputError
from sbi_dist.serving.client.answers import (
    ABOUT_X,
    Answer,
    Densities,
    Samples,
    Summaries,
    decode,
)
from sbi_dist.serving.client.question import Question, as_array

__all__ = ["Description", "Job", "Piece"]

# One request is some seconds of work at most, and its answer is held in memory.
_PIECE_DRAWS, _PIECE_BYTES = 2**19, 16 * 1024**2
# Of a row's identifier in a request, and what a limit is filled to, as identifiers may be longer.
_ID_BYTES, _FILL = 64, 0.9


@dataclasses.dataclass(frozen=True)
class Description:
    """What a service says of a model.

    Attributes:
        model: its id.
        x_shape: of one observation.
        parameter_names: D names.
        limits: of one request, by name; what is missing has none.
        document: all that it says.
    """

    model: str
    x_shape: tuple[int, ...]
    parameter_names: list[str]
    limits: dict[str, float]
    document: dict[str, Any]

    @classmethod
    def of(cls, document: dict[str, Any]) -> Description:
        """From the answer of ``GET /v1/models/{m}``.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        limits = {
            str(name): float(value)
            for name, value in document.get("limits", {}).items()
            if isinstance(value, (int, float))
        }
        return cls(
            str(document["model"]),
            tuple(int(length) for length in document["x_shape"]),
            [str(name) for name in document["parameter_names"]],
            limits,
            document,
        )


@dataclasses.dataclass(frozen=True)
class Piece:
    """Observations of one request; theta (B, N, D) where densities are asked for."""

    rows: Rows
    theta: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def after(self, count: int) -> Piece:
        """Those after the first ``count``."""
        rows = self.rows
        left = Rows(rows.ids.slice(count), rows.x[count:], rows.status[count:])
        return Piece(left, None if self.theta is None else self.theta[count:])

    def body(self) -> bytes:
        """As an Arrow IPC stream."""
        columns = {ID: self.rows.ids, "x": _lists(self.rows.x)}
        if self.theta is not None:
            columns["theta"] = _lists(self.theta)
        batch = pa.RecordBatch.from_pydict(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()


def _lists(values: np.ndarray) -> pa.Array:
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(len(values), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])


class Job:
    """A question about observations, as the requests that it takes.

    Args:
        question: what is wanted of each.
        about: the model.
        x: one observation or a batch, of numbers; or a catalog's source.
        ids: identifiers of a batch; default: numbers.

    Raises:
        InputError: x, theta or ids do not go together or with the model, or one observation is
            more than the service takes.
    """

    def __init__(
        self, question: Question, about: Description, x: Any, ids: Sequence[str] | None
    ) -> None:
        self.question, self.about = question, about
        self._source = _source(x, about.x_shape, ids)
        self._theta = self._checked(question.theta)
        self._rows = self._rows_per_piece()

    def __len__(self) -> int:
        """How many requests."""
        return -(-len(self._source) // self._rows)

    def pieces(self) -> Iterator[Piece]:
        """The requests, read when they are asked for."""
        for start in range(0, len(self._source), self._rows):
            stop = min(start + self._rows, len(self._source))
            rows = self._source.read(start, stop)
            self._source.check()
            theta = self._theta
            if theta is not None:
                shared = theta.ndim == 2
                theta = np.broadcast_to(theta, (len(rows), *theta.shape)) if shared else theta
                theta = theta if shared else theta[start:stop]
            yield Piece(rows, theta)

    def answer(self, batch: pa.RecordBatch, notes: dict[str, Any], piece: Piece) -> Answer:
        """A record batch that came, which answers the first rows of a piece.

        Args:
            notes: what the stream's schema says.

        Raises:
            KeyError, TypeError, ValueError: it is not the answer to that.
        """
        names = [str(name) for name in notes["parameter_names"]]
        count, size, question = self.question.draws, len(names), self.question
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ABOUT_X, ())
        if question.operation == "sample":
            shapes["draws"] = (count, size)
        if question.operation == "summary":
            shapes |= {"mean": (size,), "sd": (size,), "map": (size,), "hdi": (2, size)}
            shapes |= {"covariance": (size, size), "quantiles": (len(question.levels), size)}
        if question.operation == "log_prob" or question.params.get("with_log_prob") == "true":
            shapes["log_prob"] = (count,)
        ids, statuses, columns = decode(batch, piece.rows, shapes)
        fields: dict[str, Any] = {
            "model": str(notes["model"]),
            "parameter_names": names,
            "ids": ids,
            "statuses": statuses,
            **columns,
        }
        if question.operation == "sample":
            return Samples(**{"log_prob": None, **fields})
        if question.operation == "summary":
            levels = list(question.levels)
            return Summaries(quantile_levels=levels, hdi_mass=question.mass, **fields)
        return Densities(**fields)

    def _checked(self, theta: np.ndarray | None) -> np.ndarray | None:
        size, count = len(self.about.parameter_names), len(self._source)
        if theta is None:
            return None
        if theta.shape[-1] != size or (theta.ndim == 3 and len(theta) != count):
            raise InputError(
                f"theta has shape {theta.shape}; {count} observation(s) and {size} parameters "
                f"take (N, {size}) for all observations, or ({count}, N, {size})"
            )
        return theta

    def _rows_per_piece(self) -> int:
        question, limits = self.question, self.about.limits
        field = "theta" if question.theta is not None else "num_samples"
        size = len(self.about.parameter_names)
        most_draws = min(limits.get(name, math.inf) for name in ("max_draws", "max_total_draws"))
        if question.draws > most_draws:
            raise InputError(
                f"{field} is {question.draws:,} draws of an observation; the service takes at "
                f"most {most_draws:,.0f}; ask for fewer, or several times with other seeds"
            )
        of_x = 4 * math.prod(self.about.x_shape) + _ID_BYTES
        of_theta = 4 * question.draws * size if question.theta is not None else 0
        of_answer = 4 * question.draws * (size + 1) if question.operation != "summary" else 0
        room = limits.get("max_body_mb", math.inf) * 1e6 * _FILL
        if of_x + of_theta > room:
            raise InputError(
                f"{field}: one observation is a request of {(of_x + of_theta) / 1e6:.3g} MB; the "
                f"service takes {limits['max_body_mb']:g} MB; ask for fewer at once"
            )
        most = min(
            limits.get("max_observations", math.inf),
            limits.get("max_total_draws", math.inf) // question.draws,
            room // (of_x + of_theta),
            max(1, _PIECE_DRAWS // question.draws),
            max(1, _PIECE_BYTES // max(of_x + of_theta, of_answer)),
        )
        count = -(-len(self._source) // max(1, int(most)))
        return -(-len(self._source) // count)  # so that all are of one size


# ---- observations -------------------------------------------------------------------------------


def _source(x: Any, x_shape: tuple[int, ...], ids: Sequence[str] | None) -> Source:
    if hasattr(x, "read") and hasattr(x, "check"):
        if ids is not None:
            raise InputError("ids are given, but x is a catalog, which has its own; leave them out")
        return x
    values, size = as_array(x, "x"), math.prod(x_shape)
    if values.shape == x_shape or (size != 1 and values.shape == (size,)):
        values = values[None]
    elif values.shape[1:] not in {x_shape, (size,)} and not (size == 1 and values.ndim <= 1):
        batch = ", ".join(["B", *map(str, x_shape)])
        raise InputError(
            f"x has shape {values.shape}; an observation has shape {x_shape}, a batch of B "
            f"observations ({batch})"
        )
    values = values.reshape(-1, *x_shape)
    if not len(values):
        raise InputError("x holds no observation; give at least one")
    if ids is not None:
        ids = [str(each) for each in ([ids] if isinstance(ids, str) else ids)]
        if len(ids) != len(values):
            raise InputError(f"ids are {len(ids)} for {len(values)} observation(s); give one each")
        if len(set(ids)) != len(ids):
            raise InputError("ids hold the same identifier twice; each must be another")
    return ArraySource.of("x", values, ids)
