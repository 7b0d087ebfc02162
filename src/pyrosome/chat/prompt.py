"""A rendered request: what the engine computes from, and what the parser must know to read the answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyrosome.options import Constraint as Constraint  # part of a prompt too
from pyrosome.options import SamplingParams

Protocol = str  # "chat_completions", "messages" or "responses"


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How the client's request asks to choose tokens, defaults filled in; what it left open is None."""

    max_tokens: int | None = None  # as asked; `Prompt.max_tokens` is the resolved number
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
    """A tool the request declares; `parameters` is its JSON Schema."""

    name: str
    parameters: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered request.  Plain data: it can be pickled, sent to another process, or shown."""

    text: str
    ids: tuple[int, ...]
    sampling: Sampling
    constraint: Constraint | None = None
    max_tokens: int = 8192  # resolved: as asked, or the mode's default cut to the context
    stop: tuple[str, ...] = ()  # apply to content only, so the parser looks for them, not the engine
    thinking: bool = False
    effort: str | None = None  # "low", "high" or "max" as resolved; None when not thinking
    tools: tuple[Tool, ...] = ()
    start: str = "content"  # what the prompt's end leaves open: "reasoning", "content" or "tools"
    continues: bool = False  # the answer goes on from text already there, whose spaces and newlines count
    parse_tools: bool = False
    json_only: bool = False
    stream: bool = False
    protocol: Protocol = "chat_completions"
    dialect: str = "preview"

    @property
    def mode(self) -> str:
        """The effective mode: "off", "low", "high" or "max"."""
        return self.effort or "off"

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """The same for the engine, stop strings left to the parser."""
        s = self.sampling
        values: dict[str, Any] = {
            f.name: getattr(s, f.name)
            for f in dataclasses.fields(s)
            if f.name not in ("max_tokens", "logprobs", "top_logprobs")
        }
        values |= {"max_tokens": self.max_tokens, "logprobs": (s.top_logprobs or 0) if s.logprobs else None}
        return SamplingParams(**(values | changes))
