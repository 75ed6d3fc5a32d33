"""A service that follows the contract where it is not told to fail: real sockets, known draws.

A draw is a function of model, observation, seed and number, and of nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa

from sbi_dist.catalog.summary import summarize

ARROW = "application/vnd.apache.arrow.stream"
NAMES = ["a", "b"]
# Of a record batch of an answer.
ROWS_AT_ONCE = 2
END_BYTES = 8


@dataclasses.dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    ids: list[str] = dataclasses.field(default_factory=list)


Fault = Callable[["Handler", list[bytes]], None]


def expected(model: str, x: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """The draws (B, count, 2) of observations (B, 3)."""
    draws = np.full((len(x), count, 2), np.nan, dtype=np.float32)
    for row, one in enumerate(np.asarray(x, dtype=np.float32)):
        if np.isfinite(one).all():
            key = [seed, *model.encode(), *one.tobytes()]
            draws[row] = one[:2] + np.random.default_rng(key).standard_normal((count, 2))
    return draws


def log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(B, N) of theta (B, N, 2) and x (B, 3); outside of the prior below -100."""
    inside = (theta > -100).all(axis=-1)
    return np.where(inside, theta.sum(axis=-1) - x.sum(axis=-1)[:, None], -np.inf).astype(
        np.float32
    )


