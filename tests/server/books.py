"""What tests that write down who came in and what was settled share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pyrosome.server.caller import Entry


class Ticket:
    """Settled by whoever made it."""

    def __init__(self, settle: Callable[[Entry], Awaitable[None]]) -> None:
        self.settle = settle
        self.headers: dict[str, str] = {}
