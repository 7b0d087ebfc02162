"""Which drafts stay, how deep to draft, and drafts from what was said before.

A draft is accepted where the target, drawn with its own noise, draws the same token: so answers do not depend on
drafts, and depth may follow what was accepted and what a step costs (ADR 0006).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from pyrosome.errors import RequestError
from pyrosome.options import DRAFTERS

# Depth
ACCEPTED_PRIOR, TRIED_PRIOR = 2.0, 3.0  # an optimist: a beginning is worth trying
FORGETTING = 0.95  # of what became of drafts, per draft at that place: some twenty last ones count
PROBE_AFTER, PROBE_LEAST, PROBE_MOST = 16, 4, 512  # steps until one draft more than seems worth it is tried again
# Cost of a step
SHARE = 0.1  # what a token more costs, in steps of one token, until it is measured
CONFIDENCE = 4.0  # how much that guess counts: as four steps that had one token more than usual
STEP_FORGETTING = 0.98
OUTLIER = 3.0  # a step slower than this many times what was expected was held up by something else


class StepCost:
    """Seconds of a step by its tokens, fixed + per_token x tokens, and of drafting, per draft; shared by sequences.

    The slope is a regression around running means.  It forgets only as steps of other sizes are seen: while all have
    one size nothing is learned about it, and nothing lost.
    """

    def __init__(self) -> None:
        self._tokens, self._seconds, self._sequences = 1.0, 1.0, 1.0  # means
        self._variance = self._covariance = 0.0
        self._draft_seconds = 0.0
        self._num_steps = 0

    def observe(self, num_tokens: int, seconds: float, num_sequences: int = 1) -> None:
        """Take the time of a step in which each of so many sequences had its next token, and drafts, computed.

        A step with prompts in it tells another story: by the token it is much cheaper.
        """
        self._num_steps += 1
        rate = max(1 - STEP_FORGETTING, 1 / self._num_steps)
        if self._num_steps > 1:
            seconds = min(seconds, OUTLIER * self._at(num_tokens))
            x, y = num_tokens - self._tokens, seconds - self._seconds
            kept = 1 - (1 - STEP_FORGETTING) * x * x / (1 + x * x)
            self._variance = kept * self._variance + x * x
            self._covariance = kept * self._covariance + x * y
        self._tokens += rate * (num_tokens - self._tokens)
        self._seconds += rate * (seconds - self._seconds)
        self._sequences += rate * (num_sequences - self._sequences)

    def observe_drafting(self, num_drafts: int, seconds: float) -> None:
        """Take the time in which so many drafts were made, where `observe` is not given it with the step's."""
        if num_drafts:
            each = seconds / num_drafts
            self._draft_seconds += (1 - STEP_FORGETTING) * (each - self._draft_seconds) if self._draft_seconds else each

    def seconds(self, num_drafts: int) -> float:
        """Of a step in which each sequence has so many drafts; until one is observed, in steps of one token."""
        return self._at(self._sequences * (1 + num_drafts)) + self._sequences * num_drafts * self._draft_seconds

    def _at(self, num_tokens: float) -> float:
        guess = SHARE * self._seconds / (1 + SHARE * (self._tokens - 1))
        slope = (self._covariance + CONFIDENCE * guess) / (self._variance + CONFIDENCE)
        # A token is never free, or drafts that hardly ever stay would seem so; and no step has less than no fixed part.
        slope = min(max(slope, guess / 10), self._seconds / self._tokens)
        return max(self._seconds + slope * (num_tokens - self._tokens), 1e-12)


