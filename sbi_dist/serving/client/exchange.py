"""What is said to a service: requests, what their answers mean, and when they are asked again.

Conversations as steps; nothing here opens a connection. A draw depends on model, observation, seed
and number alone, so a request that failed half-way goes on with the observations that are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from sbi_dist.errors import InputError
from sbi_dist.serving.client.job import Description, Job, Piece
from sbi_dist.serving.client.patience import (
    Patience,
    RequestRefused,
    ServiceError,
    retry_after,
)
from sbi_dist.serving.client.question import Question
from sbi_dist.serving.client.steps import Again, Found, Head, Pause, Receive, Send, Steps
from sbi_dist.serving.client.stream import ArrowStream, NotArrow

__all__ = ["PROMOTED", "Exchange"]

PROMOTED = "promoted"

_ARROW = "application/vnd.apache.arrow.stream"
_PROBLEM = "application/problem+json"
_TOKEN = "SBI_DIST_TOKEN"
# Of a document that is kept, and of a problem.
_MOST_DOCUMENT, _MOST_PROBLEM = 64 * 1024**2, 64 * 1024
# Of servers before the service that can't reach it, or of a service that is too busy.
_PASSING = {408, 429, 502, 503}


class Exchange:
    """Conversations with the service at one address.

    Args:
        url: where it is, as in ``http://host:8000``.
        token: that it wants; see also ``token_file``, and the variable SBI_DIST_TOKEN.
        token_file: a file that holds nothing else.
        timeout_s: of one request, with all its tries.
        retries: see :class:`Patience`.
        clock, uniform: as of ``time`` and ``random``.

    Raises:
        InputError: one of these can't be used.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        token_file: str | Path | None = None,
        timeout_s: float = 60.0,
        retries: int = 8,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if not timeout_s > 0:
            raise InputError(f"timeout_s is {timeout_s!r}; it must be above 0")
        if retries < 0:
            raise InputError(f"retries is {retries!r}; it must be at least 0")
        self.url = _address(url)
        self._token = _token(token, token_file)
        self._timeout_s, self._retries = timeout_s, retries
        self._clock, self._uniform = clock, uniform
        self._known: dict[str, Description] = {}

    def __repr__(self) -> str:
        return f"Exchange({self.url!r})"

    # ---- conversations ----

    def models(self) -> Steps:
        """Finds what the service says of each of its models, a list of dictionaries."""
        document = yield from self._document("/v1/models")
        try:
            yield Found([dict(each) for each in document["models"]])
        except (KeyError, TypeError, ValueError):
            raise self._strange("its list of models is none") from None

    def model(self, name: str) -> Steps:
        """Finds all that it says of one, a dictionary."""
        about = yield from self._describe(name)
        yield Found(about.document)

    def job(self, question: Question, model: str, x: Any, ids: Sequence[str] | None) -> Steps:
        """Finds the :class:`Job` of a question, and the model to ask for it.

        Several requests must not meet several models, so they are made of the one that is promoted
        now.
        """
        about = self._known.get(model)
        fresh = about is None
        if about is None:
            about = yield from self._describe(model)
        job = Job(question, about, x, ids)
        if len(job) > 1 and not fresh:
            about = yield from self._describe(model)
            job = Job(question, about, x, ids)
        yield Found((job, about.model if len(job) > 1 else model))

    def answers(self, job: Job, model: str, piece: Piece) -> Steps:
        """Finds the answers to a piece of a job, some observations each, in order.

        Once a first one came, the others are of its model, whatever is promoted meanwhile.
        """
        patience = self._patience()
        alias = model
        while True:
            try:
                yield from self._send(job, model, piece, patience)
                stream = ArrowStream()
                while data := (yield Receive(patience.left())):
                    for batch in stream.feed(data):
                        answer = job.answer(batch, _notes(stream), piece)
                        if model not in (PROMOTED, answer.model):
                            raise self._strange(
                                f"it answered with model {answer.model}, not {model}"
                            )
                        model, piece = answer.model, piece.after(len(answer))
                        patience.progress()
                        began = self._clock()
                        yield Found(answer)
                        patience.excuse(self._clock() - began)
                stream.end()
                if len(piece):
                    raise self._strange(f"{len(piece)} observation(s) are missing in its answer")
                break
            except Again as again:
                if not len(piece):
                    break
                yield Pause(patience.pause(again))
            except RequestRefused:
                self._known.pop(alias, None)  # what is known of it may be old
                raise
            except (NotArrow, KeyError, TypeError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise self._strange(f"its answer can't be read ({error})") from error
        known = self._known.get(alias)
        if known is not None and known.model != model:
            del self._known[alias]

    # ---- requests ----

    def _describe(self, model: str) -> Any:
        if not model:
            raise InputError("model is empty; give the id of a model, or promoted")
        document = yield from self._document(f"/v1/models/{quote(model, safe='')}")
        try:
            self._known[model] = Description.of(document)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._strange("its description of the model is none") from None
        return self._known[model]

    def _document(self, path: str) -> Any:
        """The JSON object at a path."""
        patience = self._patience()
        while True:
            try:
                request_id = uuid.uuid4().hex
                headers = self._headers(patience, request_id, "application/json")
                left = patience.left()
                head = yield Send("GET", self.url + path, headers, {}, None, left)
                yield from self._accept(head, "application/json", request_id, patience)
                content = yield from _body(patience, _MOST_DOCUMENT)
                document = json.loads(content)
                if not isinstance(document, dict):
                    raise ValueError
                return document
            except Again as again:
                yield Pause(patience.pause(again))
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise self._strange(f"what it has at {path} is no JSON object") from None

    def _send(self, job: Job, model: str, piece: Piece, patience: Patience) -> Steps:
        request_id = uuid.uuid4().hex
        headers = self._headers(patience, request_id, _ARROW) | {"Content-Type": _ARROW}
        url = f"{self.url}/v1/models/{quote(model, safe='')}/{job.question.operation}"
        head = yield Send("POST", url, headers, job.question.params, piece.body(), patience.left())
        yield from self._accept(head, _ARROW, request_id, patience)

    def _headers(self, patience: Patience, request_id: str, accept: str) -> dict[str, str]:
        headers = {
            "Accept": accept,
            "Accept-Encoding": "identity",
            "X-Request-ID": request_id,
            "X-Timeout-S": f"{patience.left():.3f}",
        }
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _patience(self) -> Patience:
        return Patience(self.url, self._timeout_s, self._retries, self._clock, self._uniform)

    # ---- what came back ----

    def _accept(self, head: Head, wanted: str, request_id: str, patience: Patience) -> Steps:
        """Go on only with an answer of the wanted type.

        Raises:
            Again, RequestRefused, ServiceError: it is another.
        """
        kind = head.headers.get("content-type", "").partition(";")[0].strip().lower()
        if head.status == 200 and kind == wanted:
            return
        request_id = head.headers.get("x-request-id", request_id)[:128]
        if head.status == 200:
            raise self._strange(f"it answered with {kind or 'no type'}, not {wanted}")
        problem: dict[str, Any] = {}
        if kind == _PROBLEM:
            content = yield from _body(patience, _MOST_PROBLEM)
            with contextlib.suppress(TypeError, ValueError):
                problem = dict(json.loads(content))
        said = [str(problem[name]) for name in ("title", "detail") if problem.get(name)]
        if not said:
            said = [f"HTTP status {head.status}"]
        message = self._shown(": ".join(said))
        # A server before the service knows less: what it calls an error may pass.
        if head.status in _PASSING or (head.status >= 500 and not problem and head.status != 504):
            raise Again(message, retry_after(head.headers), request_id)
        message = f"{self.url}: {message}"
        if head.status == 401:
            message += (
                "; the token that was given is none of the service's"
                if self._token
                else f"; give its token with token_file (--token-file) or in {_TOKEN}"
            )
        message += f" (HTTP {head.status}, request {request_id})"
        if 400 <= head.status < 500:
            raise RequestRefused(message, head.status, request_id)
        raise ServiceError(message, head.status, request_id)

    def _strange(self, what: str) -> ServiceError:
        return ServiceError(
            f"{self.url}: {self._shown(what)}; see whether it is an sbi-dist service of this "
            "version"
        )

    def _shown(self, text: str) -> str:
        return text if self._token is None else text.replace(self._token, "***")


def _body(patience: Patience, most: int) -> Any:
    """The bytes of an answer's body."""
    content = bytearray()
    while data := (yield Receive(patience.left())):
        content += data
        if len(content) > most:
            raise ValueError("too long")
    return bytes(content)


def _notes(stream: ArrowStream) -> dict[str, Any]:
    """What a stream's schema says of all its batches."""
    return {
        key.decode(): json.loads(value)
        for key, value in (stream.schema.metadata or {}).items()
        if key in (b"model", b"parameter_names")
    }


def _address(url: str) -> str:
    """The service's address without a slash at its end."""
    try:
        parts = urlsplit(url)
        given = parts.port is None or parts.port > 0
    except ValueError:
        given = False
    if not given or parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"url is {url!r}; it must be as in http://host:8000")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"url has a user or password before {parts.hostname}; give a token with token_file "
            f"or in {_TOKEN}"
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def _token(token: str | None, file: str | Path | None) -> str | None:
    """The token, of which no error shows anything."""
    where = "token"
    if file is not None:
        if token is not None:
            raise InputError("token and token_file are both given; give one of them")
        where = f"token_file {file}"
        try:
            token = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise InputError(f"{where} can't be read ({reason})") from None
    elif token is None:
        where, token = _TOKEN, os.environ.get(_TOKEN, "").strip() or None
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise InputError(f"{where} holds no token; it must be one word of printable ASCII")
    return token
