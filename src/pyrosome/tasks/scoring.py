"""Right or wrong, and how sure a share of right answers is."""

from __future__ import annotations

import math

from pyrosome.errors import RequestError
from pyrosome.tasks.sample import Sample


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of `hits` in `n`; (0, 1) where n is 0.

    Raises:
        RequestError: `hits` is not between 0 and n.
    """
    if not 0 <= hits <= n:
        raise RequestError(f"an interval for {hits} hits of {n} was asked for; hits lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    share, scale = hits / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def is_right(sample: Sample, answer: str) -> bool:
    """Whether `answer` is the one expected last, spaces around it aside."""
    return answer.strip() == str(sample.about["expected"]).strip()
