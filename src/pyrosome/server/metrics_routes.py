"""What a watcher of servers asks: `/metrics`, and the small routes that vLLM has beside it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.responses import JSONResponse, Response

from pyrosome import __version__
from pyrosome.server.caller import METRICS
from pyrosome.server.metrics import Metrics
from pyrosome.server.openapi import described
from pyrosome.server.routes import caller_of, service_of
from pyrosome.server.service import READY, Service

WAIT_S = 1.0  # for the engine's newest numbers; a step may take longer, and then the last ones are told

METRICS_KINDS = ("text/plain", "application/openmetrics-text")

# Where keys, certificates and files are, and what the database's URL holds, is nobody's business.
_TOLD = (
    "names", "any_name", "compat", "thinking", "effort", "reasoning_field", "max_queue", "max_body_bytes",
    "max_header_bytes", "header_s", "body_s", "write_s", "keep_alive_s", "deadline_s", "drain_s", "keys", "sign_up",
)  # fmt: skip
_TOLD_OF_ENGINE = (
    "max_sequences", "max_context", "cache_bytes", "snapshot_bytes", "host_bytes", "disk_bytes", "step_tokens",
    "drafter", "max_drafts", "self_check",
)  # fmt: skip


def install(app: FastAPI, service: Service) -> None:
    """Watch a service, and serve what was seen."""
    app.state.metrics = Metrics(service)
    service.watchers.append(app.state.metrics)
    app.include_router(router())


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["server"])
    for path, route, summary in (
        ("/metrics", _metrics, "Metrics, for Prometheus"),
        ("/load", _load, "How many requests are inside"),
        ("/server_info", _server_info, "How the server is set up"),
        ("/version", _version, "This program's version"),
        ("/ping", _ping, "Ready to answer?"),
    ):
        kinds = METRICS_KINDS if path == "/metrics" else ("application/json",)
        about = described({}, statuses=(400, 401, 403, 500, 503), kinds=kinds)
        routes.add_api_route(path, route, methods=["GET"], summary=summary, **about)
    routes.add_api_route("/ping", _ping, methods=["POST"], include_in_schema=False)  # as SageMaker's probes do
    return routes


def encoding_for(accept: str) -> tuple[Callable[[Metrics], bytes], str]:
    """What writes metrics in the format that comes first in an `Accept` header, and its content type."""
    for accepted in accept.split(","):
        kind = accepted.partition(";")[0].strip().lower()
        if kind == "application/openmetrics-text":
            # Every name here is one in the old sense too: to escape none keeps the colon, which the default takes out.
            encode = functools.partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8)
            return encode, openmetrics.CONTENT_TYPE_LATEST
        if kind == "text/plain":
            break
    return exposition.generate_latest, exposition.CONTENT_TYPE_PLAIN_0_0_4


async def _metrics(request: Request) -> Response:
    """In Prometheus' text format, or OpenMetrics where `Accept` asks for it; needs the scope `metrics`."""
    await caller_of(request, METRICS)
    metrics: Metrics = request.app.state.metrics
    await metrics.engine.refresh(WAIT_S)
    encode, content_type = encoding_for(",".join(request.headers.getlist("accept")))
    # In a thread: to write hundreds of values takes longer than a token should wait.
    return Response(await asyncio.to_thread(encode, metrics), headers={"content-type": content_type})


async def _load(request: Request) -> Response:
    """Requests that are being answered or wait; needs the scope `metrics`."""
    await caller_of(request, METRICS)
    gate = service_of(request).gate
    return JSONResponse({"server_load": gate.num_inside, "places": gate.num_places, "queue": gate.max_queue})


async def _version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _ping(request: Request) -> Response:
    """200 once requests are answered, 503 before and after."""
    state = service_of(request).state
    return JSONResponse({"status": state}, 200 if state == READY else 503)


async def _server_info(request: Request) -> Response:
    """Options that are no secret, and what the engine says of itself; needs the scope `metrics`."""
    await caller_of(request, METRICS)
    service, metrics = service_of(request), request.app.state.metrics
    await metrics.engine.refresh(WAIT_S)
    card = service.card
    model = {name: getattr(card, name) for name in ("name", "names", "context_tokens", "vocab_size", "dialect", "mode")}
    return JSONResponse(
        {
            "version": __version__,
            "state": service.state,
            "model": {**model, "fingerprint": card.fingerprint},
            "server": _some(service.options, _TOLD),
            "engine": {**_some(service.engine_options, _TOLD_OF_ENGINE), **metrics.engine.about},
        }
    )


def _some(options: object, names: tuple[str, ...]) -> dict[str, object]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in names}  # type: ignore[arg-type]
