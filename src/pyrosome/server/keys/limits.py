"""Requests and tokens a minute, requests at once, money a month: counted in memory, by this process.

A request is counted at several levels: its key, the keys that one was made with, its account.  It enters where all have
room, and then takes its place at all of them at once.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from pyrosome.server.keys.money import shown
from pyrosome.server.keys.records import Limits
from pyrosome.server.problems import Refused

MINUTE_S = 60.0
MERGED_S = 0.1  # amounts that come so soon after one another are remembered as one, as old as the last of them
SPENT_S = 10.0  # what was spent is read again so often: other servers and commands may share the store
WAIT_FOR_OTHERS_S = 2.0  # for a request that runs to give back what it holds: nobody knows when
SWEEP_EVERY = 1000  # requests


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """One of those that a request is counted at."""

    id: str
    what: str  # for messages
    limits: Limits


class Window:
    """Amounts of the last minute."""

    def __init__(self) -> None:
        self._parts: collections.deque[list[float]] = collections.deque()  # [first, last, amount]
        self._total = 0

    def add(self, now: float, amount: int) -> None:
        """Count an amount."""
        if self._parts and now - self._parts[-1][0] < MERGED_S:
            self._parts[-1][1:] = [now, self._parts[-1][2] + amount]
        else:
            self._parts.append([now, now, amount])
        self._total += amount

    def used(self, now: float) -> int:
        """Their sum."""
        while self._parts and now - self._parts[0][1] >= MINUTE_S:
            self._total -= int(self._parts.popleft()[2])
        return self._total

    def wait_s(self, now: float, amount: int, most: int) -> float:
        """Seconds until that amount fits; infinity where it never does."""
        over = self.used(now) + amount - most
        if over <= 0:
            return 0.0
        for _, last, part in self._parts:
            over -= int(part)
            if over <= 0:
                return last + MINUTE_S - now
        return math.inf

    def empty_in_s(self, now: float) -> float:
        """Seconds until nothing is counted any more."""
        return self._parts[-1][1] + MINUTE_S - now if self.used(now) else 0.0


@dataclasses.dataclass
class Purse:
    """The money of a month, in micro-units."""

    spent: int = 0
    held: int = 0  # what the requests that run may cost at most
    settled: int = 0  # by this process, ever: it only grows
    read_at: float = -math.inf  # `spent` was last read from the store


class Meter:
    """What one level uses."""

    def __init__(self) -> None:
        self.requests, self.tokens = Window(), Window()
        self.num_running = 0
        self.purses: dict[str, Purse] = {}

    def purse(self, month: str) -> Purse:
        """The month's."""
        return self.purses.setdefault(month, Purse())

    def is_idle(self, now: float) -> bool:
        """Whether it can be forgotten."""
        return not (self.num_running or self.requests.used(now) or self.tokens.used(now))


class Hold:
    """What an admitted request holds until it leaves.

    Attributes:
        headers: what is left for others like it.
    """

    def __init__(self, meters: Meters, levels: Sequence[Level], month: str, held: int) -> None:
        self._meters, self._levels, self._month, self._held = meters, levels, month, held
        self._is_over = False
        self.headers: Mapping[str, str] = {}

    def leave(self, output_tokens: int, cost_micro: int, month: str) -> None:
        """Give it back, and count what the request used in the end; a second time does nothing."""
        with self._meters.lock:
            if self._is_over:
                return
            self._is_over = True
            now = self._meters.clock()
            for level in self._levels:
                meter = self._meters.of(level)
                meter.num_running -= 1
                if output_tokens:
                    meter.tokens.add(now, output_tokens)
                meter.purse(self._month).held -= self._held
                purse = meter.purse(month)
                purse.spent += cost_micro
                purse.settled += cost_micro


