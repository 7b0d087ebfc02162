"""Whether classes differ by more than chance, counted and not looked up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 20_000


def chance_of(hits: Sequence[int], totals: Sequence[int], seed: int = 0) -> float:
    """How often classes that are all alike differ as much as these, at least 1 / (DRAWS + 1).

    Fisher's exact test by simulation: the misses there are fall on the questions at random, DRAWS times over, and
    Pearson's statistic of each table is compared with that of the one found.  Few misses are no trouble to it, as they
    would be to the chi-square distribution.

    Args:
        hits, totals: of each class; those without a question are left out.
    """
    total = np.array([n for n in totals if n])
    missed = total - np.array([h for h, n in zip(hits, totals, strict=True) if n])
    if len(total) < 2 or missed.sum() in (0, total.sum()):
        return 1.0
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(total, int(missed.sum()), size=DRAWS)
    expected = total * missed.sum() / total.sum()
    # The term of the hits has the same numerator; over all classes they differ by a factor alone.
    found = ((missed - expected) ** 2 / expected).sum()
    by_chance = ((drawn - expected) ** 2 / expected).sum(axis=1)
    return float((1 + (by_chance >= found * (1 - 1e-9)).sum()) / (DRAWS + 1))
