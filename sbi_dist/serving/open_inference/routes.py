"""The routes of the protocol.

An error has the member ``error`` that the protocol asks for beside those of a problem document
(RFC 9457). It comes as ``application/json``: tritonclient takes any media type, and KServe's client
reads ``error`` of no other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, ParamSpec, TypeVar

import fastapi
import numpy as np
import orjson
from fastapi import Depends, Path, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, ValidationError

from sbi_dist.catalog.rows import OK, STATUSES, Rows, identifiers
from sbi_dist.serving.answer import Block
from sbi_dist.serving.body import body_of
from sbi_dist.serving.compression import compress, wanted
from sbi_dist.serving.gate import problem
from sbi_dist.serving.models import Model
from sbi_dist.serving.open_inference import answers
from sbi_dist.serving.open_inference.about import model_config, model_metadata, server_metadata
from sbi_dist.serving.open_inference.document import malformed
from sbi_dist.serving.open_inference.protocol import VERSION
from sbi_dist.serving.open_inference.request import InferRequest, read_request
from sbi_dist.serving.open_inference.response import write_response
from sbi_dist.serving.presence import while_there
from sbi_dist.serving.question import Question, check_count, check_draws
from sbi_dist.serving.refusal import Refusal
from sbi_dist.serving.service import Service

__all__ = ["router"]

# Bytes from which on work on them is done in a thread, so that others are answered meanwhile.
_MUCH = 64 * 1024
_OF_A_MODEL = (400, 401, 404, 409, 503, 504)
_INDEX_BODY = 64 * 1024

P = ParamSpec("P")
T = TypeVar("T")


class _Route(APIRoute):
    """One whose errors have the protocol's form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except Refusal as refusal:
                body, headers = problem(refusal, request.state.request_id)
                kind = {"content-type": "application/json"}
                return Response(body, refusal.status, dict(headers) | kind)

        return handled


def router(service: Service) -> fastapi.APIRouter:
    """The routes, below ``/v2``."""
    routes = fastapi.APIRouter(prefix="/v2", tags=["open inference"], route_class=_Route)

    @routes.get("", responses=answers.answers(answers.ServerMetadata, 401))
    async def server() -> Response:
        """Name, version and extensions of the server."""
        return _json(server_metadata())

    @routes.get("/health/live", responses=answers.answers(answers.Live))
    async def live() -> Response:
        """Whether the server runs."""
        return _json({"live": True})

    @routes.get("/health/ready", responses=answers.answers(answers.Ready, 503))
    async def ready() -> Response:
        """Whether the promoted model can be asked."""
        if not service.is_ready:
            raise Refusal(503, "Not ready", "no model is promoted and loaded yet", 1.0)
        return _json({"ready": True})

    @routes.post(
        "/repository/index",
        responses=answers.answers(list[answers.IndexEntry], 400, 401, 408, 413, 415, 503),
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": _INDEX}}}},
    )
    async def index(request: Request) -> Response:
        """The models that there are."""
        async with body_of(request, _INDEX_BODY, service.memory) as body:
            only_ready = _index_request(body).ready
        entries = [_entry(model) for model in await service.models.listed()]
        return _json([each for each in entries if not only_ready or each["state"] == "READY"])

    _of_a_model(routes, service, "/models/{model}", [])
    _of_a_model(routes, service, "/models/{model}/versions/{version}", [Depends(_only_version)])
    return routes


def _of_a_model(
    routes: fastapi.APIRouter, service: Service, path: str, dependencies: list[Any]
) -> None:
    """The routes of a model, at one of its two paths."""

    @routes.get(
        path,
        responses=answers.answers(answers.ModelMetadata, *_OF_A_MODEL),
        dependencies=dependencies,
    )
    async def metadata(model: str, request: Request) -> Response:
        """Inputs and outputs of a model."""
        found = await service.model(model, request.state.deadline)
        return _json(model_metadata(*_form(found)), found)

    @routes.get(
        f"{path}/config",
        responses=answers.answers(answers.ModelConfig, *_OF_A_MODEL),
        dependencies=dependencies,
    )
    async def config(model: str, request: Request) -> Response:
        """The same as Triton's configuration of a model."""
        found = await service.model(model, request.state.deadline)
        return _json(model_config(*_form(found)), found)

    @routes.get(
        f"{path}/ready",
        responses=answers.answers(answers.ModelReady, *_OF_A_MODEL),
        dependencies=dependencies,
    )
    async def model_ready(model: str, request: Request) -> Response:
        """Whether a model can be asked; it is loaded if need be."""
        found = await service.model(model, request.state.deadline)
        return _json({"name": found.id, "ready": True}, found)

    @routes.post(
        f"{path}/infer",
        responses=answers.answers(answers.InferResponse, *_OF_A_MODEL, 408, 413, 415, binary=True),
        dependencies=dependencies,
        openapi_extra=answers.infer_documentation(),
    )
    async def infer(model: str, request: Request) -> Response:
        """Draws from the posterior of each observation."""
        return await _infer(service, await service.model(model, request.state.deadline), request)


