"""What the interface's OpenAPI document says of bodies, parameters and answers.

Bodies are read and checked by hand, within bounds, so that their description is written here from
the same models that check them.
"""

from __future__ import annotations

from typing import Any

from sbi_dist.serving.question import ARROW, BODIES

__all__ = ["answers", "body_schema", "query_parameters"]

_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "request_id": {"type": "string"},
    },
}
_MEANING = {
    400: "The body or a header is malformed.",
    401: "A token is asked for, and none or a wrong one was sent.",
    404: "There is no such model.",
    408: "The body did not come before the request's time was up.",
    409: "The model is there, and not fit to be served.",
    413: "The request is too large.",
    415: "The content type or coding is another one.",
    422: "What is asked for can't be.",
    503: "Too much is to be done, or the store does not answer; try again after Retry-After.",
    504: "The request's time was up before its answer was computed.",
}


def answers(*statuses: int, arrow: bool = False) -> dict[int | str, dict[str, Any]]:
    """What may come: 200 and problems with the statuses given."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if arrow:
        content[ARROW] = {"schema": {"type": "string", "format": "binary"}}
    described: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer.", "content": content}
    }
    for status in statuses:
        described[status] = {
            "description": _MEANING[status],
            "content": {"application/problem+json": {"schema": _PROBLEM}},
        }
    return described


def body_schema(operation: str) -> dict[str, Any]:
    """The request body of an operation."""
    return {
        "required": True,
        "content": {
            "application/json": {"schema": BODIES[operation].model_json_schema()},
            ARROW: {"schema": {"type": "string", "format": "binary"}},
        },
    }


def query_parameters(operation: str) -> list[dict[str, Any]]:
    """What the query string may say where the body is an Arrow stream."""
    schema = BODIES[operation].model_json_schema()["properties"]
    named = ("num_samples", "seed", "with_log_prob", "quantiles", "hdi")
    parameters = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": "where the body is an Arrow stream",
            # Levels come with commas between them.
            "schema": {"type": "string"} if name == "quantiles" else schema[name],
        }
        for name in named
        if name in schema
    ]
    timeout = {"type": "number", "exclusiveMinimum": 0}
    parameters.append(
        {
            "name": "X-Timeout-S",
            "in": "header",
            "required": False,
            "description": "seconds that the caller waits at most",
            "schema": timeout,
        }
    )
    return parameters
