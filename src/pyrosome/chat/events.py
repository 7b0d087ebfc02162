"""What a model's answer is made of, as it comes and when it is complete.  Plain data, safe to send anywhere."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a declared tool; `arguments` is JSON text, cut short where the answer was."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """A whole answer.  `malformed` says in words what in it was not as it should be; an empty answer is one such."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str  # "stop", "length" or "tool_calls"
    stop_sequence: str | None = None  # the client's stop string that ended it
    malformed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The message as a request's history takes it."""
        out: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        return out


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one exchange; the end-of-sentence token is not counted, `</think>` is, but not as reasoning."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int = 0  # of the prompt, that did not have to be computed


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thoughts."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a call's arguments: a piece of JSON text."""

    index: int
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """The last event of a stream."""

    message: Message
    usage: Usage


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallDelta | Done


def joined(events: list[Event]) -> list[Event]:
    """The same stream with neighbouring pieces of one kind put together."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            out[-1] = ReasoningDelta(last.text + event.text)
        elif isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            out[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta) and last.index == event.index:
            out[-1] = ToolCallDelta(event.index, last.arguments + event.arguments)
        else:
            out.append(event)
    return out
