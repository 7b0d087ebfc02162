"""The page at `/`: chat in a browser, from a fixed list of files of this package and nothing from anywhere else."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pyrosome import __version__
from pyrosome.server.routes import service_of

FOLDER = Path(__file__).parent / "ui"
PAGE = "index.html"
_SCRIPT, _STYLE, _IMAGE = "text/javascript; charset=utf-8", "text/css; charset=utf-8", "image/svg+xml"
# A file that is not named here is not served, so no path of a request is ever looked for on disk.
FILES = {
    "page.css": _STYLE,
    "message.css": _STYLE,
    "mark.svg": _IMAGE,
    "api.js": _SCRIPT,
    "composer.js": _SCRIPT,
    "conversation.js": _SCRIPT,
    "dialogs.js": _SCRIPT,
    "dom.js": _SCRIPT,
    "files.js": _SCRIPT,
    "main.js": _SCRIPT,
    "markdown.js": _SCRIPT,
    "message.js": _SCRIPT,
    "meter.js": _SCRIPT,
    "sidebar.js": _SCRIPT,
    "store.js": _SCRIPT,
    "tools.js": _SCRIPT,
    "transfer.js": _SCRIPT,
    "turn.js": _SCRIPT,
    "words.js": _SCRIPT,
    "vendor/markdown-it.mjs": _SCRIPT,
}

# Whatever an answer holds, the browser runs no script but these files, loads nothing from elsewhere and sends nothing
# there.  `trusted-types 'none'`: not even these files can turn text into markup.
HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self'",
            "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
            "require-trusted-types-for 'script'", "trusted-types 'none'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",  # asked for again each time, and answered 304: a page never mixes two versions
}  # fmt: skip


def router() -> APIRouter:
    """The page and its files.  They hold nothing secret, so no key is asked for; what they call asks for one."""
    routes = APIRouter(include_in_schema=False)
    routes.add_api_route("/", _page, methods=["GET", "HEAD"])
    for name, kind in FILES.items():
        routes.add_api_route(f"/ui/{name}", file_sender(name, kind), methods=["GET", "HEAD"])
    return routes


async def _page(request: Request) -> Response:
    """The page for browsers; for whoever does not ask for HTML, where to go."""
    if "text/html" in request.headers.get("accept", ""):
        answer = file_answer(request, PAGE, "text/html; charset=utf-8")
    else:
        card = service_of(request).card
        answer = JSONResponse(
            {
                "name": "pyrosome",
                "version": __version__,
                "model": card.name,
                "page": "open this address in a browser to talk to the model",
                "openai_base_url": "/v1",
                "anthropic_base_url": "/anthropic",
                "health": "/health",
                "openapi": "/openapi.json",
            }
        )
    answer.headers["Vary"] = "Accept"
    return answer


def file_sender(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """A route that answers with a file of the folder."""

    async def send(request: Request) -> Response:
        return file_answer(request, name, kind)

    return send


def file_answer(request: Request, name: str, kind: str) -> Response:
    """A file of the folder, or word that it is still the one the browser has."""
    body, tag = _file(name)
    headers = {**HEADERS, "ETag": tag}
    known = [t.strip().removeprefix("W/") for t in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)


@functools.cache
def _file(name: str) -> tuple[bytes, str]:
    """A file's bytes and its tag, read once."""
    body = (FOLDER / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
