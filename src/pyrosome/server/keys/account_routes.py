"""`/account/...`: what accounts do about their own keys, and what they see of their own usage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection
from starlette.responses import Response

from pyrosome.server.caller import ACCOUNT, Caller
from pyrosome.server.keys import book, own, records, views
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
from pyrosome.server.keys.keys import INVITE, read_secret
from pyrosome.server.keys.money import shown
from pyrosome.server.keys.records import Limits, day_of
from pyrosome.server.keys.usage import Slice, spent
from pyrosome.server.problems import Refused
from pyrosome.server.routes import caller_of, service_of

_KEY_FIELDS: dict[str, Any] = {"scopes": views.SCOPES_SCHEMA, "expires": views.EXPIRES, "limits": views.LIMITS_SCHEMA}


def router() -> APIRouter:
    """The routes of accounts."""
    routes = APIRouter(tags=["account"])
    add(routes, "GET", "/account/about", _about, "How to get in")
    add(routes, "POST", "/account/sign-up", _sign_up, "An account for an invite code", status=201,
        body=views.schema_of(("code", "name"), code={"type": "string"}, name=views.NAME))  # fmt: skip
    add(routes, "GET", "/account/me", _me, "The account and the key that ask")
    add(routes, "GET", "/account/keys", _list, "The account's keys")
    add(routes, "POST", "/account/keys", _create, "A new key", status=201,
        body=views.schema_of(("name",), name=views.NAME, **_KEY_FIELDS))  # fmt: skip
    add(routes, "GET", "/account/keys/{key_id}", _one, "A key")
    add(routes, "PATCH", "/account/keys/{key_id}", _change, "Change a key",
        body=views.schema_of(name=views.NAME, **_KEY_FIELDS))  # fmt: skip
    add(routes, "POST", "/account/keys/{key_id}/revoke", _revoke, "End a key, and those made with it")
    add(routes, "POST", "/account/keys/{key_id}/rotate", _rotate, "A new secret for a key",
        body=views.schema_of(grace={"type": ["string", "integer"]}))  # fmt: skip
    add(routes, "GET", "/account/usage", _usage, "Sums of the account's usage", query=USAGE_QUERY)
    days = {n: USAGE_QUERY[n] for n in ("from", "to")}
    add(routes, "GET", "/account/usage.csv", _csv, "The account's usage, line by line", query=days, media="text/csv")
    return routes


async def _about(request: Request) -> Response:
    """Whether keys are needed, and whether an invite code makes an account."""
    door = keys_of(request)
    return told({"keys": "needed" if door.is_needed else "optional", "sign_up": service_of(request).options.sign_up})


async def _sign_up(request: Request) -> Response:
    """Make an account with an invite's code.  The key in the answer is shown this once."""
    door = keys_of(request)
    if not service_of(request).options.sign_up:
        raise Refused(403, "accounts are not made here with invite codes (--sign-up allows it); ask for a key")
    body = await fields_of(request, "code", "name")
    code, name = body.get("code"), records.name_of(body.get("name"))
    if not isinstance(code, str):
        raise Refused(400, "code is missing; send the invite code as text")
    secret = read_secret(INVITE, code.strip())
    if not await reading(request, lambda connection: own.is_invite(connection, secret)):
        raise own.not_invited()  # before the one writer is asked for anything
    account, key, made = await writing(request, lambda connection: own.sign_up(connection, door.wall(), secret, name))
    view = views.key_view(key, door.wall())
    return told({"account": views.account_view(account), "key": view, "secret": made.text}, 201)


async def _me(request: Request) -> Response:
    """The account, the key that asks, the price, and what both have spent this month."""
    caller, door = await _caller(request), keys_of(request)
    month = day_of(door.wall())[:7]

    def ask(connection: Connection) -> dict[str, object]:
        me = own.asking(connection, caller, door.wall())
        by_level = spent(connection, me.account.id, month)
        view: dict[str, object] = {
            "account": views.account_view(me.account), "key": views.key_view(me.key, door.wall()),
            "price": views.price_view(me.price or door.price), "month": month,
            "spent_by_key_micro": by_level.get(me.key.id, 0), "spent_by_key": shown(by_level.get(me.key.id, 0)),
        }  # fmt: skip
        if me.key.parent is None:
            total = by_level[me.account.id]
            view |= {"spent_micro": total, "spent": shown(total)}
        return view

    return told(await reading(request, ask))


