"""What an engine has done and what it holds: plain numbers, for logs, metrics and tests."""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from pyrosome.engine.request import Reuse

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds; the last count is of longer ones
TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # of a step; the last is of more

STEP_SUMS = ("steps", "seconds", "spans", "tokens", "positions")  # positions: where spans began


@dataclasses.dataclass
class Stats:
    """Counters since the engine began, and gauges as of the last step.

    Tables and tuples are replaced and never changed in place, so that a shallow copy stays as it is.
    """

    requests: int = 0
    ended_by_reason: dict[str, int] = dataclasses.field(default_factory=dict)
    errors_by_type: dict[str, int] = dataclasses.field(default_factory=dict)
    running: int = 0
    waiting: int = 0
    sessions: int = 0

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of prompts, that did not have to be computed
    replayed_tokens: int = 0  # computed to rebuild state, in tokens through the whole network
    computed_tokens: int = 0  # that went through the network in steps, drafts included
    output_tokens: int = 0
    drafted: tuple[int, ...] = ()  # by position in a draft
    accepted: tuple[int, ...] = ()

    lookups_by_limit: dict[str, int] = dataclasses.field(default_factory=dict)
    self_checks: int = 0
    self_check_failures: int = 0
    parks: int = 0
    resumes: int = 0

    free_slots: int = 0
    num_slots: int = 0
    free_pages: dict[int, int] = dataclasses.field(default_factory=dict)  # by tokens per row
    num_pages: dict[int, int] = dataclasses.field(default_factory=dict)
    pool_bytes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # (in use, all), by kind of stream
    tree_pages: dict[int, int] = dataclasses.field(default_factory=dict)  # held by the prefix tree, by tokens per row
    tree_blocks: int = 0
    snapshot_bytes: int = 0
    evicted_blocks: int = 0
    spilled_blocks: int = 0
    restored_blocks: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0

    steps: int = 0
    step_seconds: float = 0.0
    steps_by_seconds: tuple[int, ...] = (0,) * (len(STEP_BUCKETS) + 1)
    steps_by_tokens: tuple[int, ...] = (0,) * (len(TOKEN_BUCKETS) + 1)
    # Sums over steps that only go on with answers, and over those with a part of a prompt: STEP_SUMS.
    decode_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    prompt_sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def step_done(self, seconds: float, num_tokens: int) -> None:
        """Count a step."""
        self.steps += 1
        self.step_seconds += seconds
        self.steps_by_seconds = _one_more_in(self.steps_by_seconds, bisect.bisect_left(STEP_BUCKETS, seconds))
        self.steps_by_tokens = _one_more_in(self.steps_by_tokens, bisect.bisect_left(TOKEN_BUCKETS, num_tokens))

    def step_computed(self, seconds: float, spans: Sequence[tuple[int, int, int]]) -> None:
        """Count what a step computed: (position, tokens, how many of these are drafts) of each span."""
        found = (1, seconds, len(spans), sum(count for _, count, _ in spans), sum(start for start, _, _ in spans))
        is_decoding = all(count - drafts == 1 for _, count, drafts in spans)
        before = self.decode_sums if is_decoding else self.prompt_sums
        sums = {name: before.get(name, 0) + value for name, value in zip(STEP_SUMS, found, strict=True)}
        if is_decoding:
            self.decode_sums = sums
        else:
            self.prompt_sums = sums

    def looked_up(self, reuse: Reuse) -> None:
        """Count what a request found in the prefix tree."""
        self.prompt_tokens += reuse.prompt_tokens
        self.reused_tokens += reuse.reused_tokens
        self.lookups_by_limit = _one_more(self.lookups_by_limit, reuse.limit)

    def drafts_checked(self, num_drafts: int, num_accepted: int) -> None:
        """Count what became of one sequence's drafts."""
        longer = max(len(self.drafted), num_drafts)
        self.drafted = tuple(n + (i < num_drafts) for i, n in enumerate(_padded(self.drafted, longer)))
        self.accepted = tuple(n + (i < num_accepted) for i, n in enumerate(_padded(self.accepted, longer)))

    def ended(self, reason: str) -> None:
        """Count a completion's end."""
        self.ended_by_reason = _one_more(self.ended_by_reason, reason)

    def failed(self, kind: str) -> None:
        """Count a fault."""
        self.errors_by_type = _one_more(self.errors_by_type, kind)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return dataclasses.asdict(self)


class LogLine:
    """One line every so many steps: rates since the last one, and how full the cache is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._then, self._at = Stats(), clock()

    def take(self, now: Stats) -> str:
        """The line, and a new beginning for the next."""
        then, at = self._then, self._clock()
        seconds = max(1e-9, at - self._at)
        prompt = now.prompt_tokens - then.prompt_tokens
        reused = now.reused_tokens - then.reused_tokens
        drafted, accepted = sum(now.drafted) - sum(then.drafted), sum(now.accepted) - sum(then.accepted)
        pages = sum(now.num_pages.values())
        line = (
            f"{now.running} running, {now.waiting} waiting; "
            f"{(now.computed_tokens - then.computed_tokens) / seconds:.0f} tok/s computed, "
            f"{(now.output_tokens - then.output_tokens) / seconds:.1f} tok/s output; "
            f"cache {_percent(pages - sum(now.free_pages.values()), pages)} full; "
            f"prompts {_percent(reused, prompt)} reused; drafts {_percent(accepted, drafted)} accepted"
        )
        self._then, self._at = dataclasses.replace(now), at
        return line


def _one_more(counts: dict[str, int], key: str) -> dict[str, int]:
    return {**counts, key: counts.get(key, 0) + 1}


def _one_more_in(counts: tuple[int, ...], bucket: int) -> tuple[int, ...]:
    return tuple(n + (i == bucket) for i, n in enumerate(counts))


def _padded(values: tuple[int, ...], length: int) -> tuple[int, ...]:
    return values + (0,) * (length - len(values))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
