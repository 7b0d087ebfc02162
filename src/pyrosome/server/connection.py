"""One client's connection: heads that are whole, small and unambiguous, and time limits in every state it can be in.

uvicorn's parser does the reading.  Around it, a head is collected first and looked at as a whole, so that a request is
either understood in one way or refused; a second request is read when the first is answered; and whoever sends or reads
nothing for too long is let go, so that what is slow costs no more than its own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pyrosome.server.problems import Problem

HEAD, IDLE, BUSY, LINGER = "head", "idle", "busy", "linger"  # reads a head; waits for one; works; is let go

_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n|$)")
_UPGRADE = re.compile(rb"(?im)^(?:upgrade|http2-settings):[^\r\n]*\r\n")
_UNSENT_BYTES = 64 << 10  # that the system holds for a client; more wait here, where it is seen that they wait


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take."""

    max_connections: int = 4096
    max_header_bytes: int = 64 << 10
    header_s: float = 20.0  # to send a request's head
    idle_s: float = 75.0  # between two requests
    write_s: float = 60.0  # to read something of what was sent
    linger_s: float = 5.0  # to read why it was refused, and to end what it is sending


class Connection(HttpToolsProtocol):
    """A client's connection.

    Args:
        limits: what it may take; the other arguments are uvicorn's.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self.state, self.since = HEAD, time.monotonic()
        self._head = bytearray()
        self._body_left: int | None = 0  # bytes of the body that are still to come; None: it tells its end itself
        self._is_reading_head = self._has_strayed = False
        self._refusal: Problem | None = None
        self._unread, self._unread_since = 0, 0.0
        self._look_s = max(0.01, min(1.0, limits.header_s / 4, limits.idle_s / 4, limits.write_s / 4))
        self._looking: asyncio.TimerHandle | None = None

    # What the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come; where there are too many, one that waits for nothing goes, or this one."""
        is_full = len(self.connections) >= self._limits.max_connections and not self._make_room()
        super().connection_made(transport)
        _bound_unsent(transport.get_extra_info("socket"), self._limits.write_s)
        self._looking = self.loop.call_later(self._look_s, self._look)
        if is_full:
            self._refuse(Problem(503, f"{self._limits.max_connections} connections are open, as many as are taken; "
                                      "try again in a moment", headers={"Retry-After": "1"}))  # fmt: skip

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by whichever side."""
        if self._looking:
            self._looking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of nothing that will be read."""
        if self.parser is None or self.transport.is_closing() or self._refusal or self._has_strayed:
            return
        if self.state in (BUSY, LINGER):
            self._read_body(data)
            return
        if self.state == IDLE:
            self._now(HEAD)
        start = max(0, len(self._head) - 3)
        self._head += data if self._head else data.lstrip(b"\r\n")
        end = self._head.find(b"\r\n\r\n", start)
        if (len(self._head) if end < 0 else end + 4) > self._limits.max_header_bytes:
            most = self._limits.max_header_bytes
            self._refuse(Problem(431, f"the request's head has more than the {most:,} bytes that are taken"))
        elif _BARE.search(self._head, start, len(self._head) if end < 0 else end + 4):
            self._refuse(Problem(400, "a line of the request's head does not end with CR LF"))
        elif end >= 0:
            head, rest = bytes(self._head[: end + 4]), bytes(self._head[end + 4 :])
            self._head.clear()
            self._read_head(head)
            if rest and not self._refusal:
                self._read_body(rest)

    def eof_received(self) -> None:
        """The client has closed its side: nobody is left to be answered, since a closed one sends the same."""

    # What the parser tells

    def on_message_begin(self) -> None:
        """A request begins; one that comes before the last one is answered is not read."""
        if self._is_reading_head:
            super().on_message_begin()
        else:
            self._has_strayed = True

    def on_url(self, url: bytes) -> None:
        """Part of the target."""
        if not self._has_strayed:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; what follows a body in its place is no part of the head that was judged."""
        if self._is_reading_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the head is refused."""
        if self._has_strayed:
            return
        self._refusal = _refusal(self.url, self.headers, self.parser.get_http_version())
        if not self._refusal:
            self._now(BUSY)
            self._body_left = _body_bytes(self.headers)
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        if not self._has_strayed and self.cycle:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete; where it was answered before that, the next one may come."""
        if self._has_strayed or not self.cycle:
            return
        super().on_message_complete()
        if self.state == LINGER:
            self._now(IDLE)

    def on_response_complete(self) -> None:
        """The answer is sent: wait for the next request, or let a client end what it is sending."""
        super().on_response_complete()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self.cycle.more_body:
            self._now(LINGER)
        elif self._has_strayed:
            self.transport.close()
        else:
            self._now(IDLE)

    # Helpers

    def _now(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()

    def _read_head(self, head: bytes) -> None:
        # An offer to change to HTTP/2 is passed over, as it may be; the parser would lose the body behind it.
        self._is_reading_head = True
        self._feed(_UPGRADE.sub(b"", head))
        self._is_reading_head = False
        if self.state == HEAD:
            self._refuse(self._refusal or Problem(400, "this is not understood as HTTP/1.1"))

    def _read_body(self, data: bytes) -> None:
        """A body, and what follows it: the next request, where the last is answered already."""
        left = len(data) if self._body_left is None else self._body_left
        body, rest = data[:left], data[left:].lstrip(b"\r\n")
        if self._body_left is not None:
            self._body_left -= len(body)
        if body:
            self._feed(body)
        if rest and self.state == IDLE:
            self.data_received(rest)
        elif rest:
            self._has_strayed = True
        if self._has_strayed and self.state == BUSY:
            self.cycle.keep_alive = False  # it ends with the answer
        elif self._has_strayed:
            self.transport.close()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._refusal:
                self._refuse(Problem(400, f"this is not understood as HTTP/1.1: {error}"))

    def _refuse(self, problem: Problem) -> None:
        """Say why, and let the client go; in the middle of another answer it goes without a word."""
        self._refusal = problem
        if self.cycle and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what was begun has no client any more
            self.cycle.message_event.set()
        body = json.dumps(problem.body("openai")).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in {**headers, **problem.headers}.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._now(LINGER)
        # What is still on its way here is read and dropped for a while: closed at once, the answer might be lost.
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _make_room(self) -> bool:
        """Let the one go that has waited longest and is not being answered; whether there was one."""
        waiting = [c for c in self.connections if isinstance(c, Connection) and c.state != BUSY]
        if waiting:
            min(waiting, key=lambda c: c.since).let_go()
        return bool(waiting)

    def let_go(self) -> None:
        """Close it at once, whatever is on its way."""
        self.connections.discard(self)
        if self.transport:
            self.transport.abort()

    def _look(self) -> None:
        """What has this client let pass?"""
        self._looking = self.loop.call_later(self._look_s, self._look)
        now, limits = time.monotonic(), self._limits
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self._unread or not self._unread:
            self._unread_since = now
        self._unread = unread
        waited = now - self.since
        has_left_unread = unread and now - self._unread_since > limits.write_s
        if has_left_unread or (self.state == LINGER and waited > limits.linger_s):
            self.transport.abort()
        elif self.state == HEAD and waited > limits.header_s:
            if not self._head:
                self.transport.close()
                self._now(LINGER)
            else:
                self._refuse(Problem(408, f"no complete head of a request came within {limits.header_s:g} s"))
        elif self.state == IDLE and waited > limits.idle_s:
            self.transport.close()
            self._now(LINGER)


def _refusal(target: bytes, headers: Iterable[tuple[bytes, bytes]], version: str) -> Problem | None:
    """Why a request with this head is not carried out; the parser has refused what it cannot read already."""
    if version not in ("1.0", "1.1"):
        return Problem(400, f"HTTP/{version} was spoken; HTTP/1.1 is understood")
    if not target.startswith(b"/") and target != b"*":
        return Problem(
            400, "the request's target is not a path; this is no proxy, and needs the path alone, as in GET /v1/models"
        )
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 and (hosts or version == "1.1"):
        return Problem(400, f"{len(hosts)} Host headers were sent; one was expected")
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or version == "1.0"):
        return Problem(400, "a body in another transfer coding than chunked cannot be read; send it with its length")
    return None


def _body_bytes(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    found = {name: value for name, value in headers if name in (b"content-length", b"transfer-encoding")}
    return None if b"transfer-encoding" in found else int(found.get(b"content-length", 0))


def _bound_unsent(sock: Any, write_s: float) -> None:
    """Have the system hold little that is not sent, and give a client up that is not there any more."""
    for name, value in (("TCP_NOTSENT_LOWAT", _UNSENT_BYTES), ("TCP_USER_TIMEOUT", int(write_s * 1000))):
        if sock is not None and hasattr(socket, name):
            with contextlib.suppress(OSError):  # another kind of socket
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
