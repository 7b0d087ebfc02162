"""Invites: codes with which strangers make an account each, under limits that were set beforehand."""

from __future__ import annotations

from sqlalchemy import Connection, or_, select, update

from pyrosome.server.caller import ACCOUNT, GENERATE, SESSIONS
from pyrosome.server.keys import schema
from pyrosome.server.keys.keys import INVITE, Secret, new_secret
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import Invite, Limits
from pyrosome.server.keys.rows import invite_in, row_of
from pyrosome.server.problems import Refused

SELF_SCOPES = frozenset({GENERATE, SESSIONS, ACCOUNT})  # of the first key of an account that signed up
_INVITES = schema.invites.c


def create_invite(
    connection: Connection,
    now: float,
    name: str,
    *,
    uses: int = 1,
    expires: int | None = None,
    scopes: frozenset[str] = SELF_SCOPES,
    limits: Limits | None = None,
    price: Price | None = None,
) -> tuple[Invite, Secret]:
    """A new invite and its code."""
    secret = new_secret(INVITE)
    invite = Invite(secret.id, name, int(now), expires, None, uses, scopes, limits or Limits(), price)
    connection.execute(schema.invites.insert().values(**row_of(invite), digest=secret.digest))
    return invite, secret


def invites(connection: Connection) -> list[Invite]:
    """All, the oldest first."""
    return [invite_in(r) for r in connection.execute(select(schema.invites).order_by(_INVITES.created, _INVITES.id))]


def revoke_invite(connection: Connection, invite_id: str, now: float) -> Invite:
    """No more accounts with it.

    Raises:
        Refused: 404.
    """
    where = _INVITES.id == invite_id
    connection.execute(update(schema.invites).where(where, _INVITES.revoked.is_(None)).values(revoked=int(now)))
    row = connection.execute(select(schema.invites).where(where)).first()
    if row is None:
        raise Refused(404, f"there is no invite {invite_id[:60]!r}")
    return invite_in(row)


def take_invite(connection: Connection, invite_id: str, now: float) -> Invite | None:
    """Use it once; None where it cannot be used.  Two who use the last of it at once: one has it."""
    where = (
        (_INVITES.id == invite_id)
        & (_INVITES.uses_left > 0)
        & _INVITES.revoked.is_(None)
        & or_(_INVITES.expires.is_(None), _INVITES.expires > now)
    )
    took = connection.execute(update(schema.invites).where(where).values(uses_left=_INVITES.uses_left - 1))
    if not took.rowcount:
        return None
    return invite_in(connection.execute(select(schema.invites).where(_INVITES.id == invite_id)).one())


def invite_digest(connection: Connection, invite_id: str) -> str | None:
    """What its code must come to."""
    return connection.execute(select(_INVITES.digest).where(_INVITES.id == invite_id)).scalar()
