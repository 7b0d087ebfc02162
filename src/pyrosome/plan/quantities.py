"""Numbers as people write them: tokens, bytes, dollars.  Read strictly, and printed with their units.

Memory is sold in powers of two and drives in powers of ten, so "512G" of RAM is 512 x 2^30 bytes and "2T" of a drive
2 x 10^12; "GiB" and "TiB" are powers of two everywhere.  Tokens are counted as contexts are: "128K" is 131,072.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from pyrosome.errors import RequestError

MAX_TOKENS = 2**31 - 1  # positions are int32 in index tables
MAX_BYTES = 1 << 60
LEAST_BYTES = 1 << 20  # less is a forgotten unit
MAX_DOLLARS = 10**6  # an hour
MAX_COUNT = 10**6

_NUMBER = r"([0-9]{1,20}(?:[,_][0-9]{3}){0,6}(?:\.[0-9]{1,30})?)"
_TOKENS = re.compile(rf"{_NUMBER}\s*(?:([KM])i?)?(?:\s*tokens?)?", re.IGNORECASE)
_BYTES = re.compile(rf"{_NUMBER}\s*(?:([KMGTP])(i?)B?|B|bytes)?", re.IGNORECASE)
_DOLLARS = re.compile(rf"(?:\$\s*|USD\s*)?{_NUMBER}\s*(?:\$|USD)?(?:\s*(?:/|an?|per)\s*(?:h|hour))?", re.IGNORECASE)
_POWER = {"K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def tokens(value: object, flag: str = "--context") -> int:
    """Tokens of "1M" (1,048,576), "128K" (131,072), "200000" or "200,000"; K and M are 1,024 and its square.

    Raises:
        RequestError: another form, not whole, 0, or more than positions are counted to; the message names `flag`.
    """
    forms = "a number of tokens is written 200000, 128K (131,072) or 1M (1,048,576)"
    number, match = _read(value, flag, _TOKENS, forms)
    found = number * 1024 ** _POWER.get((match[2] or "").upper(), 0)
    return _whole(found, flag, value, "tokens", 1, MAX_TOKENS, forms)


def count(value: object, flag: str, least: int = 1) -> int:
    """A whole number of things, from `least` on.

    Raises:
        RequestError: another form, or out of range.
    """
    forms = "a whole number is expected, as 7"
    number, _ = _read(value, flag, re.compile(_NUMBER), forms)
    return _whole(number, flag, value, "", least, MAX_COUNT, forms)


def memory_bytes(value: object, flag: str = "--ram") -> int:
    """Bytes of memory: "512G", "512GB" and "512GiB" are the same, since memory is sold in powers of two.

    Raises:
        RequestError: another form, below 1 MiB (a unit was forgotten), or absurdly large.
    """
    return _bytes(value, flag, 1024, "an amount of memory is written 512G or 512GiB (both 2^30 bytes each), or 1.5TiB")


def drive_bytes(value: object, flag: str = "--nvme") -> int:
    """Bytes of a drive: "2T" and "2TB" are 2 x 10^12, as drives are sold; "2TiB" is 2 x 2^40.

    Raises:
        RequestError: as `memory_bytes`.
    """
    return _bytes(value, flag, 1000, "a drive's size is written 2T or 2TB (10^12 bytes each), or 1.8TiB")


def dollars(value: object, flag: str = "--price") -> float:
    """US dollars an hour: "9.42", "$9.42", "$9.42/h".

    Raises:
        RequestError: another form, 0, or absurdly large.
    """
    forms = "a price is in US dollars an hour and written 9.42 or $9.42/h"
    number, _ = _read(value, flag, _DOLLARS, forms)
    if not 0 < number <= MAX_DOLLARS:
        raise RequestError(f"{flag} is {_shown(value)}; {forms}, above 0 and up to {MAX_DOLLARS:,}")
    return float(number)


def show_tokens(num: int) -> str:
    """ "1M", "128K", or the number itself where it is of no round length."""
    for unit, scale in (("M", 1 << 20), ("K", 1 << 10)):
        if num >= scale and num % scale == 0:
            return f"{num // scale:,}{unit}"
    return f"{num:,}"


def show_bytes(num: float, *, exact: bool = False) -> str:
    """The largest unit that leaves at least one, "3.77 GiB"; `exact` adds the bytes themselves."""
    sign, size = ("-" if num < 0 else ""), abs(num)
    shown = f"{sign}{size:,.0f} B"
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            shown = f"{sign}{size / scale:,.2f} {unit}"
            return f"{shown} ({num:,.0f} bytes)" if exact else shown
    return shown


def show_dollars(num: float) -> str:
    """Cents, and below ten of them as many digits as say something: "$9.42", "$0.0042"."""
    return f"${num:,.2f}" if num >= 0.1 or num == 0 else f"${Decimal(f'{num:.2g}'):f}"


def _bytes(value: object, flag: str, base: Literal[1000, 1024], forms: str) -> int:
    number, match = _read(value, flag, _BYTES, forms)
    found = number * (1024 if match[3] else base) ** _POWER.get((match[2] or "").upper(), 0)
    if 0 < found < LEAST_BYTES:
        raise RequestError(f"{flag} is {_shown(value)}, which is {int(found):,} bytes: a unit is missing; {forms}")
    return _whole(Decimal(int(found)), flag, value, "bytes", LEAST_BYTES, MAX_BYTES, forms)


def _read(value: object, flag: str, pattern: re.Pattern[str], forms: str) -> tuple[Decimal, re.Match[str]]:
    if not isinstance(value, str | int | float):
        raise RequestError(f"{flag} is {_shown(value)} ({type(value).__name__}); {forms}")
    text = f"{Decimal(repr(value)):f}" if isinstance(value, float) else str(value)  # 1e-05 is 0.00001
    match = pattern.fullmatch(text.strip())
    if match is None:
        raise RequestError(f"{flag} is {_shown(value)}; {forms}")
    return Decimal(match[1].replace(",", "").replace("_", "")), match


def _whole(found: Decimal, flag: str, value: object, unit: str, low: int, high: int, forms: str) -> int:
    if not low <= found <= high:
        raise RequestError(f"{flag} is {_shown(value)}; it is from {low:,} to {high:,}{unit and ' '}{unit}: {forms}")
    if found != int(found):
        raise RequestError(f"{flag} is {_shown(value)}, which is {found} {unit or 'of them'} and not whole; {forms}")
    return int(found)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
