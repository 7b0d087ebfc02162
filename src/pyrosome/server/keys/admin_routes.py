"""`/admin/...`: all accounts, keys, invites and usage, for keys with the scope `admin`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection
from starlette.responses import Response

from pyrosome.server.caller import ADMIN
from pyrosome.server.keys import book, invites, records, usage, views
from pyrosome.server.keys.asking import (
    USAGE_QUERY,
    add,
    fields_of,
    keys_of,
    lines_told,
    reading,
    told,
    usage_told,
    writing,
)
from pyrosome.server.keys.records import Limits, day_of
from pyrosome.server.keys.usage import Slice
from pyrosome.server.problems import Refused
from pyrosome.server.routes import caller_of

MAX_USES = 100_000

_TERMS: dict[str, Any] = {"limits": views.LIMITS_SCHEMA, "price": views.PRICE_SCHEMA}
_KEY_FIELDS: dict[str, Any] = {"scopes": views.SCOPES_SCHEMA, "expires": views.EXPIRES, **_TERMS}
_ACCOUNT_QUERY = {"account": "Of this account alone."}
_KEY_QUERY = {"key": "Of this key alone."}


def router() -> APIRouter:
    """The routes of the administration."""
    routes = APIRouter(tags=["administration"])
    named: dict[str, Any] = {"name": views.NAME}
    add(routes, "GET", "/admin/accounts", _accounts, "All accounts, and what they spent this month")
    add(routes, "POST", "/admin/accounts", _create_account, "A new account", status=201,
        body=views.schema_of(("name",), **named, **_TERMS))  # fmt: skip
    add(routes, "PATCH", "/admin/accounts/{account_id}", _change_account, "Change, close or open an account",
        body=views.schema_of(**named, closed={"type": "boolean"}, **_TERMS))  # fmt: skip
    add(routes, "GET", "/admin/keys", _keys, "All keys", query=_ACCOUNT_QUERY)
    add(routes, "POST", "/admin/keys", _create_key, "A new key for an account", status=201,
        body=views.schema_of(("account", "name"), account={"type": "string"}, **named, **_KEY_FIELDS))  # fmt: skip
    add(routes, "PATCH", "/admin/keys/{key_id}", _change_key, "Change a key",
        body=views.schema_of(**named, **_KEY_FIELDS))  # fmt: skip
    add(routes, "POST", "/admin/keys/{key_id}/revoke", _revoke_key, "End a key, and those made with it")
    add(routes, "POST", "/admin/keys/{key_id}/rotate", _rotate_key, "A new secret for a key",
        body=views.schema_of(grace={"type": ["string", "integer"]}))  # fmt: skip
    add(routes, "GET", "/admin/invites", _invites, "All invites")
    add(routes, "POST", "/admin/invites", _create_invite, "A new invite code", status=201,
        body=views.schema_of(("name",), uses={"type": "integer", "minimum": 1, "maximum": MAX_USES}, **named,
                             **_KEY_FIELDS))  # fmt: skip
    add(routes, "POST", "/admin/invites/{invite_id}/revoke", _revoke_invite, "No more accounts with it")
    part = _ACCOUNT_QUERY | _KEY_QUERY
    add(routes, "GET", "/admin/usage", _usage, "Sums of usage", query=USAGE_QUERY | part)
    days = {n: USAGE_QUERY[n] for n in ("from", "to")}
    add(routes, "GET", "/admin/usage.csv", _csv, "Usage, line by line", query=days | part, media="text/csv")
    return routes


async def _accounts(request: Request) -> Response:
    """All accounts, the oldest first, with their spending of this month."""
    await _admin(request)
    month = day_of(keys_of(request).wall())[:7]

    def ask(connection: Connection) -> list[dict[str, object]]:
        of_month = Slice(first_day=f"{month}-01", last_day=f"{month}-31")
        spent = {row["account"]: row["cost_micro"] for row in usage.sums(connection, of_month, ["account"])}
        return [
            {**views.account_view(a), "month": month, "spent_micro": spent.get(a.id, 0)}
            for a in book.accounts(connection)
        ]

    return told(views.listed(await reading(request, ask)))


async def _create_account(request: Request) -> Response:
    """A new account."""
    await _admin(request)
    now = keys_of(request).wall()
    body = await fields_of(request, "name", *_TERMS)
    terms = views.terms_in({"name": body.get("name"), **body}, now, Limits())
    account = await writing(request, lambda connection: book.create_account(connection, now, **terms))
    return told(views.account_view(account), 201)


async def _change_account(request: Request) -> Response:
    """Change its name, limits or price, or close it: then none of its keys is let in, and its usage stays."""
    await _admin(request)
    account_id, now = request.path_params["account_id"], keys_of(request).wall()
    body = await fields_of(request, "name", "closed", *_TERMS)
    if not isinstance(body.get("closed", False), bool):
        raise Refused(400, f"closed is {body['closed']!r}; true or false was expected")

    def change(connection: Connection) -> records.Account:
        terms = views.terms_in(body, now, book.account(connection, account_id).limits)
        if "closed" in body:
            terms["closed"] = body["closed"]
        return book.change_account(connection, account_id, now, **terms)

    return told(views.account_view(await writing(request, change)))


async def _keys(request: Request) -> Response:
    """All keys, or those of an account."""
    await _admin(request)
    account, now = request.query_params.get("account"), keys_of(request).wall()
    keys = await reading(request, lambda connection: book.keys(connection, account))
    return told(views.listed([views.key_view(k, now) for k in keys]))


async def _create_key(request: Request) -> Response:
    """A key for an account, with any scopes and limits.  Its secret is shown this once."""
    await _admin(request)
    now = keys_of(request).wall()
    body = await fields_of(request, "account", "name", *_KEY_FIELDS)
    account = body.get("account")
    if not isinstance(account, str):
        raise Refused(400, "account is missing; send the id of the account that the key is for")
    terms = {"scopes": book.DEFAULT_SCOPES} | views.terms_in({"name": body.get("name"), **body}, now, Limits())
    key, secret = await writing(request, lambda connection: book.create_key(connection, now, account, **terms))
    return told({**views.key_view(key, now), "secret": secret.text}, 201)


async def _change_key(request: Request) -> Response:
    """Change its name, scopes, end, limits or price."""
    await _admin(request)
    key_id, now = request.path_params["key_id"], keys_of(request).wall()
    body = await fields_of(request, "name", *_KEY_FIELDS)

    def change(connection: Connection) -> records.Key:
        terms = views.terms_in(body, now, book.key(connection, key_id).limits)
        return book.change_key(connection, key_id, **terms)

    return told(views.key_view(await writing(request, change), now))


async def _revoke_key(request: Request) -> Response:
    """End a key at once and for ever, and with it those made with it."""
    await _admin(request)
    key_id, now = request.path_params["key_id"], keys_of(request).wall()
    ended = await writing(request, lambda connection: book.revoke_key(connection, key_id, now))
    return told(views.listed([views.key_view(k, now) for k in ended]))


async def _rotate_key(request: Request) -> Response:
    """A new secret for the same key, shown this once; the old one is taken for `grace` seconds yet."""
    await _admin(request)
    key_id, now = request.path_params["key_id"], keys_of(request).wall()
    body = await fields_of(request, "grace")
    grace_s = records.span_of(body.get("grace", 0), "grace", book.LONGEST_GRACE_S)
    key, secret = await writing(request, lambda connection: book.rotate_key(connection, key_id, now, grace_s))
    return told({**views.key_view(key, now), "secret": secret.text})


async def _invites(request: Request) -> Response:
    """All invites, without their codes."""
    await _admin(request)
    now = keys_of(request).wall()
    found = await reading(request, invites.invites)
    return told(views.listed([views.invite_view(i, now) for i in found]))


async def _create_invite(request: Request) -> Response:
    """A code with which `uses` accounts can be made, under these limits.  It is shown this once."""
    await _admin(request)
    now = keys_of(request).wall()
    body = await fields_of(request, "name", "uses", *_KEY_FIELDS)
    uses = body.get("uses", 1)
    if isinstance(uses, bool) or not isinstance(uses, int) or not 1 <= uses <= MAX_USES:
        raise Refused(400, f"uses is {repr(uses)[:60]}; an integer from 1 to {MAX_USES} was expected")
    terms = views.terms_in({"name": body.get("name"), **body}, now, Limits())
    invite, code = await writing(request, lambda c: invites.create_invite(c, now, uses=uses, **terms))
    return told({**views.invite_view(invite, now), "code": code.text}, 201)


async def _revoke_invite(request: Request) -> Response:
    """No more accounts with this code; those made with it stay."""
    await _admin(request)
    invite_id, now = request.path_params["invite_id"], keys_of(request).wall()
    invite = await writing(request, lambda connection: invites.revoke_invite(connection, invite_id, now))
    return told(views.invite_view(invite, now))


async def _usage(request: Request) -> Response:
    """Requests, tokens and cost by day, key, model or account."""
    await _admin(request)
    return await usage_told(request, _part(request))


async def _csv(request: Request) -> Response:
    """A line for each request."""
    await _admin(request)
    return await lines_told(request, _part(request))


async def _admin(request: Request) -> None:
    keys_of(request)
    await caller_of(request, ADMIN)


def _part(request: Request) -> Callable[[Connection, str, str], Slice]:
    query = request.query_params
    keys = frozenset([query["key"]]) if "key" in query else None
    return lambda connection, first, last: Slice(query.get("account"), keys, first, last)
