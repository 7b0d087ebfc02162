"""Records as rows of the store's tables, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import Row

from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import UNCHANGED, Account, Invite, Key, Limits


def row_of(record: Account | Key | Invite) -> dict[str, Any]:
    """A record's columns."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    nested = {n: fields.pop(n) for n in ("limits", "price", "scopes") if n in fields}
    return fields | changes(**nested)


def changes(**fields: Any) -> dict[str, Any]:
    """The columns of the fields that change."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if value is UNCHANGED:
            continue
        if name == "limits":
            values |= dataclasses.asdict(value)
        elif name == "price":
            prices = (value.prompt, value.cached, value.output) if value else (None, None, None)
            values |= dict(zip(("price_prompt", "price_cached", "price_output"), prices, strict=True))
        elif name == "scopes":
            values["scopes"] = ",".join(sorted(value))
        else:
            values[name] = value
    return values


def account_in(row: Row[Any]) -> Account:
    """The account in a row."""
    return Account(row.id, row.name, row.created, row.closed, _limits(row), _price(row))


def key_in(row: Row[Any]) -> Key:
    """The key in a row."""
    return Key(
        row.id, row.account, row.parent, row.name, frozenset(row.scopes.split(",")), row.created, row.expires,
        row.last_used, row.revoked, row.old_until, _limits(row), _price(row),
    )  # fmt: skip


def invite_in(row: Row[Any]) -> Invite:
    """The invite in a row."""
    return Invite(
        row.id, row.name, row.created, row.expires, row.revoked, row.uses_left, frozenset(row.scopes.split(",")),
        _limits(row), _price(row),
    )  # fmt: skip


def _limits(row: Row[Any]) -> Limits:
    return Limits(row.requests_per_min, row.tokens_per_min, row.max_concurrent, row.budget_micro)


def _price(row: Row[Any]) -> Price | None:
    return None if row.price_prompt is None else Price(row.price_prompt, row.price_cached, row.price_output)
