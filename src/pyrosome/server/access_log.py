"""One line for each request that was answered: who asked for what, how it ended, how much and how long.

Never what was said: no body, no prompt, no query, no key; and nothing for each token.
"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyrosome.server.exchange import Exchange, Outcome
from pyrosome.server.problems import Problem
from pyrosome.server.service import Service

log = logging.getLogger("pyrosome.server.requests")

LONGEST = 120  # characters of a path that are shown
PROBES = (
    "/health",
    "/health/live",
    "/ping",
    "/metrics",
    "/load",
    "/version",
)  # asked every few seconds: lines at DEBUG

_KEY = re.compile(r"(?i)\b(pyr|pyi|sk)-[^/]+")


def install(app: FastAPI, service: Service) -> None:
    """Write a line for each request of an app."""
    service.watchers.append(Notes())
    app.add_middleware(AccessLog)


@dataclasses.dataclass
class _Line:
    """What is known of the request that is being answered."""

    id: str = ""
    status: int | None = None  # None: the client left before there was one
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)


_line: contextvars.ContextVar[_Line | None] = contextvars.ContextVar("_line", default=None)


class AccessLog:
    """Writes a request's line at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line, began = _Line(), time.monotonic()
        mark = _line.set(line)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                line.status = message["status"]
                ids = [v for k, v in message.get("headers", ()) if k.lower() == b"x-request-id"]
                line.id = ids[0].decode("latin-1") if ids else ""
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            _line.reset(mark)
            _write(scope, line, time.monotonic() - began)


class Notes:
    """Brings what came of a generating request to its line."""

    def taken(self, exchange: Exchange) -> None:
        """Nothing to note yet."""

    def waited(self, num_tokens: int, seconds: float) -> None:
        """Nothing is written for tokens."""

    def ended(self, outcome: Outcome) -> None:
        """It has ended; its connection may have several, or none."""
        if line := _line.get():
            line.outcomes.append(outcome)
        else:
            log.info("%s %s%s", _shown(outcome.id, 64), _shown(outcome.asked.path), _told([outcome]))

    def refused(self, path: str, problem: Problem) -> None:
        """Its status tells that."""


def _write(scope: Scope, line: _Line, seconds: float) -> None:
    path = scope.get("path", "")
    level = logging.DEBUG if path in PROBES and line.status == 200 else logging.INFO
    if not log.isEnabledFor(level):
        return
    first = line.outcomes[0].id if line.outcomes else "-"
    log.log(
        level, "%s %s %s status=%s%s total=%dms", _shown(line.id or first, 64), _shown(scope.get("method", ""), 16),
        _shown(path), line.status or "-", _told(line.outcomes), seconds * 1000,
    )  # fmt: skip


def _told(outcomes: list[Outcome]) -> str:
    return "".join(f" {name}={value}" for name, value in _fields(outcomes))


def _fields(outcomes: list[Outcome]) -> Iterator[tuple[str, Any]]:
    if not outcomes:
        return
    usages = [o.usage for o in outcomes]
    firsts = [o.first_token - o.arrived for o in outcomes if o.first_token is not None]
    caller = outcomes[0].asked.caller
    yield "end", "+".join(dict.fromkeys(o.status for o in outcomes))
    yield "mode", outcomes[0].asked.mode
    yield "prompt", sum(u.prompt_tokens for u in usages)
    yield "cached", sum(u.cached_tokens for u in usages)
    yield "output", sum(u.completion_tokens for u in usages)
    yield "first", f"{min(firsts) * 1000:.0f}ms" if firsts else "-"
    yield "account", _shown(caller.account, 64) or "-"
    yield "key", _shown(caller.key, 64) or "-"


def _shown(text: str, most: int = LONGEST) -> str:
    """A client's text in one short line, without what looks like a key."""
    text = _KEY.sub(r"\1-***", text)
    text = "".join(c if c.isprintable() and c != " " else f"\\x{ord(c):02x}" for c in text[: most + 1])
    return text if len(text) <= most else text[:most] + "..."
