"""Money and prices: integers of micro-units of whatever currency the server's owner thinks in, never floats."""

from __future__ import annotations

import dataclasses
import decimal

from pyrosome.chat.events import Usage
from pyrosome.errors import RequestError
from pyrosome.options import MAX_PRICE

MICRO = 1_000_000
MAX_MICRO = 10**15  # a thousand million units: far from where a database's integers end


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """Of a million tokens, in micro-units.

    Raises:
        RequestError: a price is below 0 or above `MAX_PRICE`.
    """

    prompt: int = 0
    cached: int = 0  # of the prompt, where it was found in the cache
    output: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PRICE:
                raise RequestError(
                    f"the price of {field.name} tokens is {value!r}; an integer from 0 to {MAX_PRICE} was expected"
                )

    def of(self, usage: Usage) -> int:
        """Micro-units that a request costs: exact, then rounded up once."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        exact = (
            (usage.prompt_tokens - cached) * self.prompt + cached * self.cached + usage.completion_tokens * self.output
        )
        return -(-exact // 1_000_000)

    def at_most(self, prompt_tokens: int, max_tokens: int) -> int:
        """What a request can cost, whatever the cache has of it."""
        dearest = max(self.prompt, self.cached)
        return -(-(prompt_tokens * dearest + max_tokens * self.output) // 1_000_000)


def micro_of(text: str, what: str = "amount", most: int = MAX_MICRO) -> int:
    """Micro-units of a decimal number as people write it: "12.50" is 12,500,000.

    Raises:
        RequestError: it is no amount, or finer than a micro-unit.
    """
    try:
        micro = decimal.Decimal(text.strip()).scaleb(6)
        whole = int(micro)
    except (ArithmeticError, ValueError, OverflowError):
        raise RequestError(f"{what} is {text!r}; a number like 12.50 was expected") from None
    if whole != micro or not 0 <= whole <= most:
        raise RequestError(f"{what} is {text!r}; 0 to {shown(most)}, with six decimals at most, was expected")
    return whole


def shown(micro: int) -> str:
    """Micro-units as a decimal number: two decimals, and more where they are not zero."""
    sign = "-" if micro < 0 else ""
    whole, part = divmod(abs(micro), MICRO)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"
