"""Reading the usage ledger: sums by day, key, model and account, and its lines as CSV."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, func, select, tuple_

from pyrosome.errors import RequestError
from pyrosome.server.keys import schema
from pyrosome.server.keys.ledger import COUNTS
from pyrosome.server.keys.money import shown
from pyrosome.server.keys.records import iso
from pyrosome.server.keys.store import Store

BY = ("day", "key", "model", "account")
LINES_A_PAGE = 1000
CSV_COLUMNS = (
    "request", "started", "account", "account_name", "key", "key_name", "path", "model", "mode", "status",
    "prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "first_token_ms", "total_ms",
    "price_prompt", "price_cached", "price_output", "cost",
)  # fmt: skip
_FORMULA = tuple("=+-@＝＋－＠\t\r\n")  # a spreadsheet may take a cell that begins so for something to carry out


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Which part of the ledger; None: all."""

    account: str | None = None
    keys: frozenset[str] | None = None
    first_day: str | None = None  # of UTC, like 2030-01-31
    last_day: str | None = None  # and with it

    def of(self, table: Any) -> list[ColumnElement[bool]]:
        """The conditions on a table with these columns."""
        found = []
        if self.account is not None:
            found.append(table.c.account == self.account)
        if self.keys is not None:
            found.append(table.c.key.in_(sorted(self.keys)))
        if self.first_day is not None:
            found.append(table.c.day >= self.first_day)
        if self.last_day is not None:
            found.append(table.c.day <= self.last_day)
        return found


def sums(connection: Connection, part: Slice, by: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Requests, tokens and cost, together or by some of `BY`.

    Raises:
        RequestError: they cannot be told apart by that.
    """
    for name in by:
        if name not in BY:
            raise RequestError(f"usage cannot be summed by {name[:60]!r}; there are {', '.join(BY)}")
    table = schema.usage_days
    names = ("requests", *COUNTS, "cost_micro")
    groups = [table.c[n] for n in dict.fromkeys(by)]
    ask = select(*groups, *(func.coalesce(func.sum(table.c[n]), 0).label(n) for n in names)).where(*part.of(table))
    found = connection.execute(ask.group_by(*groups).order_by(*groups)).mappings()
    return [{n: int(v) if n in names else v for n, v in row.items()} for row in found]


def spent(connection: Connection, account: str, month: str) -> dict[str, int]:
    """Micro-units spent in a month (`2030-01`): by the account, under its id, and by each of its keys with those made
    with it.
    """
    of_month = Slice(account, first_day=f"{month}-01", last_day=f"{month}-31")
    of_account = select(schema.keys.c.id, schema.keys.c.parent).where(schema.keys.c.account == account)
    parents = {row.id: row.parent for row in connection.execute(of_account)}
    found = {account: 0}
    for row in sums(connection, of_month, ["key"]):
        level: str | None = row["key"]
        found[account] += row["cost_micro"]
        while level:
            found[level] = found.get(level, 0) + row["cost_micro"]
            level = parents.get(level)
    return found


def csv_text(store: Store, part: Slice) -> Iterator[str]:
    """The lines as CSV, oldest first, a page at a time under its titles; costs and prices in whole units."""
    last: tuple[float, str] | None = None
    while True:
        rows = store.read(functools.partial(_rows, _page(part, last)))
        cells = [[_cell(row, name) for name in CSV_COLUMNS] for row in rows]
        yield _csv([CSV_COLUMNS, *cells] if last is None else cells)
        if len(rows) < LINES_A_PAGE:
            return
        last = (rows[-1]["started"], rows[-1]["request"])


def _page(part: Slice, after: tuple[float, str] | None) -> Select[Any]:
    lines, keys, accounts = schema.usage_lines, schema.keys, schema.accounts
    joined = lines.outerjoin(keys, keys.c.id == lines.c.key).outerjoin(accounts, accounts.c.id == lines.c.account)
    names = [keys.c.name.label("key_name"), accounts.c.name.label("account_name")]
    ask = select(lines, *names).select_from(joined).where(*part.of(lines))
    if after is not None:
        ask = ask.where(tuple_(lines.c.started, lines.c.request) > after)
    return ask.order_by(lines.c.started, lines.c.request).limit(LINES_A_PAGE)


def _rows(ask: Select[Any], connection: Connection) -> Sequence[RowMapping]:
    return connection.execute(ask).mappings().all()


def _cell(row: RowMapping, name: str) -> str:
    if name == "cost":
        return shown(row["cost_micro"])
    value = row[name]
    if name == "started":
        return iso(value) or ""
    if name.startswith("price_"):
        return shown(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    text = "" if value is None else str(value)
    return "'" + text if isinstance(value, str) and text.startswith(_FORMULA) else text


def _csv(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()