class Service:
    """A server on a free port.

    Attributes:
        promoted: the model that is; every other id is one as well.
        script: faults, each for one POST request, in order.
        limits: as it says them.
        asked: the POST requests that came.
        most_at_once: how many of them were worked at together.
    """

    def __init__(self) -> None:
        self.promoted = "model1"
        self.script: deque[Fault | None] = deque()
        self.limits: dict[str, float] = {"max_draws": 10**6, "max_body_mb": 10}
        self.asked: list[Asked] = []
        self.described = 0
        self.token: str | None = None
        self.work_s = 0.0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.service = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def about(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "promoted": model == self.promoted,
            "parameter_names": NAMES,
            "parameter_units": ["m", None],
            "x_shape": [3],
            "calibration": {"verdict": "pass", "summary": ""},
            "limits": self.limits,
        }


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave
            super().handle_error(*address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def service(self) -> Service:
        return self.server.service  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.service.described += 1
        *_, last = urlsplit(self.path).path.split("/")
        if not self._authorized():
            return
        if last == "models":
            about = self.service.about(self.service.promoted)
            models = [{"model": about["model"], "promoted": True, "loaded": True, "refused": None}]
            self.document({"promoted": about["model"], "models": models})
        elif unquote(last) == "unknown model":
            self.problem(404, "Unknown model", "there is no model 'unknown model'")
        else:
            self.document(self.service.about(self._model(unquote(last))))

    def do_POST(self) -> None:
        service, parts = self.service, urlsplit(self.path)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        table = pa.ipc.open_stream(content).read_all()
        asked = Asked(self.path, dict(self.headers), table["observation_id"].to_pylist())
        with service.lock:
            service.asked.append(asked)
            fault = service.script.popleft() if service.script else None
            service.at_once += 1
            service.most_at_once = max(service.most_at_once, service.at_once)
        try:
            if not self._authorized():
                return
            time.sleep(service.work_s)
            *_, model, operation = parts.path.split("/")
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            messages = self._answer(self._model(unquote(model)), operation, query, table)
            (fault or whole)(self, messages)
        finally:
            with service.lock:
                service.at_once -= 1

    def _model(self, name: str) -> str:
        return self.service.promoted if name == "promoted" else name

    def _authorized(self) -> bool:
        token = self.service.token
        if token is None or self.headers["Authorization"] == f"Bearer {token}":
            return True
        self.problem(401, "Unauthorized", "a token is needed", [("WWW-Authenticate", "Bearer")])
        return False

    def _answer(
        self, model: str, operation: str, query: dict[str, str], table: pa.Table
    ) -> list[bytes]:
        """The schema, record batches and the end of an answer."""
        x = np.array(table["x"].to_pylist(), dtype=np.float32)
        good = np.isfinite(x).all(axis=1)
        columns: dict[str, np.ndarray] = {}
        count, seed = int(query.get("num_samples", 1000)), int(query.get("seed", 0))
        draws = expected(model, x, count, seed)
        if operation == "sample":
            columns["draws"] = draws
            if query["with_log_prob"] == "true":
                columns["log_prob"] = log_prob(draws, x)
        elif operation == "summary":
            levels = [float(level) for level in query["quantiles"].split(",")]
            found = summarize(np.nan_to_num(draws), levels, float(query["hdi"]))
            columns = dataclasses.asdict(found) | {"map": draws[:, 0]}
        else:
            theta = np.array(table["theta"].to_pylist(), dtype=np.float32).reshape(len(x), -1, 2)
            columns["log_prob"] = log_prob(theta, x)
        arrays = {
            "observation_id": table["observation_id"].combine_chunks(),
            "status": pa.array(np.where(good, "ok", "nonfinite").tolist(), pa.string()),
            "out_of_distribution": pa.array(np.where(good, x[:, 0], np.nan).astype(np.float32)),
            "out_of_distribution_p": pa.array([0.5] * len(x), pa.float32()),
        }
        arrays |= {
            name: pa.FixedShapeTensorArray.from_numpy_ndarray(values.astype(np.float32))
            for name, values in columns.items()
        }
        notes = {"model": model, "parameter_names": NAMES, "num_samples": count, "seed": seed}
        answer = pa.table(arrays).replace_schema_metadata(
            {name: json.dumps(value) for name, value in notes.items()}
        )
        return messages(answer)

    # ---- what is sent ----

    def document(self, content: Any) -> None:
        self.respond(200, "application/json", json.dumps(content).encode())

    def problem(
        self, status: int, title: str, detail: str, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        content = {"title": title, "detail": detail, "status": status}
        named = [*headers, ("X-Request-ID", "request-7")]
        self.respond(status, "application/problem+json", json.dumps(content).encode(), named)

    def respond(
        self, status: int, kind: str, content: bytes, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Type", kind), ("Content-Length", len(content))]:
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def begin(self, kind: str = ARROW) -> None:
        """The head of an answer in chunks."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        """A chunk; an empty one is the end."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def reset(self) -> None:
        """Break the connection off."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RDWR)


def messages(answer: pa.Table) -> list[bytes]:
    """A table as an IPC stream: its schema, its batches, its end."""
    sink, empty = io.BytesIO(), io.BytesIO()
    with pa.ipc.new_stream(empty, answer.schema):
        pass
    cuts = [0, len(empty.getvalue()) - END_BYTES]
    with pa.ipc.new_stream(sink, answer.schema) as writer:
        for batch in answer.to_batches(max_chunksize=ROWS_AT_ONCE):
            writer.write_batch(batch)
            cuts.append(sink.tell())
    cuts.append(cuts[-1] + END_BYTES)
    return [sink.getvalue()[start:stop] for start, stop in itertools.pairwise(cuts)]


# ---- faults -------------------------------------------------------------------------------------


def whole(handler: Handler, parts: list[bytes]) -> None:
    """No fault."""
    handler.begin()
    for part in parts:
        if part:
            handler.chunk(part)
    handler.chunk(b"")


def busy(seconds: float | str | None, status: int = 503) -> Fault:
    def fault(handler: Handler, parts: list[bytes]) -> None:
        headers = [] if seconds is None else [("Retry-After", str(seconds))]
        handler.problem(status, "Saturated", "try again later", headers)

    return fault


def says(status: int, kind: str, content: bytes) -> Fault:
    def fault(handler: Handler, parts: list[bytes]) -> None:
        handler.respond(status, kind, content)

    return fault


def refuses(status: int, title: str = "Title", detail: str = "detail") -> Fault:
    def fault(handler: Handler, parts: list[bytes]) -> None:
        handler.problem(status, title, detail)

    return fault


def breaks(batches: int, extra: int = 0, clean: bool = False, kind: str = ARROW) -> Fault:
    """Send so many batches and some bytes of the next, then break off, or end as if it were all."""

    def fault(handler: Handler, parts: list[bytes]) -> None:
        handler.begin(kind)
        data = b"".join(parts[: 1 + batches]) + b"".join(parts[1 + batches :])[:extra]
        handler.chunk(data)
        if clean:
            handler.chunk(b"")
        else:
            time.sleep(0.05)  # what was sent before a reset may be lost by it
            handler.reset()

    return fault


def leaves_out(handler: Handler, parts: list[bytes]) -> None:
    """A regular stream without its last batch."""
    whole(handler, [*parts[:-2], parts[-1]])


def stalls(seconds: float) -> Fault:
    """Say nothing more after the first batch."""

    def fault(handler: Handler, parts: list[bytes]) -> None:
        handler.begin()
        handler.chunk(parts[0] + parts[1])
        time.sleep(seconds)
        handler.reset()

    return fault


def promotes(model: str, then: Fault | None = None) -> Fault:
    """Answer, and promote another model meanwhile."""

    def fault(handler: Handler, parts: list[bytes]) -> None:
        handler.service.promoted = model
        (then or whole)(handler, parts)

    return fault
