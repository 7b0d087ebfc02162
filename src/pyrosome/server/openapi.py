"""What a route takes and answers, for the OpenAPI document."""

from __future__ import annotations

import http
from typing import Any

from pyrosome.server.problems import ANTHROPIC, OPENAI

STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)

_TEXT = {"type": "string"}
_ERRORS: dict[str, dict[str, Any]] = {
    OPENAI: {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT, "type": _TEXT,
                    "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    ANTHROPIC: {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object", "required": ["type", "message"], "properties": {"type": _TEXT, "message": _TEXT},
            },
        },
    },
}  # fmt: skip


def described(
    schema: dict[str, Any], *, ok: dict[str, Any] | None = None, statuses: tuple[int, ...] = STATUSES,
    shape: str = OPENAI, kinds: tuple[str, ...] = ("application/json",),
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `add_api_route` that describe a route with a JSON body.

    Args:
        schema: JSON Schema of the body, without references; {}: the route takes no body.
        ok: JSON Schema of the answer; None: an object.  A generating route also streams, where it is asked to.
        statuses: of the errors it can answer with.
        shape: theirs, OpenAI's or Anthropic's.
        kinds: content types of the answer; only JSON has a schema.
    """
    is_json = "application/json"
    answer = {kind: {"schema": (ok or {"type": "object"}) if kind == is_json else _TEXT} for kind in kinds}
    if "stream" in schema.get("properties", {}):
        answer["text/event-stream"] = {"schema": {}}  # of text or of one event, as whoever reads the document takes it
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "the answer", "content": answer}}
    for status in statuses:
        error = {"application/json": {"schema": _ERRORS[shape]}}
        responses[status] = {"description": http.HTTPStatus(status).phrase.lower(), "content": error}
    found: dict[str, Any] = {"responses": responses}
    if schema:
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        found["openapi_extra"] = {"requestBody": body}
    return found
