"""Accounts, keys and invites as plain data, and what may stand in their fields."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping
from typing import Any

from pyrosome.errors import RequestError
from pyrosome.server.caller import SCOPES
from pyrosome.server.keys.money import MAX_MICRO, Price

MAX_NAME_CHARS = 100
MAX_LIMIT = 10**12
LAST_TIME = 253402300799  # the end of the year 9999
_SPAN = re.compile(r"(\d{1,6})([mhdw])", re.ASCII)
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
UNCHANGED: Any = object()  # of a field that a change leaves as it is; None takes its value away


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What may be used at most; None: no limit of its own.

    Raises:
        RequestError: a limit is no integer, or outside its range; the message names it.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None  # of prompts and outputs
    max_concurrent: int | None = None  # requests at once
    budget_micro: int | None = None  # money in a month of UTC

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            low, high = (0, MAX_MICRO) if name == "budget_micro" else (1, MAX_LIMIT)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise RequestError(f"{name} is {value!r}; an integer from {low} to {high} was expected, or null")

    def above(self, bound: Limits) -> list[str]:
        """The limits here that are higher than those of `bound`; one that is not there is not compared."""
        return [n for n, own, most in self._pairs(bound) if own is not None and most is not None and own > most]

    def wider(self, bound: Limits) -> list[str]:
        """The limits here that allow more than those of `bound`; one that is not there allows anything."""
        return [n for n, own, most in self._pairs(bound) if most is not None and (own is None or own > most)]

    def _pairs(self, other: Limits) -> list[tuple[str, int | None, int | None]]:
        return [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """Whoever keys belong to."""

    id: str
    name: str
    created: int  # times are seconds since 1970
    closed: int | None
    limits: Limits
    price: Price | None  # None: the server's


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A key, without its secret."""

    id: str
    account: str
    parent: str | None  # the key it was made with: it lives no longer, and shares that key's limits
    name: str
    scopes: frozenset[str]
    created: int
    expires: int | None
    last_used: int | None  # to the minute
    revoked: int | None
    old_until: int | None  # the secret before the last rotation is taken so long
    limits: Limits
    price: Price | None

    def state(self, now: float) -> str:
        """ "active", "expired" or "revoked"."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


@dataclasses.dataclass(frozen=True, slots=True)
class Invite:
    """A code with which whoever has it makes an account with these limits."""

    id: str
    name: str
    created: int
    expires: int | None
    revoked: int | None
    uses_left: int
    scopes: frozenset[str]
    limits: Limits
    price: Price | None


def name_of(value: object, what: str = "name") -> str:
    """A name.

    Raises:
        RequestError: it is none that can be shown in one line.
    """
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME_CHARS or not value.isprintable():
        shown = repr(value)[:60]
        raise RequestError(f"{what} is {shown}; 1 to {MAX_NAME_CHARS} printable characters were expected")
    return value.strip()


def scopes_of(value: object) -> frozenset[str]:
    """Scopes.

    Raises:
        RequestError: one is unknown, or there is none.
    """
    if not isinstance(value, list | tuple | set | frozenset) or not value:
        raise RequestError(f"scopes is {repr(value)[:60]}; a list of some of {', '.join(SCOPES)} was expected")
    for scope in value:
        if scope not in SCOPES:
            raise RequestError(f"the scope {str(scope)[:60]!r} is unknown; there are {', '.join(SCOPES)}")
    return frozenset(value)


def changed_limits(given: object, now: Limits) -> Limits:
    """Limits with the given ones in place of those there were; null takes one away.

    Raises:
        RequestError: a field is unknown or wrong.
    """
    return dataclasses.replace(now, **_fields(given, "limits", [f.name for f in dataclasses.fields(Limits)]))


def price_of(given: object) -> Price | None:
    """A price of `prompt_micro`, `cached_micro` and `output_micro` a million tokens; null: the server's.

    Raises:
        RequestError: a field is unknown, missing or wrong.
    """
    if given is None:
        return None
    names = ("prompt_micro", "cached_micro", "output_micro")
    fields = _fields(given, "price", names)
    if len(fields) != len(names):
        raise RequestError(f"price needs {', '.join(names)}: micro-units for a million tokens")
    return Price(*(fields[n] for n in names))


def time_of(given: object, now: float, what: str = "expires") -> int | None:
    """A time to come: seconds since 1970, an ISO date or time (of UTC where it names no zone), or a span like "30d".

    Raises:
        RequestError: it is none of these, or has passed.
    """
    if given is None:
        return None
    found: float | None = None
    if isinstance(given, int) and not isinstance(given, bool):
        found = given
    elif isinstance(given, str):
        span = _SPAN.fullmatch(given.strip())
        found = int(now) + int(span[1]) * _SECONDS[span[2]] if span else _iso(given.strip())
    if found is None or not now < found <= LAST_TIME:
        raise RequestError(
            f"{what} is {repr(given)[:60]}; a time to come was expected: 2030-01-31, 2030-01-31T12:00:00Z, a span such "
            "as 12h, 30d or 8w, or seconds since 1970"
        )
    return int(found)


def span_of(given: object, what: str, most_s: int) -> int:
    """Seconds, as a number or a span like "30m".

    Raises:
        RequestError: it is neither, or too long.
    """
    found = -1
    if isinstance(given, int) and not isinstance(given, bool):
        found = given
    elif isinstance(given, str) and (span := _SPAN.fullmatch(given.strip())):
        found = int(span[1]) * _SECONDS[span[2]]
    if not 0 <= found <= most_s:
        raise RequestError(f"{what} is {repr(given)[:60]}; 0 to {most_s} seconds were expected, or a span such as 30m")
    return found


def iso(seconds: float | None) -> str | None:
    """A time as text, in UTC."""
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).isoformat().replace("+00:00", "Z")


def day_of(seconds: float) -> str:
    """The day of UTC, as `2030-01-31`; its first seven characters are its month."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _iso(text: str) -> float | None:
    try:
        found = datetime.datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _fields(given: object, what: str, names: list[str] | tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise RequestError(f"{what} is {repr(given)[:60]}; an object with some of {', '.join(names)} was expected")
    if unknown := [k for k in given if k not in names]:
        raise RequestError(f"{what} has {str(unknown[0])[:60]!r}, which is unknown; there are {', '.join(names)}")
    return given
