"""When the request that is being handled arrived, until when its client wants the answer, and whether that can be."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import math
import time
from typing import TYPE_CHECKING

from pyrosome.errors import PyrosomeError
from pyrosome.server.gate import LONGEST_WAIT_S
from pyrosome.server.problems import Refused

if TYPE_CHECKING:
    from starlette.types import Receive

    from pyrosome.engine.request import Request
    from pyrosome.server.service import Service

LONGEST_S = 86400.0
ASK_S = 2.0  # the engine answers between two steps; an estimate is not worth a longer wait


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """Of one HTTP request; known to whatever runs in its task."""

    request: str = "-"  # its id in errors and in the log
    at: float = dataclasses.field(default_factory=time.monotonic)
    deadline_s: float = 0.0  # after `at`, as the client asked; 0: it did not
    receive: Receive | None = None  # what comes from the client
    explains: bool = False  # how the cache was used is to be told

    def until(self, most_s: float) -> tuple[float, float]:
        """(the moment of time.monotonic, seconds after the arrival) when it must have ended; infinite: never.

        Args:
            most_s: what a server allows; 0: as long as it takes.
        """
        seconds = min(self.deadline_s or math.inf, most_s or math.inf)
        return self.at + seconds, seconds

    async def is_gone(self) -> bool:
        """Whether the client has left; to be asked once its body was read."""
        if self.receive is None:
            return False
        coming = asyncio.ensure_future(self.receive())
        try:
            await asyncio.sleep(0)
            return coming.done() and bool(coming.result()["type"] == "http.disconnect")
        finally:
            coming.cancel()


current: contextvars.ContextVar[Arrival] = contextvars.ContextVar("arrival")


def of_this_request() -> Arrival:
    """The arrival of the request being handled; outside of one, a new one."""
    return current.get(None) or Arrival()


def deadline_in(value: str) -> float:
    """Seconds in an `X-Request-Deadline` header.

    Raises:
        Refused: 400, they are no number of seconds.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_S:
        raise Refused(
            400,
            f"X-Request-Deadline is {value[:40]!r}; seconds were expected, above 0 and up to {LONGEST_S:g}",
        )
    return seconds


async def first_token_s(service: Service, request: Request, left_s: float) -> float:
    """Seconds in which the first token of a request will probably come; 0: not known.

    Args:
        left_s: those it has.

    Raises:
        Refused: 504 where it could not be in time if it were alone, 429 where it cannot because of others.
    """
    pace = service.pace
    if not pace.tokens_per_s:
        return 0.0
    own = await _uncached(service, request, left_s)
    alone_s = pace.first_token_s(own, ())
    if alone_s > left_s:
        raise Refused(
            504,
            f"the first token would come after about {alone_s:.1f} s, since {own:.0f} tokens of the prompt are not "
            f"computed yet, and the request is to end within {left_s:.1f} s; allow more, or send less",
        )
    others = [e.tokens_to_come for e in service.exchanges.values() if e.id != request.id]
    seconds = pace.first_token_s(own, others) + service.gate.wait_s()
    if seconds > left_s:
        wait = max(1, min(LONGEST_WAIT_S, math.ceil(seconds - left_s)))
        raise Refused(
            429,
            f"the first token would come after about {seconds:.1f} s, since others are before it, and the request is "
            f"to end within {left_s:.1f} s; try again in {wait} s",
            code="overloaded",
            headers={"Retry-After": str(wait)},
        )
    return seconds


async def _uncached(service: Service, request: Request, left_s: float) -> float:
    """Tokens of its prompt that must be computed; an engine that cannot say so in time knows none of them."""
    if request.session:
        return len(request.ids)
    with contextlib.suppress(TimeoutError, PyrosomeError):
        async with asyncio.timeout(min(left_s, ASK_S)):
            known = await service.engine.call("known_tokens", ids=list(request.ids), salt=request.salt)
            return len(request.ids) - int(known)
    return service.pace.uncached(len(request.ids))
