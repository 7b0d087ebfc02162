"""The usage ledger: a line for each generating request, and sums by day that outlive the lines.

A line is written once, whatever happens: its request's id is the table's key, and the day's sum is changed in the same
transaction, only by lines that were not there yet.  Lines that come while a transaction is written wait for the next,
all in one, so that a hundred requests that end at once cost one or two waits for the disk.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from pyrosome.errors import EngineError, PyrosomeError
from pyrosome.server.caller import Entry
from pyrosome.server.keys import schema
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import day_of
from pyrosome.server.keys.store import Store
from pyrosome.server.problems import Refused

log = logging.getLogger(__name__)

LINES_AT_ONCE = 500
PATIENCE_S = 20.0  # a store that does not answer is tried again so long
PRUNE_EVERY_S = 3600.0
PRUNED_AT_ONCE = 5000
MAX_TEXT_CHARS = 200
COUNTS = ("prompt_tokens", "cached_tokens", "output_tokens")
_INSERT: dict[str, Callable[..., Any]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line: what was asked and done, for whom, at which price."""

    entry: Entry
    account: str
    key: str
    price: Price
    cost_micro: int


class Ledger:
    """Writes lines to a store.

    Args:
        keep_days: lines older than so many days are deleted; 0: none ever.  The sums by day stay.
    """

    def __init__(self, store: Store, keep_days: int = 0, *, wall: Callable[[], float] = time.time) -> None:
        self._store, self._keep_days, self._wall = store, keep_days, wall
        self._lock = threading.Lock()
        self._waiting: list[tuple[Line, concurrent.futures.Future[None]]] = []
        self._is_writing = False
        self._pruned = float("-inf")
        self._prune()

    async def write(self, line: Line) -> None:
        """Write a line; once this returns it survives a crash.

        Raises:
            EngineError: the store took no lines for too long.
        """
        written: concurrent.futures.Future[None] = concurrent.futures.Future()
        written.set_running_or_notify_cancel()  # whoever waits may give up; the line is written all the same
        with self._lock:
            self._waiting.append((line, written))
            if not self._is_writing:
                self._is_writing = True
                self._store.submit(self._write_waiting)
        await asyncio.wrap_future(written)

    def _write_waiting(self) -> None:
        """In the writer's thread: one transaction after another until no line waits."""
        while True:
            with self._lock:
                batch, self._waiting = self._waiting[:LINES_AT_ONCE], self._waiting[LINES_AT_ONCE:]
                if not batch:
                    self._is_writing = False
                    break
            error = self._patiently([line for line, _ in batch])
            for _, written in batch:
                if error:
                    written.set_exception(error)
                else:
                    written.set_result(None)
        self._prune()

    def _patiently(self, lines: Sequence[Line]) -> PyrosomeError | None:
        until, wait_s = time.monotonic() + PATIENCE_S, 0.05
        while True:
            try:
                self._store.write(lambda connection: add(connection, lines))
                return None
            except Refused as error:
                reason = str(error)
                if time.monotonic() > until:
                    break
                time.sleep(wait_s)
                wait_s = min(2.0, wait_s * 2)
            except DBAPIError as error:
                reason = type(error).__name__
                break
            except Exception as error:
                log.exception("lines of the usage ledger could not be made")
                reason = type(error).__name__
                break
        log.error("%d lines of the usage ledger were not written: %s", len(lines), reason)
        return EngineError(f"the request's line in the usage ledger could not be written: {reason}")

    def _prune(self) -> None:
        if self._keep_days and time.monotonic() - self._pruned > PRUNE_EVERY_S:
            self._pruned = time.monotonic()
            self._store.submit(self._prune_some)

    def _prune_some(self) -> None:
        before = day_of(self._wall() - self._keep_days * 86400)
        try:
            if self._store.write(lambda connection: prune(connection, before)):
                self._store.submit(self._prune_some)
        except (Refused, DBAPIError, RuntimeError) as error:  # RuntimeError: the store is being closed
            log.warning("old lines of the usage ledger stay for now: %s", error)


def add(connection: Connection, lines: Sequence[Line]) -> int:
    """Write the lines that are not there yet, and add them to their days; how many there were."""
    insert = _INSERT[connection.dialect.name]
    rows = {row["request"]: row for row in map(_row, lines)}
    put = insert(schema.usage_lines).on_conflict_do_nothing().returning(schema.usage_lines.c.request)
    new = [rows[r] for r in connection.execute(put, list(rows.values())).scalars()]
    sums: dict[tuple[str, ...], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in new:
        counts = {n: row[n] for n in (*COUNTS, "cost_micro")}
        sums[row["day"], row["account"], row["key"], row["model"]].update({"requests": 1, **counts})
    if sums:
        names = ("requests", *COUNTS, "cost_micro")
        # Sorted, so that two servers that add to the same days do not wait for each other for ever.
        days = [
            dict(zip(("day", "account", "key", "model"), of, strict=True)) | {n: sums[of][n] for n in names}
            for of in sorted(sums)
        ]
        up = insert(schema.usage_days).values(days)
        raised = {n: schema.usage_days.c[n] + up.excluded[n] for n in names}
        connection.execute(up.on_conflict_do_update(index_elements=["day", "account", "key", "model"], set_=raised))
    return len(new)


def prune(connection: Connection, before_day: str) -> int:
    """Delete some lines of days before that one; how many."""
    lines = schema.usage_lines
    old = select(lines.c.request).where(lines.c.day < before_day).limit(PRUNED_AT_ONCE)
    return connection.execute(delete(lines).where(lines.c.request.in_(old.scalar_subquery()))).rowcount


def _row(line: Line) -> dict[str, Any]:
    entry, usage = line.entry, line.entry.usage
    return {
        "request": _storable(entry.request), "account": line.account, "key": line.key,
        "path": _storable(entry.path), "model": _storable(entry.model), "mode": _storable(entry.mode),
        "status": _storable(entry.status), "started": entry.started, "day": day_of(entry.started),
        "prompt_tokens": usage.prompt_tokens, "cached_tokens": min(usage.cached_tokens, usage.prompt_tokens),
        "output_tokens": usage.completion_tokens, "reasoning_tokens": usage.reasoning_tokens,
        "first_token_ms": entry.first_token_ms, "total_ms": entry.total_ms, "price_prompt": line.price.prompt,
        "price_cached": line.price.cached, "price_output": line.price.output, "cost_micro": line.cost_micro,
    }  # fmt: skip


def _storable(text: str) -> str:
    """Text that every database takes and every table shows: a client may have written it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:MAX_TEXT_CHARS])
