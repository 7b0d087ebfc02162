"""Writing an exchange to its client, whole or as a stream, while watching whether the client is still there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyrosome.server import explain
from pyrosome.server.exchange import Exchange, StillHere
from pyrosome.server.group import Group
from pyrosome.server.problems import Problem, Refused, problem_of
from pyrosome.server.shape import Shape, as_json

log = logging.getLogger(__name__)

FEW_LOGPROBS = 500  # tokens whose log probabilities are written in a moment


class Reply(Response):
    """Answers with an opened exchange.  When the client leaves, the engine stops within a step.

    A whole answer that takes long begins with blank lines, which JSON allows, so that no proxy cuts the connection.
    """

    def __init__(self, exchange: Exchange | Group, shape: Shape, *, stream: bool, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=200, headers=dict(headers))
        self._exchange, self._shape, self._stream = exchange, shape, stream
        self._cache = explain.Telling(exchange)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        work = asyncio.create_task((self._streamed if self._stream else self._whole)(_Out(send, self._exchange)))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError, TimeoutError):
                await work
        finally:
            for task in (work, gone):
                task.cancel()
            await self._exchange.close()

    async def _streamed(self, out: _Out) -> None:
        await out.start(200, {**dict(self.headers), "content-type": "text/event-stream; charset=utf-8",
                              "cache-control": "no-cache", "x-accel-buffering": "no"})  # fmt: skip
        try:
            await out.write(b"".join(self._shape.begin()))
            async for batch in self._exchange.batches():
                if isinstance(batch, StillHere):
                    frames = self._shape.still_here(batch)
                else:
                    frames = [*self._cache.comment(), *(f for said in batch for f in self._shape.said(said))]
                if not any(frames) and out.silent_s >= self._exchange.keep_alive_s:  # what is said is not shown
                    frames = self._shape.still_here(StillHere(None, out.silent_s))
                await out.write(b"".join(frames))
            last = self._shape.end()
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            last = self._shape.failed(self._problem(error))
        except asyncio.CancelledError:
            if not self._exchange.is_shutting_down:
                raise
            last = self._shape.failed(_closing())
        await out.write(b"".join(last), more=False)

    async def _whole(self, out: _Out) -> None:
        problem: Problem | None = None
        try:
            async for batch in self._exchange.batches():
                if isinstance(batch, StillHere) or out.silent_s >= self._exchange.keep_alive_s:
                    if not out.has_begun:
                        await out.start(200, {**dict(self.headers), "content-type": "application/json"})
                    await out.write(b"\n")
            is_long = self._exchange.num_logprobs > FEW_LOGPROBS  # then others would wait for it
            body = await asyncio.to_thread(self._written) if is_long else self._written()
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            problem = self._problem(error)
        except asyncio.CancelledError:
            if not self._exchange.is_shutting_down:
                raise
            problem = _closing()
        if problem:
            body = as_json(problem.body(self._exchange.error_shape))
        if not out.has_begun:
            headers = {**dict(self.headers), "content-type": "application/json", "content-length": str(len(body))}
            headers |= problem.headers if problem else self._cache.header()
            await out.start(problem.status if problem else 200, headers)
        await out.write(body, more=False)

    def _written(self) -> bytes:
        return as_json(self._shape.whole())

    def _problem(self, error: Exception) -> Problem:
        self._exchange.outcome.status = self._exchange.outcome.status or "error"
        problem = problem_of(error, self._exchange.id)
        self._exchange.refused(problem)
        return problem


class _Out:
    """Sends; a client that does not read for so long is given up."""

    def __init__(self, send: Send, exchange: Exchange | Group) -> None:
        self._send, self._exchange, self.has_begun = send, exchange, False
        self._wrote = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since something was written, or since its beginning."""
        return time.monotonic() - self._wrote

    async def start(self, status: int, headers: Mapping[str, Any]) -> None:
        raw = [(k.lower().encode("latin-1"), str(v).encode("latin-1", "replace")) for k, v in headers.items()]
        raw = [h for h in raw if h[0] != b"content-length" or h[1] != b"0"]
        self.has_begun = True
        await self._timed({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        if body or not more:
            await self._timed({"type": "http.response.body", "body": body, "more_body": more})

    async def _timed(self, message: dict[str, Any]) -> None:
        self._wrote = time.monotonic()
        try:
            async with asyncio.timeout(self._exchange.write_s):
                await self._send(message)
        except TimeoutError:
            log.warning("a client read nothing for %.0f s and is given up", self.silent_s)
            raise


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _closing() -> Problem:
    return problem_of(Refused(503, "the server is shutting down; send the request again", headers={"Retry-After": "5"}))
