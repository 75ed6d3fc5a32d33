"""The HTTP interface: routes, their documentation, and the page. No Ray.

Answers of one block are sent whole. Larger ones are streamed as they are made, no faster than
their reader takes them; one that fails in its midst breaks off, so that it is never taken for a
whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fastapi
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from sbi_dist.serving.answer import ArrowAnswer, Block, JsonAnswer
from sbi_dist.serving.body import body_of
from sbi_dist.serving.documentation import answers, body_schema, query_parameters
from sbi_dist.serving.gate import Gate, problem
from sbi_dist.serving.models import Model
from sbi_dist.serving.open_inference.routes import router as open_inference
from sbi_dist.serving.presence import while_there
from sbi_dist.serving.question import ARROW, Question, from_arrow, from_json
from sbi_dist.serving.refusal import Refusal
from sbi_dist.serving.service import Service

__all__ = ["make_app"]

_PAGE = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TITLES = {404: "Not found", 405: "Method not allowed"}


def make_app(service: Service, manages: bool = True) -> FastAPI:
    """The application; asked through its ``/docs`` what it offers.

    Args:
        service: what answers.
        manages: whether the application starts and ends the service; on Ray Serve a replica does.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if manages:
            await service.start()
        try:
            yield
        finally:
            if manages:
                await service.close()

    app = FastAPI(
        title="sbi_dist posteriors",
        version=importlib.metadata.version("sbi_dist"),
        description="Posterior draws, summaries and densities for batches of observations.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.add_middleware(Gate, service=service, names=manages)
    app.include_router(_page())
    app.include_router(_models(service))
    app.include_router(open_inference(service))

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        body, headers = problem(refusal, request.state.request_id)
        return Response(body, refusal.status, dict(headers))

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        title = _TITLES.get(error.status_code, "Refused")
        refusal = Refusal(error.status_code, title, f"{request.method} {request.url.path[:200]}: "
                          f"{error.detail}; see /docs for what there is")  # fmt: skip
        body, headers = problem(refusal, request.state.request_id)
        return Response(body, error.status_code, {**dict(headers), **(error.headers or {})})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        refusal = Refusal(422, "Invalid request", f"{field}: {first['msg']}")
        return await refused(request, refusal)

    return app


def _page() -> fastapi.APIRouter:
    router = fastapi.APIRouter(include_in_schema=False)
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    files = {path.name: path for path in _PAGE.iterdir() if path.is_file()}

    @router.get("/")
    async def page() -> Response:
        return FileResponse(files["index.html"], headers=headers)

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise Refusal(404, "Not found", "the page has no such file")
        return FileResponse(files[name], headers=headers)

    return router


def _models(service: Service) -> fastapi.APIRouter:
    router = fastapi.APIRouter(prefix="/v1/models", tags=["posteriors"])

    @router.get("", responses=answers(401, 503))
    async def models() -> Response:
        """The models that there are, and which one is promoted."""
        promoted = service.models.promoted
        content = {
            "promoted": None if promoted is None else promoted.id,
            "models": await service.models.listed(),
        }
        return _json(content)

    @router.get("/{model}", responses=answers(400, 401, 404, 409, 503, 504))
    async def about(model: str, request: Request) -> Response:
        """What a model is of: parameters, prior, training, calibration, and the limits."""
        found = await service.model(model, request.state.deadline)
        return _json(_about(service, found), {"X-SBI-Model": found.id})

    def ask(operation: Any, summary: str) -> None:
        @router.post(
            f"/{{model}}/{operation}",
            name=operation,
            summary=summary,
            responses=answers(400, 401, 404, 408, 409, 413, 415, 422, 503, 504, arrow=True),
            openapi_extra={
                "requestBody": body_schema(operation),
                "parameters": query_parameters(operation),
            },
        )
        async def asked(model: str, request: Request) -> Response:
            return await _asked(service, operation, model, request)

    ask("sample", "Draws from the posterior of each observation")
    ask("summary", "Mean, sd, covariance, quantiles and interval of each posterior")
    ask("log_prob", "Densities of parameters under each posterior")
    return router


async def _asked(service: Service, operation: Any, name: str, request: Request) -> Response:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    kind = kind.lower()
    if kind not in ("application/json", ARROW):
        raise Refusal(
            415,
            "Unsupported media type",
            f"Content-Type is {kind[:80]!r}; send application/json or {ARROW}",
        )
    deadline = request.state.deadline
    model = await service.model(name, deadline)
    size = model.posterior.estimator.num_parameters
    limit = int(service.options.max_body_mb * 1e6)
    async with body_of(request, limit, service.memory) as body:
        if kind == ARROW:
            query = dict(request.query_params)
            given = (operation, body, query, model.posterior.x_shape, size, service.limits)
            question = await _in_turn(from_arrow, len(body), *given)
        else:
            given_json = (operation, body, model.posterior.x_shape, size, service.limits)
            question = await _in_turn(from_json, len(body), *given_json)
    about = _head(model, question)
    answer: ArrowAnswer | JsonAnswer
    if _wants_arrow(request):
        answer = ArrowAnswer(about, question, size)
    else:
        answer = JsonAnswer(about, question, size)
    headers = {"X-SBI-Model": model.id}
    if service.is_small(question):
        give_back = service.memory.take(3 * service.bytes_of(model, question))
        try:
            block = await while_there(request, service.block(model, question, deadline))
            content = answer.start() + answer.block(block) + answer.end()
        finally:
            give_back()
        return Response(content, media_type=answer.media_type, headers=headers)
    # The first block before the head of the answer: whatever is refused is refused by then.
    blocks = service.blocks(model, question, deadline)
    first = await while_there(request, anext(blocks))
    return _Stream(_streamed(answer, first, blocks), media_type=answer.media_type, headers=headers)


class _Stream(StreamingResponse):
    """One that ends what makes it at once, however it ends: others wait for its turns."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


async def _streamed(
    answer: ArrowAnswer | JsonAnswer, first: Block, blocks: AsyncIterator[Block]
) -> AsyncIterator[bytes]:
    try:
        yield answer.start() + answer.block(first)
        async for block in blocks:
            yield answer.block(block)
        yield answer.end()
    finally:
        await blocks.aclose()  # type: ignore[attr-defined]


async def _in_turn(parse: Any, size: int, *given: Any) -> Question:
    """Parse; what takes long in a thread, so that others are answered meanwhile."""
    if size < 64 * 1024:
        return parse(*given)
    return await asyncio.get_running_loop().run_in_executor(None, parse, *given)


def _wants_arrow(request: Request) -> bool:
    return ARROW in request.headers.get("accept", "").lower()


def _head(model: Model, question: Question) -> dict[str, Any]:
    about: dict[str, Any] = {
        "model": model.id,
        "parameter_names": model.posterior.parameter_names,
        "num_samples": question.num_samples,
    }
    if question.operation != "log_prob":
        about["seed"] = question.seed
    if question.summarized is not None:
        about["quantiles"] = list(question.summarized.quantiles)
        about["hdi"] = question.summarized.hdi
    return about


def _about(service: Service, model: Model) -> dict[str, Any]:
    about, options, promoted = model.about, service.options, service.models.promoted
    posterior = model.posterior
    dataset = about.get("dataset")
    if isinstance(dataset, dict):
        dataset = {name: value for name, value in dataset.items() if name != "shards"}
    return {
        "model": model.id,
        "promoted": promoted is not None and promoted.id == model.id,
        "experiment": about.get("experiment", service.experiment),
        "parameter_names": posterior.parameter_names,
        "parameter_units": about.get("parameter_units") or [],
        "x_shape": list(posterior.x_shape),
        "num_parameters": posterior.estimator.num_parameters,
        "prior": about.get("prior"),
        "created": about.get("created"),
        "estimator": about.get("estimator"),
        "dataset": dataset,
        "training": about.get("training"),
        "calibration": {"verdict": model.verdict, "summary": model.verdict_summary},
        "how": posterior.sampler.how,
        "limits": {
            "max_observations": options.max_observations,
            "max_draws": options.max_draws,
            "max_total_draws": options.max_total_draws,
            "max_body_mb": options.max_body_mb,
        },
    }


def _json(content: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(content, default=str), media_type="application/json", headers=headers
    )
