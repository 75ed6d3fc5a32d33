"""The client for programs that wait for what they ask."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from sbi_dist.serving.client import question as ask
from sbi_dist.serving.client.answers import Answer, Densities, Samples, Summaries
from sbi_dist.serving.client.exchange import PROMOTED, Exchange
from sbi_dist.serving.client.http import as_again, timeouts
from sbi_dist.serving.client.job import Job
from sbi_dist.serving.client.steps import Again, Found, Head, Pause, Receive, Send, Steps

__all__ = ["Client"]


class Client:
    """Asks a service of posteriors over HTTP. May be used by several threads.

    Observations are sent and answers received as Arrow; a large batch goes in several requests,
    and what fails in passing is asked again. Answers of one call are of one model.

    Example::

        with Client("http://127.0.0.1:8000") as client:
            samples = client.sample(x, num_samples=1000)
            samples.draws  # (B, 1000, D)

    Args:
        url: where the service is.
        token: that the service wants; default: that in the variable SBI_DIST_TOKEN, if any.
        token_file: a file that holds nothing but the token.
        timeout_s: how long one request may take with all its tries; a large batch is several.
            Where the connection dies in mid-answer, it may be noticed that much later.
        retries: how often in a row a request is sent again without any progress. Waiting as long
            as a busy service asks for does not count. 0: nothing is sent again.
        model: that is asked, an id or ``promoted``.
        transport: of httpx, in place of the network.

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
        model: str = PROMOTED,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._exchange = Exchange(url, token, token_file, timeout_s, retries)
        self.model_name = model
        self._http = httpx.Client(transport=transport)

    def __repr__(self) -> str:
        return f"Client({self._exchange.url!r}, model={self.model_name!r})"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    # ---- models ----

    def models(self) -> list[dict[str, Any]]:
        """All models: ``model`` (id), ``promoted``, ``loaded``, ``refused`` (why, or None)."""
        return self._one(self._exchange.models())

    def model(self, name: str | None = None) -> dict[str, Any]:
        """What the service says of a model: shapes, names, prior, calibration, limits."""
        return self._one(self._exchange.model(name or self.model_name))

    # ---- posteriors ----

    def sample(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        with_log_prob: bool = False,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> Samples:
        """Posterior draws.

        Args:
            x: one observation or a batch (B, *x_shape), of numpy, torch or lists; rows may be flat.
                Or a catalog, see :func:`sbi_dist.catalog.source.open_catalog`.
            num_samples: N, draws of each observation.
            seed: a draw depends on model, observation, seed and its number.
            with_log_prob: whether the density of each draw is wanted.
            model: an id or ``promoted``; default: the client's.
            ids: identifiers of the observations; default: their numbers.

        Raises:
            InputError: these can't be used, or the service refuses them.
            StageError: the service can't be reached, fails, or takes longer than ``timeout_s``.
        """
        every = self.sample_stream(x, num_samples, seed, with_log_prob, model, ids)
        return Samples.concatenate(list(every))

    def sample_stream(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        with_log_prob: bool = False,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> Iterator[Samples]:
        """As :meth:`sample`, of some observations at a time and in order, as they arrive.

        Holds no more of them than one request, however many there are.
        """
        return self._ask(ask.samples(num_samples, seed, with_log_prob), x, model, ids)

    def summary(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        quantiles: Sequence[float] | None = None,
        hdi: float | None = None,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> Summaries:
        """Summaries of ``num_samples`` draws.

        Args:
            quantiles, hdi: levels, and part of the draws in the highest-density interval; default:
                those of catalogs.
            x, num_samples, seed, model, ids: see :meth:`sample`, also for what is raised.
        """
        every = self.summary_stream(x, num_samples, seed, quantiles, hdi, model, ids)
        return Summaries.concatenate(list(every))

    def summary_stream(
        self,
        x: Any,
        num_samples: int = 1000,
        seed: int = 0,
        quantiles: Sequence[float] | None = None,
        hdi: float | None = None,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> Iterator[Summaries]:
        """As :meth:`summary`, of some observations at a time, see :meth:`sample_stream`."""
        return self._ask(ask.summaries(num_samples, seed, quantiles, hdi), x, model, ids)

    def log_prob(
        self, theta: Any, x: Any, model: str | None = None, ids: Sequence[str] | None = None
    ) -> Densities:
        """Posterior densities.

        Args:
            theta: (N, D) for all observations, or (B, N, D).
            x, model, ids: see :meth:`sample`, also for what is raised.
        """
        return Densities.concatenate(list(self._ask(ask.densities(theta), x, model, ids)))

    # ---- steps ----

    def _ask(
        self, question: ask.Question, x: Any, model: str | None, ids: Sequence[str] | None
    ) -> Iterator[Any]:
        job, asked = self._one(self._exchange.job(question, model or self.model_name, x, ids))
        return self._answers(job, asked)

    def _answers(self, job: Job, model: str) -> Iterator[Answer]:
        for piece in job.pieces():
            yield from self._take(self._exchange.answers(job, model, piece))

    def _one(self, steps: Steps) -> Any:
        (value,) = self._take(steps)
        return value

    def _take(self, steps: Steps) -> Iterator[Any]:
        """Take the steps of a conversation; what it finds."""
        answer: httpx.Response | None = None
        chunks: Iterator[bytes] = iter(())
        came: Any = None
        failed: Again | None = None
        try:
            while True:
                try:
                    step = steps.send(came) if failed is None else steps.throw(failed)
                except StopIteration:
                    return
                came = failed = None
                if isinstance(step, Found):
                    yield step.value
                    continue
                try:
                    if isinstance(step, Receive):
                        came = next((chunk for chunk in chunks if chunk), b"")
                        continue
                    if answer is not None:
                        answer.close()
                    if isinstance(step, Pause):
                        time.sleep(step.seconds)
                    if isinstance(step, Send):
                        answer = self._http.send(self._request(step), stream=True)
                        chunks = answer.iter_bytes()
                        came = Head(answer.status_code, answer.headers)
                except httpx.HTTPError as error:
                    failed = as_again(error)
        finally:
            steps.close()
            if answer is not None:
                answer.close()

    def _request(self, step: Send) -> httpx.Request:
        return self._http.build_request(
            step.method,
            step.url,
            headers=step.headers,
            params=step.params,
            content=step.content,
            timeout=timeouts(step),
        )
