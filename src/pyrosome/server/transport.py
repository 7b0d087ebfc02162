"""What holds for every request, whatever it asks for: who may send it from where, its path, its id, its head's safety.

Without keys a server trusts whoever can reach it, and a browser on this machine can: so requests under a name that is
not the server's (which a foreign page can make the browser resolve to this machine) and those that pages of other sites
send are refused while no key is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import re
import socket
import urllib.parse
from collections.abc import Iterable

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyrosome.options import ServerOptions
from pyrosome.server import arrival, explain
from pyrosome.server.arrival import Arrival
from pyrosome.server.problems import Problem, Refused, problem_of, shape_of
from pyrosome.server.service import DRAINING, Service

log = logging.getLogger(__name__)

SAFE = ("GET", "HEAD", "OPTIONS")  # they change nothing, and a foreign page cannot read what they give
DRAINED_BYTES, DRAINED_S = 1 << 20, 1.0  # of a body that nobody asked for, before its request is answered
HELD_BODIES = 4  # so many of the largest bodies may be held at once, in bytes
# For answers that do not say otherwise: what is not a page is shown as none, and kept by nobody.
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")


def install(app: FastAPI, service: Service) -> None:
    """Put it around an app."""
    app.add_middleware(Transport, service=service)
    if service.options.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.options.cors, allow_methods=METHODS, allow_headers=["*"],
            expose_headers=["*"], allow_private_network=True,
        )  # fmt: skip


class Transport:
    """The app's outside; whatever goes wrong inside is answered here."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._names = _own_names(service.options)
        self._held_bytes, self._most_bytes = 0, HELD_BODIES * service.options.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._service.new_id("req-")
        body = _Held(self, receive, Headers(scope=scope))
        reply = _Headed(send, request_id, body, is_last=self._service.state == DRAINING)
        # A route that writes a body to disk as it comes calls `let_go` for what it holds no more.
        scope.setdefault("state", {}).update(request_id=request_id, let_go=body.let_go)
        mark = arrival.current.set(Arrival(request_id, receive=body.receive))
        try:
            deadline_s = self._judge(scope)
            explains = explain.is_asked(Headers(scope=scope))
            here = dataclasses.replace(arrival.of_this_request(), deadline_s=deadline_s, explains=explains)
            arrival.current.set(here)
            await self._app(scope, body.receive, reply.send)
        except Exception as error:
            problem = problem_of(error, request_id)
            if reply.has_begun:
                return  # with the answer not complete the connection is closed, which tells the client
            await refusal(self._service, scope["path"], problem)(scope, receive, reply.send)
        finally:
            arrival.current.reset(mark)
            body.let_go()

    def hold(self, num_bytes: int) -> None:
        """Count bytes of bodies that are held.

        Raises:
            Refused: 503, they are too many.
        """
        self._held_bytes += num_bytes
        if num_bytes > 0 and self._held_bytes > self._most_bytes:
            raise Refused(
                503,
                f"the bodies of all requests have more than the {self._most_bytes:,} bytes that are held at once; try "
                "again in a moment",
                headers={"Retry-After": "2"},
            )

    def _judge(self, scope: Scope) -> float:
        """Bring the path in its plain form, and see whether the request may come in; returns its deadline.

        Raises:
            Refused: 400, 403, 415 or 421.
        """
        _make_plain(scope)
        headers = Headers(scope=scope)
        if not self._service.door.is_needed:
            _check_host(headers, self._names)
            if scope["method"] not in SAFE:
                _check_origin(headers, self._service.options.cors)
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise Refused(415, f"the body is encoded as {coding[:40]}; send it as it is")
        asked = headers.get("x-request-deadline")
        return arrival.deadline_in(asked) if asked else 0.0


def refusal(service: Service, path: str, problem: Problem) -> JSONResponse:
    """The answer to what went wrong, in the words of whoever asked; watchers are told."""
    for watcher in service.watchers:
        watcher.refused(path, problem)
    return JSONResponse(problem.body(shape_of(path)), problem.status, dict(problem.headers))


class _Headed:
    """Adds to each answer's head what all have."""

    def __init__(self, send: Send, request_id: str, body: _Held, *, is_last: bool) -> None:
        self._send, self._id, self._body, self._is_last, self.has_begun = send, request_id, body, is_last, False

    async def send(self, message: Message) -> None:
        """As ASGI has it."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            await self._body.drain()
            headers = MutableHeaders(scope=message)
            for name, value in {"x-request-id": self._id, **HEADERS}.items():
                headers.setdefault(name, value)
            if self._is_last:
                headers["connection"] = "close"
        await self._send(message)


class _Held:
    """Counts a body's bytes for as long as its request is answered."""

    def __init__(self, transport: Transport, receive: Receive, headers: Headers) -> None:
        self._transport, self._receive, self._bytes = transport, receive, 0
        self._is_whole = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        """As ASGI has it."""
        message = await self._receive()
        self._is_whole = self._is_whole or not message.get("more_body")
        if message["type"] == "http.request" and (size := len(message.get("body", b""))):
            self._bytes += size
            self._transport.hold(size)
        return message

    async def drain(self) -> None:
        """Take what is left of a body: a client that is answered before it has sent it loses its connection."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAINED_S):
                while not self._is_whole and size < DRAINED_BYTES:
                    message = await self._receive()
                    self._is_whole = not message.get("more_body")
                    size += len(message.get("body", b""))

    def let_go(self) -> None:
        """Those that came so far are held no more."""
        self._transport.hold(-self._bytes)
        self._bytes = 0


def _make_plain(scope: Scope) -> None:
    """Leave empty segments out of the path.

    Raises:
        Refused: 400, it has segments that go elsewhere, or characters that no path of this server has.
    """
    path: str = scope["path"]
    segments = path.split("/")
    if _FORBIDDEN.search(path) or "." in segments or ".." in segments:
        raise Refused(400, "the path has a segment `.` or `..`, a backslash or a control character; write it plainly")
    plain = "/" + "/".join(s for s in segments if s)
    if plain != path:
        scope["path"], scope["raw_path"] = plain, urllib.parse.quote(plain).encode()


def _own_names(options: ServerOptions) -> frozenset[str]:
    return frozenset(n.lower() for n in (options.host, socket.gethostname(), *options.hosts))


def _check_host(headers: Headers, own: Iterable[str]) -> None:
    host = headers.get("host", "")
    name = (urllib.parse.urlsplit(f"//{host}").hostname or "") if _is_plausible(host) else host
    name = name.rstrip(".")
    # A number cannot be made to mean another machine than it does; a name can.
    if not host or name == "localhost" or name.endswith(".localhost") or name in own or _is_address(name):
        return
    raise Refused(
        421,
        f"this server needs no key, and so answers to its own names alone, which {name[:80]!r} is not; use "
        f"http://127.0.0.1, or start it with --allow-host {name[:80]}, or with --keys required",
    )


def _check_origin(headers: Headers, allowed: Iterable[str]) -> None:
    own = headers.get("host", "").lower()
    for origin in headers.getlist("origin"):
        is_own = origin.lower().partition("://")[2] == own and own
        if not is_own and origin not in allowed and "*" not in allowed:
            raise Refused(
                403,
                f"a page of {origin[:80]} sent this, and this server needs no key, so that pages of other sites may "
                f"not use it; start it with --cors {origin[:80]} if this one may",
            )
    if "origin" not in headers and headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
        raise Refused(403, "a page of another site sent this; this server needs no key, so that such pages may not")


def _is_plausible(host: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9.\-_]*(?::\d{1,5})?|\[[0-9A-Fa-f:.]+\](?::\d{1,5})?", host) is not None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