async def _list(request: Request) -> Response:
    """All keys of the account; for a key that another made, itself and those made with it."""
    caller, now = await _caller(request), keys_of(request).wall()
    keys = await reading(request, lambda connection: own.visible(connection, own.asking(connection, caller, now)))
    return told(views.listed([views.key_view(k, now) for k in keys]))


async def _one(request: Request) -> Response:
    """A key of the account."""
    caller, now, key_id = await _caller(request), keys_of(request).wall(), request.path_params["key_id"]
    key = await reading(
        request, lambda connection: own.find(connection, own.asking(connection, caller, now), key_id)
    )  # fmt: skip
    return told(views.key_view(key, now))


async def _create(request: Request) -> Response:
    """A key made with the one that asks, with no more scopes and no wider limits.  Its secret is shown this once."""
    caller, now = await _caller(request), keys_of(request).wall()
    body = await fields_of(request, "name", *_KEY_FIELDS)
    terms = views.terms_in({"name": body.get("name"), **body}, now, Limits())
    key, secret = await writing(
        request,
        lambda connection: own.create(
            connection, own.asking(connection, caller, now), now, terms["name"], terms.get("scopes"),
            terms.get("expires"), terms.get("limits", Limits()),
        ),
    )  # fmt: skip
    return told({**views.key_view(key, now), "secret": secret.text}, 201)


async def _change(request: Request) -> Response:
    """Change a key's name, scopes, end or limits, within what the one that asks may give."""
    caller, now, key_id = await _caller(request), keys_of(request).wall(), request.path_params["key_id"]
    body = await fields_of(request, "name", *_KEY_FIELDS)

    def change(connection: Connection) -> records.Key:
        me = own.asking(connection, caller, now)
        terms = views.terms_in(body, now, own.find(connection, me, key_id).limits)
        return own.change(connection, me, key_id, **terms)

    return told(views.key_view(await writing(request, change), now))


async def _revoke(request: Request) -> Response:
    """End a key at once and for ever, and with it those made with it."""
    caller, now, key_id = await _caller(request), keys_of(request).wall(), request.path_params["key_id"]
    ended = await writing(
        request, lambda connection: own.revoke(connection, own.asking(connection, caller, now), key_id, now)
    )  # fmt: skip
    return told(views.listed([views.key_view(k, now) for k in ended]))


async def _rotate(request: Request) -> Response:
    """A new secret for the same key, shown this once; the old one is taken for `grace` seconds yet."""
    caller, now, key_id = await _caller(request), keys_of(request).wall(), request.path_params["key_id"]
    body = await fields_of(request, "grace")
    grace_s = records.span_of(body.get("grace", 0), "grace", book.LONGEST_GRACE_S)
    key, secret = await writing(
        request, lambda connection: own.rotate(connection, own.asking(connection, caller, now), key_id, now, grace_s)
    )  # fmt: skip
    return told({**views.key_view(key, now), "secret": secret.text})


async def _usage(request: Request) -> Response:
    """Requests, tokens and cost by day, key or model."""
    return await usage_told(request, _part(await _caller(request), keys_of(request).wall()))


async def _csv(request: Request) -> Response:
    """A line for each request."""
    return await lines_told(request, _part(await _caller(request), keys_of(request).wall()))


async def _caller(request: Request) -> Caller:
    keys_of(request)
    return await caller_of(request, ACCOUNT)


def _part(caller: Caller, now: float) -> Callable[[Connection, str, str], Slice]:
    def part(connection: Connection, first: str, last: str) -> Slice:
        me = own.asking(connection, caller, now)
        keys = None if me.key.parent is None else frozenset(k.id for k in own.visible(connection, me))
        return Slice(me.account.id, keys, first, last)

    return part