class Depth:
    """How many drafts one sequence takes: the number with the most tokens expected per second.

    All sequences of a step are taken to be alike, so in a fuller step, where a token more costs a larger share of
    what a sequence has of it, drafts are fewer.  `drafted` and `accepted` count by position in a draft.
    """

    def __init__(self, most: int, cost: StepCost) -> None:
        self.most, self._cost = most, cost
        self._accepted, self._tried = [ACCEPTED_PRIOR] * most, [TRIED_PRIOR] * most
        self._idle, self._wait = 0, PROBE_AFTER
        self._probed: int | None = None  # the place in a draft that is tried though it seems not worth it
        self.drafted = (0,) * most
        self.accepted = (0,) * most

    def choose(self) -> int:
        """Drafts for the next step."""
        best = self._best()
        self._probed = None
        if best < self.most:
            self._idle += 1
            if self._idle >= self._wait:
                self._idle, self._probed = 0, best
                return best + 1
        return best

    def _best(self) -> int:
        best, best_rate, expected, chance = 0, 1 / self._cost.seconds(0), 1.0, 1.0
        for k in range(1, self.most + 1):
            chance *= self._accepted[k - 1] / self._tried[k - 1]
            expected += chance
            rate = expected / self._cost.seconds(k)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """What became of a step's drafts.  Those behind the first refused one tell nothing."""
        for i in range(min(num_drafts, num_accepted + 1)):
            self._accepted[i] = self._accepted[i] * FORGETTING + (i < num_accepted)
            self._tried[i] = self._tried[i] * FORGETTING + 1
        if self._probed is not None and self._probed < min(num_drafts, num_accepted + 1):
            # Luck is followed up soon, and the lack of it ever more rarely.
            if self._probed < num_accepted:
                self._wait = max(PROBE_LEAST, min(self._wait, PROBE_AFTER) // 2)
            else:
                self._wait = min(PROBE_MOST, 2 * self._wait)
        self.drafted = tuple(n + (i < num_drafts) for i, n in enumerate(self.drafted))
        self.accepted = tuple(n + (i < num_accepted) for i, n in enumerate(self.accepted))


class PromptLookup:
    """What followed the last ids when they were there before: by the longest passage of 8 to 3 ids, the last time.

    An id costs the same whatever the length, and some 55 to 80 bytes: for each passage length, a table of places by
    hash, and for each place the one before it in its cell.  So a rewind undoes exactly what was added.
    """

    SHORTEST, LONGEST = 3, 8
    _SEARCHED = 64  # places of one cell that are looked at; most passages are alone in theirs

    def __init__(self) -> None:
        self._ids = array("i")
        self._index()

    def extend(self, ids: Sequence[int]) -> None:
        """Take further ids."""
        if len(ids) > len(self._ids) or len(self._ids) + len(ids) > 1 << self._bits:
            self._ids.extend(ids)
            self._index()
            return
        for token in ids:
            cells = self._cells()
            for level, befores in enumerate(self._befores):
                if level < len(cells):
                    befores.append(self._lasts[level][cells[level]])
                    self._lasts[level][cells[level]] = len(self._ids)
                else:
                    befores.append(0)
            self._ids.append(token)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` ids."""
        if len(self._ids) > 2 * length:
            del self._ids[length:]
            self._index()
        while len(self._ids) > length:
            self._ids.pop()
            cells = self._cells()
            for level, befores in enumerate(self._befores):
                before = befores.pop()
                if level < len(cells):
                    self._lasts[level][cells[level]] = before

    def propose(self, count: int) -> list[int]:
        """Up to `count` ids that may come next; a passage that runs into the end goes on with itself."""
        cells = self._cells()
        for level in reversed(range(len(cells))):
            passage = self._ids[-(self.SHORTEST + level) :]
            place = self._lasts[level][cells[level]]
            for _ in range(self._SEARCHED):
                if not place:
                    break
                if self._ids[place - len(passage) : place] == passage:
                    proposed = list(self._ids[place : place + count])
                    period = len(self._ids) - place
                    while len(proposed) < count:
                        proposed.append(proposed[-period])
                    return proposed
                place = self._befores[level][place]
        return []

    def _cells(self) -> list[int]:
        """The cell of the passage that ends here, for each length there are ids for, shortest first."""
        out, h = [], 0
        for n in range(1, min(self.LONGEST, len(self._ids)) + 1):
            h = (h * _FACTOR + self._ids[-n]) & _64
            if n >= self.SHORTEST:
                out.append((h * _SPREAD & _64) >> (64 - self._bits))
        return out

    def _index(self) -> None:
        """Make the tables anew, with a cell for each id at least; equal to `extend` id by id, and fast."""
        length = len(self._ids)
        self._bits = max(8, length.bit_length())
        ids = np.array(self._ids, dtype=np.uint64)
        self._lasts, self._befores = [], []
        h = np.zeros(length, dtype=np.uint64)  # of the passages that end at each id
        for n in range(1, self.LONGEST + 1):
            h = h[1:] if n > 1 else h
            h = h * np.uint64(_FACTOR) + ids[: max(0, length - n + 1)]
            if n < self.SHORTEST:
                continue
            lasts, befores = np.zeros(1 << self._bits, dtype=np.int32), np.zeros(length, dtype=np.int32)
            # The place of a passage is where the id after it is: the last one has none yet.
            places = np.arange(n, length, dtype=np.uint64)
            cells = (h[:-1] * np.uint64(_SPREAD)) >> np.uint64(64 - self._bits)
            order = np.sort((cells << np.uint64(32)) | places)
            cells, places = order >> np.uint64(32), (order & np.uint64(0xFFFFFFFF)).astype(np.int32)
            is_same = cells[1:] == cells[:-1]
            befores[places[1:][is_same]] = places[:-1][is_same]
            lasts[cells] = places  # of several the last, which is the greatest
            self._lasts.append(array("i", lasts.tobytes()))
            self._befores.append(array("i", befores.tobytes()))


_64 = (1 << 64) - 1
_FACTOR, _SPREAD = 0xD6E8FEB86659FD93, 0x9E3779B97F4A7C15  # odd


def resolve_drafter(asked: str, has_mtp: bool, has_dspark: bool) -> str:
    """The drafter that runs: "mtp", "lookup" or "off".

    Raises:
        RequestError: the head asked for is not in this checkpoint; the message names what is.
    """
    if asked == "auto":
        return "mtp" if has_mtp else "off"
    if asked == "mtp" and not has_mtp:
        head = "a DSpark head, which this version does not run yet" if has_dspark else "no draft head"
        others = ", ".join(d for d in DRAFTERS if d != "mtp")
        raise RequestError(f"drafter 'mtp' was asked for and this checkpoint has {head}; choose one of {others}")
    return asked
