"""How many requests may be in the server at once: those the engine computes, and a bounded number that wait."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable

from pyrosome.server.problems import Refused

LONGEST_WAIT_S = 60
KEPT_OPEN = 4  # one part in so many of all places stays open to accounts that have less than their share


class Gate:
    """Counts who is inside; when it is full, says when to come again.

    While there is room anybody may take it.  The last part of it is for accounts that hold less than an equal share,
    so that whoever sends most leaves the others a place.
    """

    def __init__(self, num_places: int, max_queue: int) -> None:
        self.num_places, self.max_queue = max(1, num_places), max_queue
        self.num_inside = 0
        self.num_refused = 0
        self.is_closing = False
        self._took: collections.deque[float] = collections.deque(maxlen=64)  # seconds that the last requests took
        self._by_account: collections.Counter[str] = collections.Counter()

    def enter(self, account: str = "") -> None:
        """Take a place.

        Raises:
            Refused: 429 where all are taken, or all that this account may have; 503 where the server is closing.
        """
        if self.is_closing:
            raise Refused(503, "the server is shutting down; send the request again", headers={"Retry-After": "5"})
        limit = self.num_places + self.max_queue
        if self.num_inside >= limit:
            raise self._full(f"{self.num_inside} requests are being answered or wait, as many as this server takes")
        if account and limit - self.num_inside <= limit // KEPT_OPEN:
            held, accounts = self._by_account[account], len(self._by_account.keys() - {account}) + 1
            share = max(1, limit // (accounts + 1))
            if held >= share:
                raise self._full(
                    f"{self.num_inside} requests are being answered or wait and {held} of them are this account's; "
                    f"the last of {limit} places are for others while it has {share} or more"
                )
        self.num_inside += 1
        self._by_account[account] += 1

    def leave(self, seconds: float | None, account: str = "") -> None:
        """Give a place back, after so long where the engine had work with it; None: it had none."""
        self.num_inside -= 1
        if seconds is not None:
            self._took.append(seconds)
        self._by_account[account] -= 1
        if not self._by_account[account]:
            del self._by_account[account]

    def retry_after(self) -> int:
        """Seconds after which a place will probably be free."""
        return max(1, min(LONGEST_WAIT_S, math.ceil(self._turn_s(max(1, self.num_inside - self.num_places)))))

    def wait_s(self) -> float:
        """Seconds until the engine will probably have a place for the one who came last."""
        return self._turn_s(max(0, self.num_inside - self.num_places))

    def _turn_s(self, num_before: int) -> float:
        mean = sum(self._took) / len(self._took) if self._took else 0.0
        return mean * num_before / self.num_places

    def _full(self, found: str) -> Refused:
        self.num_refused += 1
        wait = self.retry_after()
        return Refused(429, f"{found}; try again in {wait} s", code="overloaded", headers={"Retry-After": str(wait)})


class Pace:
    """How fast prompts are computed, from those that were, so that it can be said when a first token will come.

    It errs on the early side: the fastest of the last prompts counts, since others shared their steps.
    """

    def __init__(self) -> None:
        self._rates: collections.deque[float] = collections.deque(maxlen=64)  # tokens per second
        self._reused: collections.deque[tuple[int, int]] = collections.deque(maxlen=64)  # tokens of so many

    def computed(self, prompt_tokens: int, reused_tokens: int, seconds: float) -> None:
        """A prompt's first token came so long after its work began."""
        self._reused.append((reused_tokens, prompt_tokens))
        if seconds > 0 and prompt_tokens > reused_tokens:
            self._rates.append((prompt_tokens - reused_tokens) / seconds)

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens computed in a second; 0: not known yet."""
        return max(self._rates, default=0.0)

    def uncached(self, prompt_tokens: int) -> float:
        """How many tokens of a prompt will probably have to be computed."""
        reused, all_tokens = (sum(column) for column in zip(*self._reused, strict=True)) if self._reused else (0, 1)
        return prompt_tokens * (1 - reused / all_tokens)

    def first_token_s(self, own: float, others: Iterable[float]) -> float:
        """Seconds to the first token of a prompt of `own` tokens to compute, beside prompts of `others`; 0: not known.

        Prompts share steps evenly: each of them delays this one by no more than its own length.
        """
        rate = self.tokens_per_s
        return (own + sum(min(own, other) for other in others)) / rate if rate else 0.0
