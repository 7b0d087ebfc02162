"""Who computes how many tokens in the next step: one budget over prompts, single tokens and draft checks alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pyrosome.cache.streams import BLOCK_TOKENS

PROMPT_SHARE = 8  # one part in so many of a step stays open for prompts, however many sequences generate


class Candidate(Protocol):
    """What planning needs to know of a completion; `turn` is greater the later it was served last, 0 for never."""

    @property
    def rank(self) -> tuple[int, int]: ...
    @property
    def turn(self) -> int: ...
    @property
    def is_decoding(self) -> bool: ...
    @property
    def num_pending(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def boundary(self) -> int: ...
    @property
    def num_drafts(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def plan_step(candidates: Sequence[C], step_tokens: int) -> list[tuple[C, int, int]]:
    """(candidate, ids to compute, drafts to verify) for one step of at most `step_tokens` tokens.

    Those that generate come first, so that a long prompt makes nobody wait.  Prompts share what is left evenly, so
    that a short one is not behind a long one.  Where not even the former fit, who was served longest ago comes first.
    """
    plan: list[tuple[C, int, int]] = []
    decoding = [c for c in candidates if c.is_decoding]
    prompts = [c for c in candidates if not c.is_decoding]
    share = max(1, step_tokens // PROMPT_SHARE) if prompts else 0
    left, needed = step_tokens, sum(c.num_pending for c in decoding)
    if needed + min(share, sum(c.num_pending for c in prompts)) > step_tokens:
        for c in sorted(candidates, key=lambda c: (c.turn, -c.rank[0], -c.rank[1])):
            if count := min(c.num_pending, left) if c.is_decoding else cut(c, min(share, left)):
                plan.append((c, count, 0))
                left -= count
        return plan
    spare = left - needed - share
    for c in decoding:
        drafts = max(0, min(c.num_drafts, spare))
        plan.append((c, c.num_pending, drafts))
        left, spare = left - c.num_pending - drafts, spare - drafts
    prompts.sort(key=lambda c: (-c.rank[0], c.turn, c.num_pending, -c.rank[1]))
    for at, c in enumerate(prompts):
        if count := cut(c, min(left, max(left // (len(prompts) - at), BLOCK_TOKENS))):
            plan.append((c, count, 0))
            left -= count
    return plan


def cut(candidate: Candidate, most: int) -> int:
    """How many pending ids of a prompt to compute at once: up to where state is to be kept, in whole blocks if any."""
    count = min(candidate.num_pending, most)
    start, stop = candidate.length, candidate.length + count
    if start < candidate.boundary < stop:
        return candidate.boundary - start
    if count < candidate.num_pending and stop // BLOCK_TOKENS * BLOCK_TOKENS > start:
        return stop // BLOCK_TOKENS * BLOCK_TOKENS - start
    return count
