"""The book of accounts, keys and invites: all that can be done to them.  Each function works in an open transaction.

Who may do what is not asked here: `own` has the rules for keys that manage their account's, and whoever reaches the
store itself, or has the scope `admin`, may do anything.
"""

from __future__ import annotations

import collections
import dataclasses
import secrets
from collections.abc import Iterable

from sqlalchemy import Connection, func, or_, select, update

from pyrosome.errors import RequestError
from pyrosome.server.caller import GENERATE, SESSIONS
from pyrosome.server.keys import schema
from pyrosome.server.keys.keys import ID_CHARS, KEY, Secret, new_id, new_secret
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import UNCHANGED, Account, Key, Limits
from pyrosome.server.keys.rows import account_in, changes, key_in, row_of
from pyrosome.server.problems import Refused

DEFAULT_SCOPES = frozenset({GENERATE, SESSIONS})
MAX_KEYS = 200  # that are active, of one account
MAX_CHAIN = 4  # keys made by keys made by keys
LONGEST_GRACE_S = 30 * 86400
_ACCOUNTS, _KEYS = schema.accounts.c, schema.keys.c


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """A key with all that decides whether it is let in, and under which limits."""

    key: Key
    account: Account
    ancestors: tuple[Key, ...]  # the key it was made with, the one that was made with, ...
    salt: str = dataclasses.field(repr=False)
    digest: str = dataclasses.field(repr=False)
    old_digest: str | None = dataclasses.field(repr=False)

    def state(self, now: float) -> str:
        """ "active", "expired", "revoked" or "closed": of the key and of all it hangs on."""
        if self.account.closed is not None:
            return "closed"
        states = [k.state(now) for k in (self.key, *self.ancestors)]
        return next((s for s in states if s != "active"), "active")

    @property
    def price(self) -> Price | None:
        """The nearest price; None: the server's."""
        own = [k.price for k in (self.key, *self.ancestors)] + [self.account.price]
        return next((p for p in own if p), None)


# Accounts


def create_account(
    connection: Connection, now: float, name: str, limits: Limits | None = None, price: Price | None = None
) -> Account:
    """A new account, with a salt of its own, so that nobody shares its prefixes."""
    account = Account(f"acct-{new_id()}", name, int(now), None, limits or Limits(), price)
    row = row_of(account) | {"salt": secrets.token_hex(16)}
    connection.execute(schema.accounts.insert().values(**row))
    return account


def accounts(connection: Connection) -> list[Account]:
    """All, the oldest first."""
    return [
        account_in(r) for r in connection.execute(select(schema.accounts).order_by(_ACCOUNTS.created, _ACCOUNTS.id))
    ]


def account(connection: Connection, account_id: str) -> Account:
    """One account.

    Raises:
        Refused: 404.
    """
    row = connection.execute(select(schema.accounts).where(_ACCOUNTS.id == account_id)).first()
    if row is None:
        raise Refused(404, f"there is no account {account_id[:60]!r}")
    return account_in(row)


def account_called(connection: Connection, name: str) -> Account | None:
    """The account with that id or name, where there is one.

    Raises:
        RequestError: several have that name.
    """
    where = or_(_ACCOUNTS.id == name, _ACCOUNTS.name == name)
    found = [account_in(r) for r in connection.execute(select(schema.accounts).where(where))]
    if len(found) > 1:
        raise RequestError(
            f"{len(found)} accounts are called {name!r}; name one by id: {', '.join(a.id for a in found)}"
        )
    return found[0] if found else None


def change_account(
    connection: Connection,
    account_id: str,
    now: float,
    *,
    name: str = UNCHANGED,
    limits: Limits = UNCHANGED,
    price: Price | None = UNCHANGED,
    closed: bool = UNCHANGED,
) -> Account:
    """Change it.  A closed account's keys are not let in; its usage stays.

    Raises:
        Refused: 404.
    """
    account(connection, account_id)
    values = changes(name=name, limits=limits, price=price)
    if closed is not UNCHANGED:
        values["closed"] = int(now) if closed else None
    if values:
        connection.execute(update(schema.accounts).where(_ACCOUNTS.id == account_id).values(**values))
    return account(connection, account_id)


# Keys


def create_key(
    connection: Connection,
    now: float,
    account_id: str,
    name: str,
    scopes: frozenset[str],
    *,
    parent: str | None = None,
    expires: int | None = None,
    limits: Limits | None = None,
    price: Price | None = None,
) -> tuple[Key, Secret]:
    """A new key and its secret, which nobody can get again.

    Raises:
        Refused: 404, 409 for a closed account, or one that has as many keys as it may.
    """
    if account(connection, account_id).closed is not None:
        raise Refused(409, f"the account {account_id} is closed; open it first")
    active = (_KEYS.revoked.is_(None)) & (or_(_KEYS.expires.is_(None), _KEYS.expires > now))
    count = select(func.count()).where(_KEYS.account == account_id, active)
    if connection.execute(count).scalar_one() >= MAX_KEYS:
        raise Refused(409, f"the account has {MAX_KEYS} active keys, as many as it may; revoke some first")
    if parent is not None and len(ancestors(connection, parent)) >= MAX_CHAIN:
        raise Refused(409, f"keys may make keys {MAX_CHAIN - 1} times over, not more; use one made earlier")
    secret = new_secret(KEY)
    key = Key(
        secret.id, account_id, parent, name, scopes, int(now), expires, None, None, None, limits or Limits(), price
    )
    connection.execute(schema.keys.insert().values(**row_of(key), digest=secret.digest))
    return key, secret


