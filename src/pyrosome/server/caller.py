"""Who asks, what they may do, and what is written down of it: the seam between routes and keys.

`server.keys` has the door of a public server; `OpenDoor` is that of a server on one's own machine, without keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from pyrosome.chat.events import Usage

GENERATE, SESSIONS, ACCOUNT, METRICS, ADMIN = "generate", "sessions", "account", "metrics", "admin"
SCOPES = (GENERATE, SESSIONS, ACCOUNT, METRICS, ADMIN)


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Whoever a request is from."""

    key: str  # the key's public id; "": none was needed
    account: str
    name: str
    scopes: frozenset[str]
    salt: str  # prefixes are shared within it, and with nobody else


ANYBODY = Caller("", "", "anybody", frozenset(SCOPES), "")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A line of the usage ledger: one generating request, whatever became of it."""

    request: str  # its id; no two lines have the same
    path: str
    model: str
    mode: str  # "off", "low", "high", "max", or "text"
    status: str  # "stop", "length", "tool_calls", "repetition", "abort" or "error"
    started: float  # seconds since 1970
    usage: Usage
    first_token_ms: float | None
    total_ms: float


class Ticket(Protocol):
    """One admitted request; settled exactly once.

    Attributes:
        headers: what the answer's head says of the limits it runs under.
    """

    headers: Mapping[str, str]

    async def settle(self, entry: Entry) -> None:
        """Give back what it held, and write its line: once this returns, the line survives a crash."""


class Door(Protocol):
    """Who is let in.

    Attributes:
        is_needed: nobody comes in without a key.
    """

    is_needed: bool

    async def caller(self, presented: str | None) -> Caller:
        """Whose key that is.

        Raises:
            Refused: 401, 403.
        """

    async def enter(self, caller: Caller, request: str, prompt_tokens: int, max_tokens: int) -> Ticket:
        """Admit a generating request under its key's limits.

        Raises:
            Refused: 402 (budget), 429 (rate, concurrency) with Retry-After.
        """

    def close(self) -> None:
        """No more requests come; what is still to be written is written."""


class OpenDoor:
    """Everybody is let in, and nothing is written down."""

    is_needed = False

    async def caller(self, presented: str | None) -> Caller:
        """Anybody."""
        return ANYBODY

    async def enter(self, caller: Caller, request: str, prompt_tokens: int, max_tokens: int) -> Ticket:
        """No limits."""
        return _OpenTicket()

    def close(self) -> None:
        """Nothing was open."""


class _OpenTicket:
    headers: Mapping[str, str] = {}

    async def settle(self, entry: Entry) -> None:
        pass
