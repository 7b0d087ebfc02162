"""The HTTP application: routes, errors in each protocol's words, and the service's life."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pyrosome import __version__
from pyrosome.errors import PyrosomeError
from pyrosome.server import (
    access_log,
    anthropic,
    health,
    metrics_routes,
    models,
    openai_chat,
    openai_text,
    page,
    responses,
    sessions,
    transport,
)
from pyrosome.server.keys import routes as keys_routes
from pyrosome.server.problems import Problem, Refused, problem_of
from pyrosome.server.service import Service

log = logging.getLogger(__name__)

ROUTERS = (
    openai_chat.router,
    openai_text.router,
    anthropic.router,
    responses.router,
    sessions.router,
    models.router,
    health.router,
    page.router,
    keys_routes.router,
)


def make_app(service: Service) -> FastAPI:
    """The application of a service; loading begins with its lifespan, and it answers 503 until that is done."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service))
        try:
            yield
        finally:
            await service.drain()
            loading.cancel()
            await service.close()

    app = FastAPI(title="pyrosome", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False  # a path is brought in its plain form before it is looked for
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router())
    metrics_routes.install(app, service)
    transport.install(app, service)
    access_log.install(app, service)
    app.add_exception_handler(PyrosomeError, _problem)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _problem)
    return app


async def _load(service: Service) -> None:
    try:
        await service.start()
    except Exception as error:
        known = isinstance(error, PyrosomeError)
        log.error("the model could not be loaded: %s", error, exc_info=None if known else error)


async def _problem(request: Request, error: Exception) -> Response:
    return _answer(request, problem_of(error, request.state.request_id))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    message = text.get(error.status_code, str(error.detail))
    return _answer(request, problem_of(Refused(error.status_code, message, headers=error.headers)))


def _answer(request: Request, problem: Problem) -> Response:
    return transport.refusal(request.app.state.service, request.url.path, problem)
