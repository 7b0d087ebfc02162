"""Whether requests are answered, and whether that can still come about: two questions, with two paths."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pyrosome.server.routes import service_of
from pyrosome.server.service import FAILED, READY

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Yes."},
    503: {"description": "No; `status` says what the server is doing, and `reason` why it has failed."},
}


def router() -> APIRouter:
    """The routes of health."""
    routes = APIRouter(tags=["server"])
    for path, route, summary in (
        ("/health", _ready, "Ready to answer?"),
        ("/health/live", _alive, "Alive, ready or not?"),
    ):
        routes.add_api_route(path, route, methods=["GET"], summary=summary, responses=_ANSWERS)
    return routes


async def _ready(request: Request) -> Response:
    """200 once requests are answered; 503 while the model is loaded, while the server closes, or when it failed."""
    body = _told(request)
    return JSONResponse(body, 200 if body["ready"] else 503)


async def _alive(request: Request) -> Response:
    """503 only where it will never answer again, so that whoever watches it may start it anew."""
    body = _told(request)
    return JSONResponse(body, 200 if body["alive"] else 503)


def _told(request: Request) -> dict[str, object]:
    service = service_of(request)
    state = service.state
    body = {"status": state, "ready": state == READY, "alive": state != FAILED, "model": service.card.name}
    return body | ({"reason": service.reason} if state == FAILED else {})
