"""The store's tables, and how a store of an earlier version becomes one of today's."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import BigInteger, Column, Connection, Float, ForeignKey, MetaData, Table, Text, select, text, update
from sqlalchemy import inspect as looked_at

from pyrosome.errors import RequestError

metadata = MetaData()
_LOCK = 0x70797230  # an advisory lock's number, PostgreSQL's only

# Written out, since the first version stays as it was whatever the tables above it become.
_LIMITS = "requests_per_min BIGINT, tokens_per_min BIGINT, max_concurrent BIGINT, budget_micro BIGINT"
_PRICES = "price_prompt BIGINT, price_cached BIGINT, price_output BIGINT"
_COUNTS = "prompt_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL"
MIGRATIONS: Sequence[Sequence[str]] = (
    (
        "CREATE TABLE accounts (id TEXT PRIMARY KEY, name TEXT NOT NULL, salt TEXT NOT NULL, created BIGINT NOT NULL, "
        f"closed BIGINT, {_LIMITS}, {_PRICES})",
        "CREATE TABLE keys (id TEXT PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts (id), "
        "parent TEXT REFERENCES keys (id), name TEXT NOT NULL, digest TEXT NOT NULL, old_digest TEXT, "
        "old_until BIGINT, scopes TEXT NOT NULL, created BIGINT NOT NULL, expires BIGINT, last_used BIGINT, "
        f"revoked BIGINT, {_LIMITS}, {_PRICES})",
        "CREATE INDEX keys_of_account ON keys (account)",
        "CREATE TABLE invites (id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, created BIGINT NOT NULL, "
        f"expires BIGINT, revoked BIGINT, uses_left BIGINT NOT NULL, scopes TEXT NOT NULL, {_LIMITS}, {_PRICES})",
        "CREATE TABLE usage_lines (request TEXT PRIMARY KEY, account TEXT NOT NULL, key TEXT NOT NULL, "
        "path TEXT NOT NULL, model TEXT NOT NULL, mode TEXT NOT NULL, status TEXT NOT NULL, "
        f"started DOUBLE PRECISION NOT NULL, day TEXT NOT NULL, {_COUNTS}, reasoning_tokens BIGINT NOT NULL, "
        "first_token_ms DOUBLE PRECISION, total_ms DOUBLE PRECISION NOT NULL, price_prompt BIGINT NOT NULL, "
        "price_cached BIGINT NOT NULL, price_output BIGINT NOT NULL, cost_micro BIGINT NOT NULL)",
        "CREATE INDEX usage_of_account ON usage_lines (account, started)",
        "CREATE INDEX usage_by_time ON usage_lines (started)",
        "CREATE TABLE usage_days (day TEXT NOT NULL, account TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, "
        f"requests BIGINT NOT NULL, {_COUNTS}, cost_micro BIGINT NOT NULL, PRIMARY KEY (day, account, key, model))",
        "CREATE INDEX usage_days_of_account ON usage_days (account, day)",
    ),
)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _number(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable)


def _limits() -> list[Column[int]]:
    names = ("requests_per_min", "tokens_per_min", "max_concurrent", "budget_micro")
    return [_number(n, nullable=True) for n in (*names, "price_prompt", "price_cached", "price_output")]


def _counts() -> list[Column[int]]:
    return [_number(n) for n in ("prompt_tokens", "cached_tokens", "output_tokens")]


version = Table("schema_version", metadata, _number("version"))
accounts = Table(
    "accounts", metadata, Column("id", Text, primary_key=True), _text("name"), _text("salt"), _number("created"),
    _number("closed", nullable=True), *_limits(),
)  # fmt: skip
keys = Table(
    "keys", metadata, Column("id", Text, primary_key=True),
    Column("account", Text, ForeignKey("accounts.id"), nullable=False), Column("parent", Text, ForeignKey("keys.id")),
    _text("name"), _text("digest"), Column("old_digest", Text), _number("old_until", nullable=True), _text("scopes"),
    _number("created"), _number("expires", nullable=True), _number("last_used", nullable=True),
    _number("revoked", nullable=True), *_limits(),
)  # fmt: skip
invites = Table(
    "invites", metadata, Column("id", Text, primary_key=True), _text("name"), _text("digest"), _number("created"),
    _number("expires", nullable=True), _number("revoked", nullable=True), _number("uses_left"), _text("scopes"),
    *_limits(),
)  # fmt: skip
usage_lines = Table(
    "usage_lines", metadata, Column("request", Text, primary_key=True), _text("account"), _text("key"), _text("path"),
    _text("model"), _text("mode"), _text("status"), Column("started", Float, nullable=False), _text("day"), *_counts(),
    _number("reasoning_tokens"), Column("first_token_ms", Float), Column("total_ms", Float, nullable=False),
    _number("price_prompt"), _number("price_cached"), _number("price_output"), _number("cost_micro"),
)  # fmt: skip
usage_days = Table(
    "usage_days", metadata,
    *(Column(n, Text, primary_key=True) for n in ("day", "account", "key", "model")),
    _number("requests"), *_counts(), _number("cost_micro"),
)  # fmt: skip


def migrate(connection: Connection) -> None:
    """Bring a store to today's version, in the transaction that is open.  Several processes may try at once.

    Raises:
        RequestError: a later version of this package made it.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    if not looked_at(connection).has_table(version.name):
        connection.execute(text("CREATE TABLE schema_version (version BIGINT NOT NULL)"))
        connection.execute(version.insert().values(version=0))
    found = connection.execute(select(version.c.version)).scalar_one()
    if found > len(MIGRATIONS):
        raise RequestError(
            f"the store of keys has version {found} and this pyrosome knows {len(MIGRATIONS)}; use the later pyrosome "
            "that made it, or another store"
        )
    for statements in MIGRATIONS[found:]:
        for statement in statements:
            connection.execute(text(statement))
    if found < len(MIGRATIONS):
        connection.execute(update(version).values(version=len(MIGRATIONS)))
