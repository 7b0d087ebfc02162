"""What the routes of accounts and of the administration share."""

from __future__ import annotations

import asyncio
import http
import itertools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from sqlalchemy import Connection
from starlette.responses import JSONResponse, Response, StreamingResponse

from pyrosome.server.bodies import read_json
from pyrosome.server.keys import usage, views
from pyrosome.server.keys.door import KeyDoor
from pyrosome.server.keys.usage import Slice
from pyrosome.server.openapi import described
from pyrosome.server.problems import Refused
from pyrosome.server.routes import service_of

T = TypeVar("T")

MAX_BODY_BYTES = 64 << 10
PRIVATE = {"Cache-Control": "no-store"}  # secrets and usage are kept by nobody on the way
READ_STATUSES = (400, 401, 403, 404, 500, 503)
WRITE_STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 500, 503)
USAGE_QUERY = {
    "from": "First day of UTC, like 2030-01-31; without it, the first of this month.",
    "to": "Last day; without it, today.",
    "by": f"Some of {', '.join(usage.BY)}, with commas between them; without it, day.",
}


def keys_of(request: Request) -> KeyDoor:
    """The door with keys.

    Raises:
        Refused: 404, this server has none.
    """
    door = service_of(request).door
    if not isinstance(door, KeyDoor):
        raise Refused(404, "this server runs without keys and accounts (--keys off)")
    return door


async def fields_of(request: Request, *names: str) -> dict[str, Any]:
    """The body's fields.

    Raises:
        Refused, RequestError: there is another, or it is no JSON object.
    """
    body = await read_json(request, MAX_BODY_BYTES, service_of(request).options.body_s)
    views.known_fields(body, *names)
    return body


async def reading(request: Request, ask: Callable[[Connection], T]) -> T:
    """What the store says."""
    return await keys_of(request).store.reading(ask)


async def writing(request: Request, change: Callable[[Connection], T]) -> T:
    """Change something; from then on this process knows nothing older."""
    door = keys_of(request)
    try:
        return await door.store.writing(change)
    finally:
        door.forget()


def told(body: Any, status: int = 200) -> Response:
    """An answer that is kept by nobody."""
    return JSONResponse(body, status, PRIVATE)


async def usage_told(request: Request, part: Callable[[Connection, str, str], Slice]) -> Response:
    """Sums of a part of the ledger, as the query asks."""
    first, last = views.days_in(request.query_params, keys_of(request).wall())
    by = [n.strip() for n in request.query_params.get("by", "day").split(",") if n.strip()]
    rows = await reading(request, lambda connection: usage.sums(connection, part(connection, first, last), by))
    return told(views.usage_view(rows, first, last, by))


async def lines_told(request: Request, part: Callable[[Connection, str, str], Slice]) -> Response:
    """The lines of a part of the ledger as CSV, sent as they are read."""
    store = keys_of(request).store
    first, last = views.days_in(request.query_params, keys_of(request).wall())
    asked = await reading(request, lambda connection: part(connection, first, last))
    pages = usage.csv_text(store, asked)
    begun = await asyncio.to_thread(next, pages)  # what is wrong with it is told while that is still possible
    headers = {**PRIVATE, "Content-Disposition": f'attachment; filename="usage-{first}-{last}.csv"'}
    return StreamingResponse(itertools.chain([begun], pages), media_type="text/csv", headers=headers)


def add(
    routes: APIRouter,
    method: str,
    path: str,
    route: Callable[..., Any],
    summary: str,
    *,
    body: dict[str, Any] | None = None,
    query: dict[str, str] | None = None,
    status: int = 200,
    media: str = "application/json",
) -> None:
    """A route with its place in the OpenAPI document.

    Args:
        query: parameters of the query, and what they mean.
        media: the type of its answer.
    """
    about = described(body or {}, statuses=WRITE_STATUSES if method != "GET" else READ_STATUSES)
    schema = {"type": "object"} if media == "application/json" else {"type": "string"}
    about["responses"].pop(200)
    about["responses"][status] = {
        "description": http.HTTPStatus(status).phrase.lower(), "content": {media: {"schema": schema}},
    }  # fmt: skip
    text = {"type": "string"}
    parameters = [
        {"name": n, "in": "query", "required": False, "description": d, "schema": text}
        for n, d in (query or {}).items()
    ] + [{"name": n, "in": "path", "required": True, "schema": text} for n in re.findall(r"{(\w+)}", path)]
    if parameters:
        about.setdefault("openapi_extra", {})["parameters"] = parameters
    routes.add_api_route(path, route, methods=[method], summary=summary, status_code=status, **about)
