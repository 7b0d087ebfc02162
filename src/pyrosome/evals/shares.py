"""Figures and how sure they are: shares of right answers, paired differences, ratios of sums."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from pyrosome.errors import RequestError
from pyrosome.tasks.scoring import wilson

Z = 1.96  # standard errors on either side of a figure: 95 % of the time the true one is between them


@dataclasses.dataclass(frozen=True)
class Share:
    """`hits` of `n`, with Wilson's 95 % interval."""

    hits: int
    n: int

    @classmethod
    def of(cls, found: Iterable[bool]) -> Share:
        """How many of them are true."""
        found = list(found)
        return cls(sum(found), len(found))

    @property
    def low(self) -> float:
        return wilson(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.hits, self.n)[1]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the share of nothing is None."""
        share = self.hits / self.n if self.n else None
        return {"share": share, "low": self.low, "high": self.high, "hits": self.hits, "n": self.n}


def difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """How much more often `first` is right than `second` on the same questions, with a 95 % interval.

    Of questions that both or neither answer, nothing is learnt.  The interval is Wald's with half a question added to
    each of the four cells (Agresti and Min, 2005), which holds its 95 % for few questions too.

    Raises:
        RequestError: they are not of one length.
    """
    if len(first) != len(second):
        raise RequestError(
            f"a paired difference of {len(first)} and {len(second)} answers was asked for; pair equal numbers"
        )
    n = len(first)
    better = sum(a and not b for a, b in zip(first, second, strict=True))
    worse = sum(b and not a for a, b in zip(first, second, strict=True))
    p, q = (better + 0.5) / (n + 2), (worse + 0.5) / (n + 2)
    reach = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return {
        "difference": (better - worse) / n if n else None,
        "low": max(-1.0, p - q - reach),
        "high": min(1.0, p - q + reach),
        "n": n,
    }


class Ratio(NamedTuple):
    """A sum over a sum, and its standard error."""

    value: float
    error: float


def ratio(above: Sequence[float], below: Sequence[float], groups: Sequence[Hashable]) -> Ratio:
    """sum(above) / sum(below); items of one group (passages of one document) are taken to go together.

    The error is the linearised one over groups; NaN where there is one group alone.
    """
    total = sum(below)
    value = sum(above) / total
    rest: dict[Hashable, float] = defaultdict(float)
    for a, b, group in zip(above, below, groups, strict=True):
        rest[group] += a - value * b
    if len(rest) < 2:
        return Ratio(value, math.nan)
    spread = sum(r * r for r in rest.values()) * len(rest) / (len(rest) - 1)
    return Ratio(value, math.sqrt(spread) / total)
