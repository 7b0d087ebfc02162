"""Ledgers: facts " falcon 37 ;" scattered among words that mean nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pyrosome.errors import RequestError
from pyrosome.tasks.heldout import ANY, KEPT, TRAINED
from pyrosome.tasks.sample import checked_count
from pyrosome.tasks.words import FILLER, NAMES

FACT_WORDS = 3
Fact = tuple[str, str]
Count = int | tuple[int, int]


def num_facts(rng: random.Random, facts: Count, fit: int) -> int:
    """How many facts a document gets: as asked, or drawn from a range cut to the `fit` it has room for.

    Raises:
        RequestError: not a number or range from 1 to the number of names.
    """
    if isinstance(facts, int):
        return checked_count("facts", facts, len(NAMES))
    if not isinstance(facts, tuple | list) or len(facts) != 2 or not facts[0] <= facts[1]:
        raise RequestError(f"facts = {facts!r} was asked for; it is a number or a range (low, high)")
    low, high = (checked_count("facts", n, len(NAMES)) for n in facts)
    fit = max(1, fit)
    return rng.randint(min(low, fit), min(high, fit))


def draw_facts(rng: random.Random, count: int, num_asked: int, heldout: bool) -> list[Fact]:
    """`count` facts of distinct names; the first `num_asked` are those that may be asked."""
    names = rng.sample(NAMES, count)
    asked, others = (KEPT, ANY) if heldout else (TRAINED, TRAINED)
    return [(name, rng.choice((asked if i < num_asked else others)[name])) for i, name in enumerate(names)]


def spread(rng: random.Random, facts: Sequence[Fact], num_words: int, lead: int = 0) -> tuple[list[str], list[int]]:
    """A document of `num_words` words (more if the facts alone are more) with `facts` in this order.

    Every arrangement of facts and fillers is equally likely, but that `lead` fillers come first.

    Returns:
        The words, and of each fact the index of its first.
    """
    num_filler = max(num_words - FACT_WORDS * len(facts), lead)
    slots = num_filler - lead + len(facts)
    places = sorted(rng.sample(range(slots), len(facts)))
    filler = rng.choices(FILLER, k=num_filler)
    words: list[str] = []
    positions: list[int] = []
    used = 0
    for n, (place, fact) in enumerate(zip(places, facts, strict=True)):
        until = lead + place - n
        words += filler[used:until]
        positions.append(len(words))
        words += [*fact, ";"]
        used = until
    return words + filler[used:], positions
