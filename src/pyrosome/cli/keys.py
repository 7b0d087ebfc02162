"""`pyrosome keys`: who may use a server.  The server may be running or not; it sees changes within seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pyrosome.cli.key_store import (
    AsJson,
    Budget,
    Concurrent,
    Database,
    Expires,
    PriceOf,
    Requests,
    Scopes,
    State,
    Tokens,
    account_in,
    expires_from,
    limits_from,
    opened,
    price_from,
    read,
    show,
    show_table,
    words,
    write,
)
from pyrosome.cli.terminal import Screen
from pyrosome.errors import RequestError

DEFAULT_ACCOUNT = "default"
_KEY = typer.Argument(metavar="KEY", help="Its id, the beginning of the key, or its name.")
KeyName = Annotated[str, _KEY]
First = Annotated[
    str, typer.Option("--from", metavar="DAY", help="First day (UTC).", show_default="this month's first")
]
Last = Annotated[str, typer.Option("--to", metavar="DAY", help="Last day.", show_default="today")]
OfAccount = Annotated[str | None, typer.Option("--account", help="Of this account alone: its id or name.")]
OfKey = Annotated[str | None, typer.Option("--key", help="Of this key alone.")]


def create(
    name: Annotated[str, typer.Argument(help="A name to know it by.", show_default="key, or admin")] = "",
    account: Annotated[str, typer.Option(help="The account it is for: its id or name.")] = DEFAULT_ACCOUNT,
    admin: Annotated[bool, typer.Option("--admin", help="All scopes: it may also manage everybody's keys.")] = False,
    scope: Scopes = None,
    expires: Expires = None,
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    concurrent: Concurrent = None,
    budget: Budget = None,
    price: PriceOf = None,
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Make a key and print it: this once, since only a hash of it is kept."""
    from pyrosome.server.caller import SCOPES
    from pyrosome.server.keys import book, records

    now = time.time()
    if admin and scope:
        raise RequestError("--admin is every scope; give it or --scope, not both")
    scopes = frozenset(SCOPES) if admin else records.scopes_of(scope) if scope else book.DEFAULT_SCOPES
    name = records.name_of(name or ("admin" if admin else "key"), "NAME")
    limits = limits_from(records.Limits(), requests_per_min, tokens_per_min, concurrent, budget)
    ends = expires_from(expires, now) if expires else None
    paid = price_from(price) if price else None

    def make(connection: Any) -> Any:
        of = book.account_called(connection, account)
        if of is None:
            if account != DEFAULT_ACCOUNT:
                raise RequestError(f"there is no account {account!r}; make it with `pyrosome keys accounts create`")
            of = book.create_account(connection, now, DEFAULT_ACCOUNT)
        return book.create_key(connection, now, of.id, name, scopes, expires=ends, limits=limits, price=paid)

    _tell(*write(state, database, make), as_json=as_json)


