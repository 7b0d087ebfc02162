"""What passes between a caller and the engine: plain data, so that the engine can live in another process.

Ids, numbers and text alone; a grammar travels as its text.
"""

from __future__ import annotations

import dataclasses

from pyrosome.options import Constraint, SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Token ids to continue, and how."""

    id: str  # unique among the requests an engine has
    ids: tuple[int, ...]  # with `session`, those to append to what the session holds
    params: SamplingParams = SamplingParams()  # noqa: RUF009 - frozen
    priority: int = 0  # higher goes first; waiting makes up for any difference
    salt: str = ""  # prefixes are shared among requests of one salt, and with no other
    stable: int | None = None  # how many of `ids` the next turn will begin with; None: all
    think_end: int | None = None  # the id that closes reasoning, where the prompt leaves reasoning open
    constraint: Constraint | None = None
    never_empty: bool = False  # the answer may not end by itself before it has said something
    session: str = ""  # the session that is continued; "": none
    progress: bool = False  # tell how far its prompt is, after each step that computes some of it


@dataclasses.dataclass(frozen=True, slots=True)
class Reuse:
    """What a request found computed already, and why not more."""

    prompt_tokens: int = 0
    matched_tokens: int = 0  # of the prompt, found in the prefix tree as an unbroken chain of blocks
    reused_tokens: int = 0  # of those, not computed again
    replayed_tokens: int = 0  # recomputed layer by layer to rebuild state, in tokens through the whole network
    limit: str = ""  # "all", "no common prefix", "evicted", "no snapshot", "not wanted"
    stream: str = ""  # the cache stream that limited it
    reason: str = ""  # the same as a sentence with its numbers
    waited_s: float = dataclasses.field(default=0.0, compare=False)  # from its arrival until that was looked up


@dataclasses.dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one completion."""

    request: str
    index: int  # which of the `n` completions
    token: int
    logprobs: dict[int, float]  # of the raw model distribution: this token's, and the top ones asked for
    is_end_token: bool = False  # an end-of-sequence or stop id: not part of the text
    reuse: Reuse | None = None  # with a completion's first token


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a request's prompt is; before its first token, for requests that asked for it."""

    request: str
    computed_tokens: int  # of the prompt, reused ones included
    prompt_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """What the model thought of some of a prompt's tokens, each given those before it; they come in order."""

    request: str
    start: int  # position of the first of them
    logprobs: list[dict[int, float]]  # for each, of the raw model distribution: its own, and the top ones asked for


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
    """When things happened to a request, in seconds of a clock that only goes forward; 0: it did not."""

    arrived: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    num_parks: int = 0  # times it was set aside for want of memory
    num_steps: int = 0
    drafted: tuple[int, ...] = ()  # by position in a draft
    accepted: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a completion, whatever happened to it."""

    request: str
    index: int
    reason: str  # "stop", "length", "repetition", "abort" or "error"
    output_tokens: int = 0
    reuse: Reuse = Reuse()
    timeline: Timeline = Timeline()
    error: str = ""  # what went wrong, for "error"
    error_type: str = ""  # the class in `pyrosome.errors` that says whose fault it is


Event = TokenEvent | Ended  # of a completion
News = Progress | PromptLogprobs  # of a request's prompt, before its first token
