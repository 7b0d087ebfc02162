"""What the commands about keys and accounts share: which store, limits as flags, and how things are shown."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pyrosome.cli.terminal import Screen, printable
from pyrosome.errors import RequestError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from pyrosome.server.keys.money import Price
    from pyrosome.server.keys.records import Account, Limits
    from pyrosome.server.keys.store import Store

T = TypeVar("T")
NONE = "none"  # takes a limit, a price or an end away

State = Annotated[str, typer.Option("--state", help="The server's state folder.", show_default="the user's own")]
Database = Annotated[
    str, typer.Option("--database", help="The server's database, as postgresql://...", show_default="a file in there")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, with everything.")]
Requests = Annotated[str | None, typer.Option("--requests-per-min", help="Requests a minute, or none.")]
Tokens = Annotated[
    str | None, typer.Option("--tokens-per-min", help="Tokens a minute, of prompts and outputs, or none.")
]
Concurrent = Annotated[str | None, typer.Option("--concurrent", help="Requests at once, or none.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Money a month (UTC), like 12.50, or none.")]
PriceOf = Annotated[
    str | None,
    typer.Option(
        "--price",
        metavar="PROMPT,CACHED,OUTPUT",
        help="For a million tokens, like 0.28,0.028,0.42; none: the server's.",
    ),
]
Scopes = Annotated[list[str] | None, typer.Option("--scope", help="What it may do; several times for several.")]
Expires = Annotated[str | None, typer.Option("--expires", help="2030-01-31, or a span such as 30d; none: never.")]


@contextlib.contextmanager
def opened(state: str, database: str) -> Iterator[Store]:
    """The store a server with these options has; it may be running.

    Raises:
        RequestError: it cannot be opened.
    """
    from pyrosome.options import ServerOptions
    from pyrosome.server.keys.store import open_store

    store = open_store(ServerOptions(state_path=state, database_url=database))
    try:
        yield store
    finally:
        store.close()


def write(state: str, database: str, change: Callable[[Connection], T]) -> T:
    """Change something in that store."""
    with opened(state, database) as store:
        return store.write(change)


def read(state: str, database: str, ask: Callable[[Connection], T]) -> T:
    """Ask that store something."""
    with opened(state, database) as store:
        return store.read(ask)


def account_in(connection: Connection, name: str) -> Account:
    """The account with that id or name.

    Raises:
        RequestError: there is none, or there are several.
    """
    from pyrosome.server.keys import book

    found = book.account_called(connection, name)
    if found is None:
        raise RequestError(f"there is no account {name!r}; `pyrosome keys accounts list` shows those there are")
    return found


def limits_from(
    now: Limits, requests: str | None, tokens: str | None, concurrent: str | None, budget: str | None
) -> Limits:
    """Limits with those that flags give.

    Raises:
        RequestError: one is no number.
    """
    from pyrosome.server.keys.money import micro_of
    from pyrosome.server.keys.records import changed_limits

    given: dict[str, Any] = {}
    for name, flag, text in (
        ("requests_per_min", "--requests-per-min", requests),
        ("tokens_per_min", "--tokens-per-min", tokens),
        ("max_concurrent", "--concurrent", concurrent),
    ):
        if text is not None:
            given[name] = None if text == NONE else _integer(flag, text)
    if budget is not None:
        given["budget_micro"] = None if budget == NONE else micro_of(budget, "--budget")
    return changed_limits(given, now)


def price_from(text: str) -> Price | None:
    """A price as a flag gives it.

    Raises:
        RequestError: it is not three amounts.
    """
    from pyrosome.options import MAX_PRICE
    from pyrosome.server.keys.money import Price, micro_of

    if text == NONE:
        return None
    parts = text.split(",")
    if len(parts) != 3:
        raise RequestError(f"--price is {text!r}; three amounts were expected, like 0.28,0.028,0.42, or none")
    return Price(*(micro_of(p, "--price", MAX_PRICE) for p in parts))


def expires_from(text: str, now: float) -> int | None:
    """An end as a flag gives it.

    Raises:
        RequestError: it is no time to come.
    """
    from pyrosome.server.keys.records import time_of

    return None if text == NONE else time_of(text, now, "--expires")


def show(view: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """One thing as lines, or as JSON."""
    if as_json:
        typer.echo(json.dumps(view, ensure_ascii=False))
        return
    assert isinstance(view, Mapping)
    for name, value in view.items():
        if name != "object":
            typer.echo(f"{name.replace('_', ' '):16} {printable(words(value))}")


def show_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, nothing: str) -> None:
    """Several things as a table; in words where there are none."""
    from pyrosome.cli.tables import console, table

    screen = Screen()
    if not rows:
        screen.notice(nothing)
        return
    table(console(screen), titles, [[printable(cell) for cell in row] for row in rows], left=left)


def words(value: Any) -> str:
    """A value of a view in words."""
    from pyrosome.server.keys.money import shown

    if value is None:
        return "-"
    if isinstance(value, Mapping):
        given = {k: shown(v) if k.endswith("_micro") else v for k, v in value.items() if v is not None}
        return ", ".join(f"{k.removesuffix('_micro').replace('_', ' ')} {v}" for k, v in given.items()) or "-"
    if isinstance(value, list | tuple):
        return " ".join(str(v) for v in value)
    return str(value)


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"{flag} is {text!r}; a number was expected, or none") from None
