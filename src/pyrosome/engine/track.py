"""One sequence of ids as the engine grows it: what is known, what of it is computed, and for whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from pyrosome.cache.prefix import Cursor
from pyrosome.cache.state import Snapshot
from pyrosome.engine.constrain import Guide
from pyrosome.engine.request import Request, Reuse, Timeline
from pyrosome.engine.runner import Sequence
from pyrosome.engine.sampler import SamplerState
from pyrosome.engine.speculate import Depth, PromptLookup


@dataclasses.dataclass(eq=False)
class Track:
    """Ids, and what the cache holds of them.

    In the cache (`sequence`), set aside with its state (`parked`), or neither: then it is found again by its prefix.
    """

    ids: list[int]
    cursor: Cursor
    salt: str = ""
    sequence: Sequence | None = None
    parked: Snapshot | None = None
    lookup: PromptLookup | None = None
    last_served: int = 0  # the engine's step that computed some of it last

    @property
    def length(self) -> int:
        """Tokens whose rows are in the cache."""
        return self.sequence.length if self.sequence else 0

    @property
    def num_pending(self) -> int:
        """Ids that are known and not computed."""
        return len(self.ids) - self.length

    def append(self, ids: Iterable[int]) -> None:
        """Take further ids."""
        ids = list(ids)
        self.ids += ids
        if self.lookup:
            self.lookup.extend(ids)


@dataclasses.dataclass(eq=False)
class Completion:
    """One completion of a request, from its arrival to its end."""

    request: Request
    index: int
    order: int  # of arrival, over all
    track: Track
    sampler: SamplerState
    guide: Guide
    seed: int
    prompt_length: int  # ids before the first one generated
    boundary: int  # the last place, in whole blocks, that the next turn will come past again
    depth: Depth
    drafts: list[int] = dataclasses.field(default_factory=list)  # to be verified in the next step
    waited: int = 0  # steps since it was last served
    turn: int = 0  # numbers those served, one after the other; 0: not yet
    reuse: Reuse = dataclasses.field(default_factory=Reuse)
    arrived: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    num_steps: int = 0
    num_parks: int = 0
    blocked_at: int = -1  # departures there had been when it last found no room
    is_admitted: bool = False
    is_checked: bool = False  # its prefix hit is to be recomputed and compared
    is_suspect: bool = False  # a step with it failed: it runs alone
    has_twins: bool = False  # the other completions of its request have begun
    next_told: int = 1  # the first position of the prompt whose log probability was not told yet

    @property
    def length(self) -> int:
        """Tokens computed."""
        return self.track.length

    @property
    def num_pending(self) -> int:
        """Ids known and not computed."""
        return self.track.num_pending

    @property
    def sequence(self) -> Sequence:
        """Its place in the cache, of one that is in it."""
        assert self.track.sequence is not None
        return self.track.sequence

    @property
    def num_drafts(self) -> int:
        """Drafts to verify."""
        return len(self.drafts)

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.track.ids) - self.prompt_length

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is computed: what is pending was generated."""
        return self.track.length >= self.prompt_length

    @property
    def most_reused(self) -> int | None:
        """Tokens that need not be computed for it, at most; None: any number.

        The log probability of a position is of the logits before it: where all are wanted, none may be passed over.
        """
        is_told = self.index or self.next_told >= self.prompt_length
        return None if is_told or self.request.params.prompt_logprobs is None else self.next_told - 1

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: greater is earlier.  Waiting raises it, so that nobody starves."""
        return self.request.priority + self.waited // AGING_STEPS, -self.order

    def timeline(self, now: float) -> Timeline:
        """When what happened to it, ended `now`."""
        return Timeline(
            self.arrived, self.admitted, self.first_token, now, self.num_parks, self.num_steps,
            self.depth.drafted, self.depth.accepted,
        )  # fmt: skip


class Span(NamedTuple):
    """What a step computes of one completion."""

    completion: Completion
    start: int
    ids: list[int]  # drafts included
    drafts: list[int]
    is_last: bool  # all that was known is computed: the next token is chosen


AGING_STEPS = 512  # steps of waiting that make up for one level of priority
