"""`pyrosome keys accounts` and `pyrosome keys invite`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
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

AccountName = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Its id or name.")]


def list_accounts(state: State = "", database: Database = "", as_json: AsJson = False) -> None:
    """List accounts, with what they spent this month."""
    from pyrosome.server.keys import book, records, usage, views
    from pyrosome.server.keys.money import shown

    month = records.day_of(time.time())[:7]
    of_month = usage.Slice(first_day=f"{month}-01", last_day=f"{month}-31")
    with opened(state, database) as store:
        accounts = store.read(book.accounts)
        spent = {r["account"]: r["cost_micro"] for r in store.read(lambda c: usage.sums(c, of_month, ["account"]))}
    found = [{**views.account_view(a), "month": month, "spent_micro": spent.get(a.id, 0)} for a in accounts]
    if as_json:
        show(found, as_json=True)
        return
    rows = [
        [v["id"], v["name"], "closed" if v["closed"] else "open", words(v["limits"]), words(v["price"]),
         shown(v["spent_micro"])]
        for v in found
    ]  # fmt: skip
    titles = ["id", "name", "state", "limits", "price", f"spent in {month}"]
    show_table(titles, rows, left=5, nothing="There are no accounts; the first key makes one.")


def create_account(
    name: Annotated[str, typer.Argument(help="A name to know it by.")],
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    concurrent: Concurrent = None,
    budget: Budget = None,
    price: PriceOf = None,
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Make an account."""
    from pyrosome.server.keys import book, records, views

    name = records.name_of(name, "NAME")
    limits = limits_from(records.Limits(), requests_per_min, tokens_per_min, concurrent, budget)
    paid = price_from(price) if price else None
    made = write(state, database, lambda c: book.create_account(c, time.time(), name, limits, paid))
    show(views.account_view(made), as_json=as_json)


def account_limits(
    account: AccountName,
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    concurrent: Concurrent = None,
    budget: Budget = None,
    price: PriceOf = None,
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Show or change what all keys of an account may use together, and its price."""
    from pyrosome.server.keys import book

    def change(connection: Any) -> Any:
        one = account_in(connection, account)
        limits = limits_from(one.limits, requests_per_min, tokens_per_min, concurrent, budget)
        paid = price_from(price) if price else one.price
        return book.change_account(connection, one.id, time.time(), limits=limits, price=paid)

    _change(state, database, change, as_json)


def rename_account(
    account: AccountName,
    name: Annotated[str, typer.Argument(help="Its new name.")],
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Give an account another name."""
    from pyrosome.server.keys import book, records

    name = records.name_of(name, "NAME")
    now = time.time()
    _change(state, database, lambda c: book.change_account(c, account_in(c, account).id, now, name=name), as_json)


def close_account(account: AccountName, state: State = "", database: Database = "", as_json: AsJson = False) -> None:
    """Let none of its keys in any more; its usage stays."""
    from pyrosome.server.keys import book

    now = time.time()
    _change(state, database, lambda c: book.change_account(c, account_in(c, account).id, now, closed=True), as_json)


def open_account(account: AccountName, state: State = "", database: Database = "", as_json: AsJson = False) -> None:
    """Let a closed account's keys in again."""
    from pyrosome.server.keys import book

    now = time.time()
    _change(state, database, lambda c: book.change_account(c, account_in(c, account).id, now, closed=False), as_json)


ACCOUNTS: dict[str, Callable[..., Any]] = {
    "list": list_accounts, "create": create_account, "limits": account_limits, "rename": rename_account,
    "close": close_account, "open": open_account,
}  # fmt: skip


def create_invite(
    name: Annotated[str, typer.Argument(help="A name to know it by.")],
    uses: Annotated[int, typer.Option(min=1, help="Accounts that can be made with it.")] = 1,
    expires: Expires = None,
    scope: Scopes = None,
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    concurrent: Concurrent = None,
    budget: Budget = None,
    price: PriceOf = None,
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Make an invite and print its code, this once; the limits are those of the accounts made with it."""
    from pyrosome.server.keys import invites, records, views

    now = time.time()
    name = records.name_of(name, "NAME")
    limits = limits_from(records.Limits(), requests_per_min, tokens_per_min, concurrent, budget)
    terms: dict[str, Any] = {
        "uses": uses, "limits": limits, "expires": expires_from(expires, now) if expires else None,
        "scopes": records.scopes_of(scope) if scope else invites.SELF_SCOPES,
        "price": price_from(price) if price else None,
    }  # fmt: skip
    invite, code = write(state, database, lambda c: invites.create_invite(c, now, name, **terms))
    view = views.invite_view(invite, now)
    if as_json:
        typer.echo(json.dumps({**view, "code": code.text}, ensure_ascii=False))
        return
    typer.echo(code.text)
    ends = f" until {view['expires']}" if view["expires"] else ""
    Screen().notice(f"Good for {uses} accounts{ends}, where the server runs with --sign-up; it is shown this once.")


def list_invites(state: State = "", database: Database = "", as_json: AsJson = False) -> None:
    """List invites, without their codes."""
    from pyrosome.server.keys import invites, views

    found = [views.invite_view(i, time.time()) for i in read(state, database, invites.invites)]
    if as_json:
        show(found, as_json=True)
        return
    rows = [
        [
            v["id"],
            v["name"],
            v["state"],
            words(v["expires"]),
            words(v["scopes"]),
            words(v["limits"]),
            str(v["uses_left"]),
        ]
        for v in found
    ]
    titles = ["id", "name", "state", "expires", "scopes", "limits", "uses left"]
    show_table(titles, rows, left=6, nothing="There are no invites.")


def revoke_invite(
    invite: Annotated[str, typer.Argument(metavar="INVITE", help="Its id.")],
    state: State = "",
    database: Database = "",
    as_json: AsJson = False,
) -> None:
    """Let no more accounts be made with an invite; those there are stay."""
    from pyrosome.server.keys import invites, views

    now = time.time()
    gone = write(state, database, lambda c: invites.revoke_invite(c, invite, now))
    show(views.invite_view(gone, now), as_json=as_json)


INVITES: dict[str, Callable[..., Any]] = {"create": create_invite, "list": list_invites, "revoke": revoke_invite}


def _change(state: str, database: str, change: Any, as_json: bool) -> None:
    from pyrosome.server.keys.views import account_view

    show(account_view(write(state, database, change)), as_json=as_json)
