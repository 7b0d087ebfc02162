"""How many requests may be in the server at once: those the engine computes, and a bounded number that wait."""

from __future__ import annotations

import collections
import math

from pyrosome.server.problems import Refused

LONGEST_WAIT_S = 60


class Gate:
    """Counts who is inside; when it is full, says when to come again."""

    def __init__(self, num_places: int, max_queue: int) -> None:
        self.num_places, self.max_queue = max(1, num_places), max_queue
        self.num_inside = 0
        self.num_refused = 0
        self.is_closing = False
        self._took: collections.deque[float] = collections.deque(maxlen=64)  # seconds that the last requests took

    def enter(self) -> None:
        """Take a place.

        Raises:
            Refused: 429 where all are taken, 503 where the server is closing.
        """
        if self.is_closing:
            raise Refused(503, "the server is shutting down; send the request again", headers={"Retry-After": "5"})
        if self.num_inside >= self.num_places + self.max_queue:
            self.num_refused += 1
            wait = self.retry_after()
            raise Refused(
                429,
                f"{self.num_inside} requests are being answered or wait, as many as this server takes; try again in "
                f"{wait} s",
                code="overloaded",
                headers={"Retry-After": str(wait)},
            )
        self.num_inside += 1

    def leave(self, seconds: float) -> None:
        """Give a place back after so long."""
        self.num_inside -= 1
        self._took.append(seconds)

    def retry_after(self) -> int:
        """Seconds after which a place will probably be free."""
        if not self._took:
            return 1
        mean = sum(self._took) / len(self._took)
        return max(
            1, min(LONGEST_WAIT_S, math.ceil(mean * max(1, self.num_inside - self.num_places) / self.num_places))
        )