def keys(connection: Connection, account_id: str | None = None) -> list[Key]:
    """All keys, or an account's, the oldest first."""
    ask = select(schema.keys).order_by(_KEYS.created, _KEYS.id)
    return [
        key_in(r) for r in connection.execute(ask if account_id is None else ask.where(_KEYS.account == account_id))
    ]


def key(connection: Connection, key_id: str) -> Key:
    """One key.

    Raises:
        Refused: 404.
    """
    row = connection.execute(select(schema.keys).where(_KEYS.id == key_id)).first()
    if row is None:
        raise Refused(404, f"there is no key {key_id[:60]!r}")
    return key_in(row)


def key_called(connection: Connection, text: str) -> Key:
    """The key with that id, with or without `pyr-`, or the only one with that name that is not revoked.

    Raises:
        RequestError: there is none, or there are several.
    """
    public_id = text.removeprefix(KEY)[:ID_CHARS]  # of a whole key too, whose secret is repeated nowhere
    row = connection.execute(select(schema.keys).where(_KEYS.id == public_id)).first()
    if row is not None:
        return key_in(row)
    found = [k for k in keys(connection) if k.name == text and k.revoked is None]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"{len(found)} keys are called {text!r}; name one by id: {', '.join(k.id for k in found)}")
    shown = KEY + public_id if text.startswith(KEY) else text
    raise RequestError(f"there is no key {shown[:60]!r}; `pyrosome keys list` shows those there are")


def known(connection: Connection, key_id: str) -> Known | None:
    """A key and all that it hangs on."""
    row = connection.execute(select(schema.keys).where(_KEYS.id == key_id)).first()
    if row is None:
        return None
    of = connection.execute(select(schema.accounts).where(_ACCOUNTS.id == row.account)).one()
    above = tuple(ancestors(connection, row.parent)) if row.parent else ()
    return Known(key_in(row), account_in(of), above, of.salt, row.digest, row.old_digest)


def ancestors(connection: Connection, key_id: str) -> list[Key]:
    """A key, the one it was made with, and so on."""
    found = [key(connection, key_id)]
    while (parent := found[-1].parent) is not None:
        found.append(key(connection, parent))
    return found


def made_with(all_keys: Iterable[Key], key_id: str) -> list[Key]:
    """Of an account's keys those made with that one, and with those, and so on."""
    children = collections.defaultdict(list)
    for one in all_keys:
        children[one.parent].append(one)
    found, parents = [], [key_id]
    while parents:
        made = children[parents.pop()]
        found += made
        parents += [one.id for one in made]
    return found


def change_key(
    connection: Connection,
    key_id: str,
    *,
    name: str = UNCHANGED,
    scopes: frozenset[str] = UNCHANGED,
    expires: int | None = UNCHANGED,
    limits: Limits = UNCHANGED,
    price: Price | None = UNCHANGED,
) -> Key:
    """Change it.

    Raises:
        Refused: 404.
    """
    key(connection, key_id)
    values = changes(name=name, limits=limits, price=price, scopes=scopes)
    if expires is not UNCHANGED:
        values["expires"] = expires
    if values:
        connection.execute(update(schema.keys).where(_KEYS.id == key_id).values(**values))
    return key(connection, key_id)


def revoke_key(connection: Connection, key_id: str, now: float) -> list[Key]:
    """Never let it in again, nor those made with it; the keys that this ended.

    Raises:
        Refused: 404.
    """
    one = key(connection, key_id)
    ended = [k.id for k in (one, *made_with(keys(connection, one.account), key_id)) if k.revoked is None]
    for ended_id in ended:
        values = {"revoked": int(now), "old_digest": None, "old_until": None}
        connection.execute(update(schema.keys).where(_KEYS.id == ended_id).values(**values))
    return [key(connection, i) for i in ended]


def rotate_key(connection: Connection, key_id: str, now: float, grace_s: int = 0) -> tuple[Key, Secret]:
    """A new secret for the same key; the old one is taken for so long yet.

    Raises:
        Refused: 404, or 409 where the key is revoked.
    """
    if key(connection, key_id).revoked is not None:
        raise Refused(409, f"the key {key_id} is revoked; make a new one")
    secret = new_secret(KEY, key_id)
    old = (
        {"old_digest": _KEYS.digest, "old_until": int(now) + grace_s}
        if grace_s
        else {"old_digest": None, "old_until": None}
    )
    connection.execute(update(schema.keys).where(_KEYS.id == key_id).values(digest=secret.digest, **old))
    return key(connection, key_id), secret


def note_use(connection: Connection, key_id: str, now: float) -> None:
    """Remember when a key was last used."""
    connection.execute(update(schema.keys).where(_KEYS.id == key_id).values(last_used=int(now)))


def has_active_key(connection: Connection, now: float) -> bool:
    """Whether anybody at all could be let in."""
    open_accounts = {a.id for a in accounts(connection) if a.closed is None}
    return any(k.account in open_accounts and k.state(now) == "active" for k in keys(connection))
