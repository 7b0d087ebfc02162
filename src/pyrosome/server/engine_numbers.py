"""What the engine says of itself, for metrics: asked between its steps, kept, and added up over its restarts."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import Any

from pyrosome.engine.aio import EngineProcess
from pyrosome.engine.stats import Stats
from pyrosome.errors import PyrosomeError
from pyrosome.server.service import Service

log = logging.getLogger(__name__)

# The fields of `Stats` that only grow while an engine lives; all others are as of now.
COUNTERS = (
    "requests", "ended_by_reason", "errors_by_type", "prompt_tokens", "reused_tokens", "replayed_tokens",
    "computed_tokens", "output_tokens", "drafted", "accepted", "lookups_by_limit", "self_checks", "self_check_failures",
    "parks", "resumes", "evicted_blocks", "spilled_blocks", "restored_blocks", "steps", "step_seconds",
    "steps_by_seconds", "steps_by_tokens", "decode_sums", "prompt_sums",
)  # fmt: skip


class Totals:
    """Counters of one engine process after another: they never go back."""

    def __init__(self) -> None:
        self.now = Stats()  # gauges as the last process told them, counters of all
        self._before, self._process = Stats(), 0

    def take(self, stats: Stats, process: int) -> None:
        """Numbers that the process of that number told."""
        if process != self._process:
            self._before, self._process = self.now, process
        sums = {name: _sum(getattr(self._before, name), getattr(stats, name)) for name in COUNTERS}
        self.now = dataclasses.replace(stats, **sums)


class EngineNumbers:
    """The newest numbers there are.

    Attributes:
        about: what the engine says of its set-up; empty until it has answered.
        is_up: whether it answered when it was asked last.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._totals = Totals()
        self._told: float | None = None  # of time.monotonic
        self._asking: asyncio.Task[None] | None = None
        self.about: dict[str, Any] = {}
        self.is_up = False

    @property
    def stats(self) -> Stats:
        """Gauges as they were told last, counters over all restarts."""
        return self._totals.now

    @property
    def age_s(self) -> float | None:
        """Since they were told; None: they never were."""
        return None if self._told is None else time.monotonic() - self._told

    @property
    def num_restarts(self) -> int:
        """How many times the engine's process was started again."""
        driver = self._service.driver
        return driver.num_restarts if isinstance(driver, EngineProcess) else 0

    @property
    def pid(self) -> int | None:
        """The engine's process, where it has one of its own."""
        driver = self._service.driver
        return driver.pid if isinstance(driver, EngineProcess) else None

    async def refresh(self, wait_s: float) -> None:
        """Have the newest numbers, unless the engine takes longer to tell them; then they come later.

        It is asked once at a time, however many wait.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait({self._asking}, timeout=wait_s)

    async def _ask(self) -> None:
        try:
            engine, process = self._service.engine, self.num_restarts
            if not self.about:
                self.about = await engine.call("about")
            stats = await engine.call("stats")
        except PyrosomeError as error:  # there is none yet, or none any more
            log.debug("the engine tells no numbers: %s", error)
            self.is_up = False
            return
        if process == self.num_restarts:  # else it is not known which process they are of
            self._totals.take(stats, process)
            self._told, self.is_up = time.monotonic(), True


def _sum(a: Any, b: Any) -> Any:
    if isinstance(b, dict):
        return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
    if isinstance(b, tuple | list):
        longest = max(len(a), len(b))
        return tuple(_at(a, i) + _at(b, i) for i in range(longest))
    return a + b


def _at(counts: Any, i: int) -> int:
    return int(counts[i]) if i < len(counts) else 0
