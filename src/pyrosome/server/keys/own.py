"""What a key with the scope `account` may do about the keys of its account.

It never gets more than it has: neither by making a key, nor by changing one, nor by taking another's secret.  A key
that no other made sees all keys of its account; any other sees itself and those made with it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from pyrosome.server.caller import ACCOUNT, Caller
from pyrosome.server.keys import book, invites
from pyrosome.server.keys.book import Known
from pyrosome.server.keys.keys import NOBODYS, Secret, is_same
from pyrosome.server.keys.records import UNCHANGED, Account, Key, Limits, iso
from pyrosome.server.problems import Refused


def asking(connection: Connection, caller: Caller, now: float) -> Known:
    """The key that asks, as it is now.

    Raises:
        Refused: 401, 403, it is not valid any more, or has lost the scope.
    """
    known = book.known(connection, caller.key)
    if known is None or known.state(now) != "active":
        raise Refused(401, "this key is not valid any more", headers={"WWW-Authenticate": "Bearer"})
    if ACCOUNT not in known.key.scopes:
        raise Refused(403, f"this key may not do that any more; it needs the scope {ACCOUNT!r}")
    return known


def visible(connection: Connection, me: Known) -> list[Key]:
    """The keys it sees."""
    of_account = book.keys(connection, me.account.id)
    return of_account if me.key.parent is None else [me.key, *book.made_with(of_account, me.key.id)]


def find(connection: Connection, me: Known, key_id: str) -> Key:
    """A key it sees.

    Raises:
        Refused: 404, as where there is no such key at all.
    """
    for key in visible(connection, me):
        if key.id == key_id:
            return key
    raise Refused(404, f"there is no key {key_id[:60]!r}")


def create(
    connection: Connection,
    me: Known,
    now: float,
    name: str,
    scopes: frozenset[str] | None,
    expires: int | None,
    limits: Limits,
) -> tuple[Key, Secret]:
    """A key made with this one: it shares this one's limits, and ends when this one does.

    Raises:
        Refused: 403, it asks for more than this key has; 409.
    """
    wanted = scopes or me.key.scopes & book.DEFAULT_SCOPES or me.key.scopes
    _within(me, wanted, expires, limits)
    ends = expires if expires is not None else _ends(me)
    return book.create_key(
        connection, now, me.account.id, name, wanted, parent=me.key.id, expires=ends, limits=limits
    )  # fmt: skip


def change(
    connection: Connection,
    me: Known,
    key_id: str,
    *,
    name: str = UNCHANGED,
    scopes: frozenset[str] = UNCHANGED,
    expires: int | None = UNCHANGED,
    limits: Limits = UNCHANGED,
) -> Key:
    """Change a key made with this one, within what this one has; or itself, or another, to less than it has now.

    Raises:
        Refused: 403, 404.
    """
    key = find(connection, me, key_id)
    changes = {"scopes": scopes, "expires": expires, "limits": limits}
    given: dict[str, Any] = {n: v for n, v in changes.items() if v is not UNCHANGED}
    if _is_below(connection, me, key):
        _within(me, given.get("scopes", frozenset()), given.get("expires"), given.get("limits", Limits()))
        if "expires" in given and expires is None:
            given["expires"] = _ends(me)
    else:
        _not_more(key, **given)
    return book.change_key(connection, key_id, name=name, **given)


def revoke(connection: Connection, me: Known, key_id: str, now: float) -> list[Key]:
    """Revoke a key it sees, and those made with that one; itself too.

    Raises:
        Refused: 404.
    """
    find(connection, me, key_id)
    return book.revoke_key(connection, key_id, now)


def rotate(connection: Connection, me: Known, key_id: str, now: float, grace_s: int) -> tuple[Key, Secret]:
    """A new secret for itself or for a key made with it.

    Raises:
        Refused: 403 for another key, whose secret could open more; 404; 409.
    """
    key = find(connection, me, key_id)
    if key.id != me.key.id and not _is_below(connection, me, key):
        raise Refused(403, f"the key {key_id} was not made with this one; rotate it with itself, or revoke it")
    return book.rotate_key(connection, key_id, now, grace_s)


def sign_up(connection: Connection, now: float, code: Secret | None, name: str) -> tuple[Account, Key, Secret]:
    """An account for whoever has an invite's code, and its first key.

    Raises:
        Refused: 403, the code is wrong, used up, expired or revoked: which of these is not told.
    """
    invite = invites.take_invite(connection, code.id, now) if code and is_invite(connection, code) else None
    if invite is None:
        raise not_invited()
    account = book.create_account(connection, now, name, invite.limits, invite.price)
    key, secret = book.create_key(connection, now, account.id, "first key", invite.scopes)
    return account, key, secret


def is_invite(connection: Connection, code: Secret | None) -> bool:
    """Whether that is an invite's code, which may be used up."""
    stored = invites.invite_digest(connection, code.id) if code else None
    return is_same(code.digest if code else "", stored or NOBODYS)


def not_invited() -> Refused:
    """What is said about every code that makes no account."""
    return Refused(403, "this invite code is not valid, or not any more; ask for a new one")


def _is_below(connection: Connection, me: Known, key: Key) -> bool:
    return any(k.id == me.key.id for k in book.ancestors(connection, key.id)[1:])


def _not_more(
    key: Key, scopes: frozenset[str] = UNCHANGED, expires: int | None = UNCHANGED, limits: Limits = UNCHANGED
) -> None:
    more = [] if scopes is UNCHANGED else sorted(scopes - key.scopes)
    more += [] if limits is UNCHANGED else limits.wider(key.limits)
    if expires is not UNCHANGED and key.expires is not None and (expires is None or expires > key.expires):
        more.append("expires")
    if more:
        raise Refused(403, f"the key {key.id} was not made with this one, which cannot give it more: {', '.join(more)}")


def _within(me: Known, scopes: frozenset[str], expires: int | None, limits: Limits) -> None:
    more = sorted(scopes - me.key.scopes)
    bounds = [me.account.limits, *(k.limits for k in (me.key, *me.ancestors))]
    more += [name for bound in bounds for name in limits.above(bound)]
    if more:
        names = ", ".join(dict.fromkeys(more))
        raise Refused(403, f"a key cannot give more than it has, and this one has less of: {names}")
    ends = _ends(me)
    if ends is not None and expires is not None and expires > ends:
        raise Refused(403, f"a key ends with the one it was made with, and this one ends at {iso(ends)}")


def _ends(me: Known) -> int | None:
    ends = [k.expires for k in (me.key, *me.ancestors) if k.expires is not None]
    return min(ends, default=None)
