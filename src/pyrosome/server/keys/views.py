"""Accounts, keys, invites and usage as the API and the commands show them, and the bodies the API takes."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pyrosome.errors import RequestError
from pyrosome.server.caller import SCOPES
from pyrosome.server.keys import records
from pyrosome.server.keys.keys import KEY
from pyrosome.server.keys.ledger import COUNTS
from pyrosome.server.keys.money import Price, shown
from pyrosome.server.keys.records import Account, Invite, Key, Limits, iso

PRICE_NAMES = ("prompt_micro", "cached_micro", "output_micro")

NAME = {"type": "string", "minLength": 1, "maxLength": records.MAX_NAME_CHARS}
SCOPES_SCHEMA = {"type": "array", "items": {"enum": list(SCOPES)}, "minItems": 1}
EXPIRES = {
    "type": ["string", "integer", "null"],
    "description": "A date, a time, a span such as 30d, or seconds since 1970; null: never.",
}
LIMITS_SCHEMA = {
    "type": "object",
    "properties": {
        f.name: {"type": ["integer", "null"], "minimum": 0 if f.name == "budget_micro" else 1}
        for f in dataclasses.fields(Limits)
    },
    "additionalProperties": False,
    "description": "Those given are changed; null takes one away. budget_micro: money in a month, in millionths.",
}
PRICE_SCHEMA = {
    "type": ["object", "null"],
    "properties": {n: {"type": "integer", "minimum": 0} for n in PRICE_NAMES},
    "required": list(PRICE_NAMES),
    "additionalProperties": False,
    "description": "Millionths for a million tokens; null: the server's own.",
}


def schema_of(required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    """The JSON Schema of a body."""
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": list(required)} if required else {})


def account_view(account: Account) -> dict[str, Any]:
    """An account."""
    return {
        "object": "account", "id": account.id, "name": account.name, "created": iso(account.created),
        "closed": iso(account.closed), **_terms(account),
    }  # fmt: skip


def key_view(key: Key, now: float) -> dict[str, Any]:
    """A key; its secret is in no view."""
    return {
        "object": "key", "id": key.id, "prefix": KEY + key.id, "name": key.name, "account": key.account,
        "made_with": key.parent, "state": key.state(now), "scopes": _scopes(key.scopes), "created": iso(key.created),
        "expires": iso(key.expires), "last_used": iso(key.last_used), "revoked": iso(key.revoked),
        "old_secret_until": iso(key.old_until if (key.old_until or 0) > now else None), **_terms(key),
    }  # fmt: skip


def invite_view(invite: Invite, now: float) -> dict[str, Any]:
    """An invite, without its code."""
    is_over = (
        invite.revoked is not None or not invite.uses_left or (invite.expires is not None and now >= invite.expires)
    )
    return {
        "object": "invite", "id": invite.id, "name": invite.name, "state": "over" if is_over else "open",
        "uses_left": invite.uses_left, "created": iso(invite.created), "expires": iso(invite.expires),
        "revoked": iso(invite.revoked), "scopes": _scopes(invite.scopes), **_terms(invite),
    }  # fmt: skip


def price_view(price: Price | None) -> dict[str, int] | None:
    """A price."""
    values = price and (price.prompt, price.cached, price.output)
    return dict(zip(PRICE_NAMES, values, strict=True)) if values else None


def usage_view(rows: Sequence[Mapping[str, Any]], first: str, last: str, by: Sequence[str]) -> dict[str, Any]:
    """Sums of the ledger, and of them all."""
    names = ("requests", *COUNTS, "cost_micro")
    total = {n: sum(row[n] for row in rows) for n in names}
    with_cost = [{**row, "cost": shown(row["cost_micro"])} for row in rows]
    return {
        "object": "usage", "from": first, "to": last, "by": list(by),
        "total": {**total, "cost": shown(total["cost_micro"])}, "data": with_cost,
    }  # fmt: skip


def listed(data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A list."""
    return {"object": "list", "data": list(data)}


def known_fields(body: Mapping[str, Any], *names: str) -> None:
    """Refuse a body with any other field.

    Raises:
        RequestError: it has one.
    """
    for name in body:
        if name not in names:
            raise RequestError(f"the field {name[:60]!r} is unknown here; there are {', '.join(names) or 'none'}")


def terms_in(body: Mapping[str, Any], now: float, limits: Limits) -> dict[str, Any]:
    """What a body says of a key, an account or an invite; a field that is not there is not in the result.

    Raises:
        RequestError: what is wrong with it.
    """
    found: dict[str, Any] = {}
    if "name" in body:
        found["name"] = records.name_of(body["name"])
    if "scopes" in body:
        found["scopes"] = records.scopes_of(body["scopes"])
    if "expires" in body:
        found["expires"] = records.time_of(body["expires"], now)
    if "limits" in body:
        found["limits"] = records.changed_limits(body["limits"], limits)
    if "price" in body:
        found["price"] = records.price_of(body["price"])
    return found


def days_in(query: Mapping[str, str], now: float) -> tuple[str, str]:
    """The first and last day a query asks for; without any, this month's until today.

    Raises:
        RequestError: they are no dates.
    """
    today = records.day_of(now)
    found = {}
    for name, default in (("from", today[:8] + "01"), ("to", today)):
        try:
            found[name] = datetime.date.fromisoformat(query.get(name) or default).isoformat()
        except ValueError:
            raise RequestError(f"{name} is {query[name][:60]!r}; a day like {today} was expected") from None
    return found["from"], found["to"]


def _terms(of: Account | Key | Invite) -> dict[str, Any]:
    return {"limits": dataclasses.asdict(of.limits), "price": price_view(of.price)}


def _scopes(scopes: frozenset[str]) -> list[str]:
    return [s for s in SCOPES if s in scopes]