def list_keys(
    account: OfAccount = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that were revoked or expired too.")] = False,
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """List keys, without their secrets."""
    from pyrosome.server.keys import book, views

    now = time.time()
    with opened(state, database) as store:
        of = store.read(lambda c: account_in(c, account).id) if account else None
        accounts = {a.id: a for a in store.read(book.accounts)}
        keys = [k for k in store.read(lambda c: book.keys(c, of)) if everything or k.state(now) == "active"]
    found = [views.key_view(k, now) for k in keys]
    if as_json:
        show(found, as_json=True)
        return
    rows = [
        [v["id"], v["name"], accounts[v["account"]].name, words(v["scopes"]), v["state"], words(v["expires"]),
         words(v["last_used"]), words(v["limits"])]
        for v in found
    ]  # fmt: skip
    titles = ["id", "name", "account", "scopes", "state", "expires", "last used", "limits"]
    show_table(titles, rows, left=len(titles), nothing="There are no keys; make one with `pyrosome keys create NAME`.")


def show_key(key: KeyName, state: State = "", database: Database = "", as_json: AsJson = False) -> None:
    """Show all that is known of a key."""
    from pyrosome.server.keys import book

    show(_view(read(state, database, lambda c: book.key_called(c, key))), as_json=as_json)


def rename(
    key: KeyName,
    name: Annotated[str, typer.Argument(help="Its new name.")],
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Give a key another name."""
    from pyrosome.server.keys.records import name_of

    _change(state, database, key, as_json, name=name_of(name, "NAME"))


def scope(
    key: KeyName,
    scopes: Annotated[list[str], typer.Argument(metavar="SCOPE...", help="All that it may do from now on.")],
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Say what a key may do: generate, sessions, account, metrics, admin."""
    from pyrosome.server.keys.records import scopes_of

    _change(state, database, key, as_json, scopes=scopes_of(scopes))


def expire(
    key: KeyName,
    when: Annotated[str, typer.Argument(metavar="WHEN", help="2030-01-31, or a span such as 30d; none: never.")],
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Say when a key ends."""
    _change(state, database, key, as_json, expires=expires_from(when, time.time()))


def revoke(key: KeyName, state: State = "", database: Database = "", as_json: AsJson = False) -> None:
    """End a key for ever, and those made with it."""
    from pyrosome.server.keys import book

    ended = write(state, database, lambda c: book.revoke_key(c, book.key_called(c, key).id, time.time()))
    if as_json:
        show([_view(k) for k in ended], as_json=True)
        return
    for one in ended:
        typer.echo(f"{one.id} {one.name} is revoked")
    if not ended:
        Screen().notice("It was revoked already.")


def rotate(
    key: KeyName,
    grace: Annotated[str, typer.Option(help="The old one is taken so long yet: a span such as 30m or 7d.")] = "0m",
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret and print it, this once; id, scopes and limits stay."""
    from pyrosome.server.keys import book, records

    grace_s = records.span_of(grace, "--grace", book.LONGEST_GRACE_S)
    now = time.time()
    made = write(state, database, lambda c: book.rotate_key(c, book.key_called(c, key).id, now, grace_s))
    _tell(*made, as_json=as_json)


def limits(
    key: KeyName,
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    concurrent: Concurrent = None,
    budget: Budget = None,
    price: PriceOf = None,
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Show or change a key's limits and price; its account's hold besides."""
    from pyrosome.server.keys import book

    def change(connection: Any) -> Any:
        one = book.key_called(connection, key)
        new = limits_from(one.limits, requests_per_min, tokens_per_min, concurrent, budget)
        paid = price_from(price) if price else one.price
        return book.change_key(connection, one.id, limits=new, price=paid)

    show(_view(write(state, database, change)), as_json=as_json)


def usage(
    first: First = "",
    last: Last = "",
    by: Annotated[str, typer.Option(help="day, key, model, account, or several with commas.")] = "day",
    account: OfAccount = None,
    key: OfKey = None,
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Sum up what was used: requests, tokens, money."""
    from pyrosome.server.keys import usage as ledger
    from pyrosome.server.keys import views

    names = [n.strip() for n in by.split(",")]
    with opened(state, database) as store:
        part = store.read(lambda c: _part(c, first, last, account, key))
        rows = store.read(lambda c: ledger.sums(c, part, names))
    found = views.usage_view(rows, part.first_day or "", part.last_day or "", names)
    if as_json:
        show(found, as_json=True)
        return
    counts = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    lines = [
        [*(str(row[n]) or "-" for n in names), *(f"{row[n]:,}" for n in counts), row["cost"]] for row in found["data"]
    ]
    if len(lines) > 1:
        total = found["total"]
        lines.append(["total", *[""] * (len(names) - 1), *(f"{total[n]:,}" for n in counts), total["cost"]])
    titles = [*names, *(n.replace("_", " ") for n in counts), "cost"]
    nothing = f"Nothing was used from {found['from']} to {found['to']}."
    show_table(titles, lines, left=len(names), nothing=nothing)


def export(
    first: First = "",
    last: Last = "",
    account: OfAccount = None,
    key: OfKey = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file.", show_default="standard output")] = None,
    state: State = "",
    database: Database = "",
) -> None:
    """Write usage as CSV, a line for each request."""
    from pyrosome.server.keys.usage import csv_text

    with opened(state, database) as store:
        pages = csv_text(store, store.read(lambda c: _part(c, first, last, account, key)))
        if out is None:
            for page in pages:
                typer.echo(page, nl=False)
            return
        try:
            with out.open("w", newline="", encoding="utf-8") as file:
                file.writelines(pages)
        except OSError as error:
            raise RequestError(f"{out} cannot be written: {error.strerror}") from None


COMMANDS: dict[str, Callable[..., Any]] = {
    "create": create, "list": list_keys, "show": show_key, "rename": rename, "scope": scope, "expire": expire,
    "revoke": revoke, "rotate": rotate, "limits": limits, "usage": usage, "export": export,
}  # fmt: skip


def _part(connection: Any, first: str, last: str, account: str | None, key: str | None) -> Any:
    from pyrosome.server.keys import book, views
    from pyrosome.server.keys.usage import Slice

    days = views.days_in({"from": first, "to": last}, time.time())
    of = account_in(connection, account).id if account else None
    keys = frozenset([book.key_called(connection, key).id]) if key else None
    return Slice(of, keys, *days)


def _change(state: str, database: str, key: str, as_json: bool, **changes: Any) -> None:
    from pyrosome.server.keys import book

    changed = write(state, database, lambda c: book.change_key(c, book.key_called(c, key).id, **changes))
    show(_view(changed), as_json=as_json)


def _view(key: Any) -> dict[str, Any]:
    from pyrosome.server.keys.views import key_view

    return key_view(key, time.time())


def _tell(key: Any, secret: Any, *, as_json: bool) -> None:
    """The secret alone to standard output, so that it can be piped; what to know about it beside."""
    view = _view(key)
    if as_json:
        typer.echo(json.dumps({**view, "secret": secret.text}, ensure_ascii=False))
        return
    screen = Screen()
    typer.echo(secret.text)
    old = f"; the old secret is taken until {view['old_secret_until']}" if view["old_secret_until"] else ""
    scopes = ", ".join(view["scopes"])
    screen.notice(f"This is {view['name']!r} ({scopes}), and is shown this once: only a hash of it is kept{old}.")