class Meters:
    """All levels' meters; any thread may use them.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.lock = clock, threading.RLock()
        self._meters: dict[str, Meter] = {}
        self._num_entered = 0

    def of(self, level: Level) -> Meter:
        """A level's meter."""
        return self._meters.setdefault(level.id, Meter())

    def enter(self, levels: Sequence[Level], prompt_tokens: int, most_micro: int, month: str) -> Hold:
        """Take a place at all levels, or at none.

        Args:
            most_micro: what the request can cost.

        Raises:
            Refused: 400 (a prompt that never fits), 402 (money), 429 (everything else) with Retry-After.
        """
        with self.lock:
            now = self.clock()
            for level in levels:
                self._may_spend(level, most_micro, month)
            waits = [w for level in levels for w in self._waits(level, now, prompt_tokens)]
            if waits:
                wait_s, reason = max(waits)
                raise self._too_many(levels, now, wait_s, reason)
            for level in levels:
                meter = self.of(level)
                meter.num_running += 1
                meter.requests.add(now, 1)
                meter.tokens.add(now, prompt_tokens)
                meter.purse(month).held += most_micro
            self._sweep(now, month)
            hold = Hold(self, levels, month, most_micro)
            hold.headers = self.headers(levels, now)
            return hold

    def headers(self, levels: Sequence[Level], now: float) -> dict[str, str]:
        """OpenAI's `x-ratelimit-` headers, of the level that has least left."""
        found: dict[str, str] = {}
        for kind, windows in (
            ("requests", [(x.limits.requests_per_min, self.of(x).requests) for x in levels]),
            ("tokens", [(x.limits.tokens_per_min, self.of(x).tokens) for x in levels]),
        ):
            limited = [(max(0, most - w.used(now)), most, w.empty_in_s(now)) for most, w in windows if most is not None]
            if limited:
                left, most, seconds = min(limited)
                found[f"x-ratelimit-limit-{kind}"] = str(most)
                found[f"x-ratelimit-remaining-{kind}"] = str(left)
                found[f"x-ratelimit-reset-{kind}"] = _span(seconds)
        return found

    def stale(self, levels: Sequence[Level], month: str) -> dict[str, int] | None:
        """What this process settled so far at each level, where what was spent has to be read again; else None."""
        with self.lock:
            now = self.clock()
            limited = [x for x in levels if x.limits.budget_micro is not None]
            if all(now - self.of(x).purse(month).read_at < SPENT_S for x in limited):
                return None
            return {x.id: self.of(x).purse(month).settled for x in levels}

    def read(self, levels: Sequence[Level], month: str, spent: Mapping[str, int], settled: Mapping[str, int]) -> None:
        """Take over what the store says was spent.

        What was settled since `stale` is added, though the store may have had some of it: for some seconds a budget
        may look smaller than it is, never larger.
        """
        with self.lock:
            now = self.clock()
            for level in levels:
                purse = self.of(level).purse(month)
                purse.spent = spent.get(level.id, 0) + max(0, purse.settled - settled.get(level.id, 0))
                purse.read_at = now

    def _may_spend(self, level: Level, most_micro: int, month: str) -> None:
        budget = level.limits.budget_micro
        if budget is None or not most_micro:
            return
        purse = self.of(level).purse(month)
        left = budget - purse.spent
        if most_micro > left:
            raise Refused(
                402,
                f"{level.what} has {shown(max(0, left))} left of its {shown(budget)} for {month}, and this request may "
                f"cost {shown(most_micro)}; ask for fewer tokens (max_tokens), have the budget raised, or wait for "
                f"{_next_month(month)}, 00:00 UTC",
            )
        if most_micro > left - purse.held:
            wait = math.ceil(WAIT_FOR_OTHERS_S)
            raise Refused(
                429,
                f"{level.what} has {shown(left)} left of its {shown(budget)} for {month}, and its running requests may "
                f"need {shown(purse.held)} of that; try again in {wait} s, or ask for fewer tokens (max_tokens)",
                headers={"Retry-After": str(wait)},
            )

    def _waits(self, level: Level, now: float, prompt_tokens: int) -> list[tuple[float, str]]:
        meter, limits, found = self.of(level), level.limits, []
        if limits.max_concurrent is not None and meter.num_running >= limits.max_concurrent:
            reason = f"{level.what} may have {limits.max_concurrent} requests running at once"
            found.append((WAIT_FOR_OTHERS_S, reason))
        for kind, window, amount, most in (
            ("requests", meter.requests, 1, limits.requests_per_min),
            ("tokens", meter.tokens, prompt_tokens, limits.tokens_per_min),
        ):
            if most is None:
                continue
            if amount > most:
                raise Refused(
                    400, f"the prompt has {amount} tokens and {level.what} may use {most} a minute; send a shorter one"
                )
            wait_s = window.wait_s(now, amount, most)
            if wait_s:
                used = window.used(now)
                asked = "" if kind == "requests" else f", and the prompt has {amount}"
                reason = f"{level.what} may use {most} {kind} a minute and has used {used}{asked}"
                found.append((wait_s, reason))
        return found

    def _too_many(self, levels: Sequence[Level], now: float, wait_s: float, reason: str) -> Refused:
        wait = max(1, math.ceil(wait_s))
        headers = {"Retry-After": str(wait), **self.headers(levels, now)}
        return Refused(429, f"{reason}; try again in {wait} s", headers=headers)

    def _sweep(self, now: float, month: str) -> None:
        self._num_entered += 1
        if self._num_entered % SWEEP_EVERY:
            return
        self._meters = {i: m for i, m in self._meters.items() if not m.is_idle(now)}
        for meter in self._meters.values():
            meter.purses = {at: p for at, p in meter.purses.items() if at == month or p.held}


def _next_month(month: str) -> str:
    first = datetime.date.fromisoformat(f"{month}-01")
    return (first + datetime.timedelta(days=31)).replace(day=1).isoformat()


def _span(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds * 1000), 60_000)
    text = f"{rest / 1000:g}s"
    return f"{minutes}m{text}" if minutes else text
