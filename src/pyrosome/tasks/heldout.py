"""Which contents are kept for evaluation: an eighth of each kind, by a hash that is the same everywhere.

Training samples never contain such a fact, sum or passage; samples for evaluation ask for nothing else.
"""

from __future__ import annotations

import zlib

from pyrosome.tasks.words import NAMES, VALUES

ONE_IN = 8


def is_held_out(*parts: str) -> bool:
    """Whether the content made of `parts` is kept for evaluation."""
    return zlib.crc32(" ".join(parts).encode()) % ONE_IN == 0


def sum_is_held_out(a: int, op: str, b: int) -> bool:
    """The same for "a op b"; 3 + 5 and 5 + 3 are one question, or the one would give the other away."""
    if op == "+":
        a, b = min(a, b), max(a, b)
    return is_held_out(str(a), op, str(b))


# Of each name: the values that training may show, those kept back, and all.
TRAINED = {n: tuple(v for v in VALUES if not is_held_out(n, v)) for n in NAMES}
KEPT = {n: tuple(v for v in VALUES if is_held_out(n, v)) for n in NAMES}
ANY = dict.fromkeys(NAMES, VALUES)
