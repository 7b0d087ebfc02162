"""Lines of the usage ledger to write in tests; run as a program, one that writes until it is killed."""

from __future__ import annotations

import asyncio
import itertools
import sys

from pyrosome.chat.events import Usage
from pyrosome.server.caller import Entry
from pyrosome.server.keys.ledger import Ledger, Line
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.store import Store

STARTED = 1_700_000_000.0  # 2023-11-14


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def entry(request="r1", *, started=STARTED, prompt=100, cached=40, output=10, first_ms=5.0, **changes):
    fields = {"path": "/v1/chat/completions", "model": "builtin:nano", "mode": "high", "status": "stop"} | changes
    usage = Usage(prompt, output, 4, cached)
    return Entry(request=request, started=started, usage=usage, first_token_ms=first_ms, total_ms=12.5, **fields)


def line(request="r1", *, account="acct-a", key="k1", price=Price(), cost=0, **changes):  # noqa: B008
    return Line(entry(request, **changes), account, key, price, cost)


async def _write_for_ever(url: str) -> None:
    ledger = Ledger(Store(url))
    numbers = itertools.count()

    async def client() -> None:
        while True:
            request = f"r{next(numbers)}"
            await ledger.write(line(request, cost=3))
            print(request, flush=True)

    await asyncio.gather(*(client() for _ in range(8)))


if __name__ == "__main__":
    asyncio.run(_write_for_ever(sys.argv[1]))