async def _infer(service: Service, model: Model, request: Request) -> Response:
    limit = int(service.options.max_body_mb * 1e6)
    async with body_of(request, limit, service.memory) as body:
        asked = await _in_turn(len(body), read_request, body, request.headers)
    asked.require_shape(model.posterior.x_shape)
    question = _question(service, model, asked)
    deadline = request.state.deadline
    if asked.timeout_s is not None:
        deadline = min(deadline, time.monotonic() + asked.timeout_s)
    # Draws as they are made, put together, and as bytes; JSON is three times as long.
    size = service.bytes_of(model, question)
    give_back = service.memory.take((3 if all(asked.outputs.values()) else 5) * size)
    try:
        block = await while_there(request, service.block(model, question, deadline))
        body, headers = await _in_turn(size, write_response, asked, model.id, _columns(block))
        coding = wanted(request.headers.get("accept-encoding"))
        if coding is not None:
            body = await _in_turn(size, compress, body, coding)
            headers["Content-Encoding"] = coding
    finally:
        give_back()
    headers |= {"Vary": "Accept-Encoding", "X-SBI-Model": model.id}
    return Response(body, headers=headers)


def _question(service: Service, model: Model, asked: InferRequest) -> Question:
    check_count(len(asked.x), service.limits)
    check_draws(len(asked.x), asked.num_samples, service.limits, "num_samples is", "draws")
    ids = identifiers(None, 0, len(asked.x))
    rows = Rows.of_arrays(ids, asked.x, model.posterior.x_shape, asked.null)
    return Question("sample", rows, asked.num_samples, asked.seed, asked.with_log_prob)


def _columns(block: Block) -> dict[str, np.ndarray]:
    """The outputs; an observation that has no posterior has no draw that is finite."""
    status = block.rows.status
    columns = dict(block.columns)
    if (status != OK).any():
        for name in columns.keys() & {"draws", "log_prob"}:
            columns[name] = columns[name].copy()
            columns[name][status != OK] = np.nan
    return columns | {"status": np.array(STATUSES)[status]}


async def _in_turn(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do the work; in a thread if it is on many bytes."""
    if size < _MUCH:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


async def _only_version(version: Annotated[str, Path(description=f"{VERSION}, always")]) -> None:
    if version != VERSION:
        raise Refusal(
            404,
            "No such version",
            f"there is no version {version[:40]!r}; each model has only version {VERSION!r}",
        )


# ---- the index ----------------------------------------------------------------------------------


class _IndexRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    ready: bool = False


_INDEX = _IndexRequest.model_json_schema()


def _index_request(body: bytes) -> _IndexRequest:
    try:
        return _IndexRequest.model_validate_json(body or b"{}")
    except ValidationError:
        raise malformed('the body is not {"ready": true or false}; it may be empty') from None


def _entry(model: dict[str, Any]) -> dict[str, str]:
    reason = model["refused"] or ""
    state = "UNAVAILABLE" if reason else "READY"
    return {"name": model["model"], "version": VERSION, "state": state, "reason": reason}


def _form(model: Model) -> tuple[str, list[int], list[str]]:
    return model.id, list(model.posterior.x_shape), list(model.posterior.parameter_names)


def _json(content: Any, model: Model | None = None) -> Response:
    headers = None if model is None else {"X-SBI-Model": model.id}
    return Response(orjson.dumps(content), media_type="application/json", headers=headers)
