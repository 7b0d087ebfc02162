"""Synthetic tasks: what a small network is taught, and later asked.  Text only, and seeded.

A generator takes `(rng, length, heldout, **knobs)`: `length` is the sample's size in tokens where each word is one
(within a tenth, or the least that works; families without a document are shorter), and of held-out samples
everything asked is content that training never shows.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable
from typing import Any

from pyrosome.errors import RequestError
from pyrosome.tasks.copy import copy, quote
from pyrosome.tasks.dialogue import dialogue
from pyrosome.tasks.ledger import ledger, ordinal, several
from pyrosome.tasks.records import records
from pyrosome.tasks.sample import Sample
from pyrosome.tasks.sums import sums
from pyrosome.tasks.tool import tool

Generator = Callable[..., Sample]

GENERATORS: dict[str, Generator] = {
    f.__name__: f for f in (records, ledger, ordinal, several, copy, quote, sums, tool, dialogue)
}

__all__ = ["GENERATORS", "Generator", "Sample", "knobs_of", "make"]


def make(kind: str, rng: random.Random, length: int, heldout: bool = False, **knobs: Any) -> Sample:
    """One sample of the family `kind`; the same `rng` state gives the same sample.

    Raises:
        RequestError: an unknown family or knob, or a knob's value outside its range.
    """
    known = knobs_of(kind)
    if unknown := [k for k in knobs if k not in known]:
        raise RequestError(
            f"{kind} was asked for with {', '.join(unknown)}; its knobs are {', '.join(known) or 'none'}"
        )
    if length < 1:
        raise RequestError(f"{kind} was asked for with length {length}; it is a number of tokens from 1")
    return GENERATORS[kind](rng, length, heldout, **knobs)


@functools.cache
def knobs_of(kind: str) -> tuple[str, ...]:
    """Names of what can be set of the family `kind`.

    Raises:
        RequestError: there is no such family.
    """
    if kind not in GENERATORS:
        raise RequestError(f"the task {kind!r} was asked for; there are {', '.join(GENERATORS)}")
    return tuple(p.name for p in inspect.signature(GENERATORS[kind]).parameters.values() if p.kind is p.KEYWORD_ONLY)
