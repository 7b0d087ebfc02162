"""The output items of OpenAI's responses as they grow: thoughts, the message, calls; and the events that tell of it."""

from __future__ import annotations

import abc
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic_core

from pyrosome.chat.carried import carry
from pyrosome.chat.events import ContentDelta, Event, ReasoningDelta, ToolCallDelta, ToolCallStart

Frames = list[tuple[str, dict[str, Any]]]  # events: their type, and what they hold besides it
Entries = Sequence[dict[str, Any]]  # log probabilities, as OpenAI writes them


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a response is written."""

    free_text: frozenset[str] = frozenset()  # tools that are called with one text
    namespaces: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)  # tool: its own, and its name
    summarizes: bool = False  # thoughts are given as their summary too, which is what some clients show
    carries: bool = False  # thoughts are put into `encrypted_content`, which is what some clients send back
    official: bool = False


class Items:
    """All items of one response.

    Attributes:
        done: those that are complete, and at the end the one that was cut short.
    """

    def __init__(self, response_id: str, manner: Manner) -> None:
        self._response_id, self._manner = response_id, manner
        self._open: _Item | None = None
        self.done: list[dict[str, Any]] = []

    @property
    def shown(self) -> list[dict[str, Any]]:
        """As they are now, the open one included."""
        return [*self.done, *([self._open.shown("incomplete")] if self._open else [])]

    def take(self, event: Event, logprobs: Entries = ()) -> Frames:
        """The next part of the answer."""
        kind = _KINDS.get(type(event))
        if kind is None:
            return []
        frames: Frames = []
        if isinstance(event, ToolCallStart) or not isinstance(self._open, kind):
            frames += self.close(before=event)
            if isinstance(event, ToolCallStart) and event.name in self._manner.free_text:
                kind = _FreeTextCall
            item = self._open = kind(self._response_id, len(self.done), self._manner, event)
            frames.append(("response.output_item.added", item.place | {"item": item.shown("in_progress")}))
            frames += item.opened()
        assert self._open
        return frames + self._open.grown(event, logprobs)

    def close(self, status: str = "completed", *, before: Event | None = None) -> Frames:
        """The open item ends."""
        item, self._open = self._open, None
        if item is None:
            return []
        if isinstance(item, _Message) and isinstance(before, ToolCallStart):
            item.phase = "commentary"
        frames = item.closed()
        self.done.append(item.shown(status))
        return [*frames, ("response.output_item.done", item.place | {"item": self.done[-1]})]


class _Item(abc.ABC):
    prefix = ""

    def __init__(self, response_id: str, index: int, manner: Manner, event: Event) -> None:
        self._response_id, self._index, self._manner = response_id, index, manner
        self.id = f"{self.prefix}_{response_id}_{index}"
        self._parts: list[str] = []

    @property
    def place(self) -> dict[str, Any]:
        return {"output_index": self._index}

    @property
    def _text(self) -> str:
        return "".join(self._parts)

    def _frame(self, kind: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        return f"response.{kind}", {"item_id": self.id, **self.place, **fields}

    @abc.abstractmethod
    def shown(self, status: str) -> dict[str, Any]: ...
    def opened(self) -> Frames:
        return []

    @abc.abstractmethod
    def grown(self, event: Event, logprobs: Entries) -> Frames: ...
    @abc.abstractmethod
    def closed(self) -> Frames: ...


class _Reasoning(_Item):
    prefix = "rs"

    def shown(self, status: str) -> dict[str, Any]:
        text, manner = self._text, self._manner
        opaque = f"{self._response_id}-{self._index}" if manner.official else None
        if manner.carries and status != "in_progress":
            opaque = carry(text)
        return {
            "type": "reasoning", "id": self.id, "status": status,
            "content": [{"type": "reasoning_text", "text": text}] if text else [],
            "summary": [{"type": "summary_text", "text": text}] if text and manner.summarizes else [],
            "encrypted_content": opaque,
        }  # fmt: skip

    def opened(self) -> Frames:
        frames = [self._frame("content_part.added", content_index=0, part={"type": "reasoning_text", "text": ""})]
        if self._manner.summarizes:
            part = {"type": "summary_text", "text": ""}
            frames.append(self._frame("reasoning_summary_part.added", summary_index=0, part=part))
        return frames

    def grown(self, event: Event, logprobs: Entries) -> Frames:
        assert isinstance(event, ReasoningDelta)
        self._parts.append(event.text)
        frames = [self._frame("reasoning_text.delta", content_index=0, delta=event.text)]
        if self._manner.summarizes:
            frames.append(self._frame("reasoning_summary_text.delta", summary_index=0, delta=event.text))
        return frames

    def closed(self) -> Frames:
        text = self._text
        part = {"type": "reasoning_text", "text": text}
        frames = [
            self._frame("reasoning_text.done", content_index=0, text=text),
            self._frame("content_part.done", content_index=0, part=part),
        ]
        if self._manner.summarizes:
            part = {"type": "summary_text", "text": text}
            frames.append(self._frame("reasoning_summary_text.done", summary_index=0, text=text))
            frames.append(self._frame("reasoning_summary_part.done", summary_index=0, part=part))
        return frames


class _Message(_Item):
    prefix = "msg"
    phase = "final_answer"

    def __init__(self, response_id: str, index: int, manner: Manner, event: Event) -> None:
        super().__init__(response_id, index, manner, event)
        self._logprobs: list[dict[str, Any]] = []

    def shown(self, status: str) -> dict[str, Any]:
        return {
            "type": "message", "id": self.id, "status": status, "role": "assistant", "phase": self.phase,
            "content": [self._part()] if self._parts else [],
        }  # fmt: skip

    def opened(self) -> Frames:
        return [self._frame("content_part.added", content_index=0, part=self._part())]

    def grown(self, event: Event, logprobs: Entries) -> Frames:
        assert isinstance(event, ContentDelta)
        self._parts.append(event.text)
        self._logprobs += logprobs
        return [self._frame("output_text.delta", content_index=0, delta=event.text, logprobs=list(logprobs))]

    def closed(self) -> Frames:
        return [
            self._frame("output_text.done", content_index=0, text=self._text, logprobs=self._logprobs),
            self._frame("content_part.done", content_index=0, part=self._part()),
        ]

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "annotations": [], "logprobs": list(self._logprobs), "text": self._text}


class _Call(_Item):
    prefix = "fc"
    kind, argument = "function_call", "arguments"
    event = "function_call_arguments"

    def __init__(self, response_id: str, index: int, manner: Manner, event: Event) -> None:
        super().__init__(response_id, index, manner, event)
        assert isinstance(event, ToolCallStart)
        space, name = manner.namespaces.get(event.name, ("", event.name))
        self._named = {"call_id": event.id, "name": name} | ({"namespace": space} if space else {})

    def shown(self, status: str) -> dict[str, Any]:
        return {"type": self.kind, "id": self.id, "status": status, **self._named, self.argument: self._text}

    def grown(self, event: Event, logprobs: Entries) -> Frames:
        return self._said(event.arguments) if isinstance(event, ToolCallDelta) else []

    def closed(self) -> Frames:
        return [self._frame(f"{self.event}.done", **{self.argument: self._text})]

    def _said(self, text: str) -> Frames:
        self._parts.append(text)
        return [self._frame(f"{self.event}.delta", delta=text)] if text else []


class _FreeTextCall(_Call):
    prefix = "ctc"
    kind, argument = "custom_tool_call", "input"
    event = "custom_tool_call_input"

    def __init__(self, response_id: str, index: int, manner: Manner, event: Event) -> None:
        super().__init__(response_id, index, manner, event)
        self._input = FreeText()

    def grown(self, event: Event, logprobs: Entries) -> Frames:
        return self._said(self._input.feed(event.arguments)) if isinstance(event, ToolCallDelta) else []

    def closed(self) -> Frames:
        return self._said(self._input.close()) + super().closed()


_KINDS: dict[type, type[_Item]] = {
    ReasoningDelta: _Reasoning, ContentDelta: _Message, ToolCallStart: _Call, ToolCallDelta: _Call,
}  # fmt: skip


class FreeText:
    """The text `input` out of the JSON of a call's arguments, as they grow."""

    _OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
    # Whole characters and escapes; half of a surrogate pair waits for the other.
    _PIECE = re.compile(
        r'(?:[^"\\]|\\["\\/bfnrt]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}'
        r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*"
    )

    def __init__(self) -> None:
        self._json = ""  # what is not read yet
        self._state = "before"  # "within" the text, "after" it

    def feed(self, arguments: str) -> str:
        """More of the arguments; what of the text they settle."""
        if self._state == "after":
            return ""
        self._json += arguments
        if self._state == "before":
            found = self._OPENING.match(self._json)
            if not found:
                return ""
            self._state, self._json = "within", self._json[found.end() :]
        piece = self._PIECE.match(self._json)
        assert piece
        self._json = self._json[piece.end() :]
        if self._json.startswith('"'):
            self._state = "after"
        return str(json.loads(f'"{piece.group()}"', strict=False))

    def close(self) -> str:
        """No more arguments come; the text, where it was not at their beginning, or all of them where it is nowhere."""
        if self._state != "before" or not self._json:
            return ""
        try:
            value = pydantic_core.from_json(self._json, allow_partial=True)
        except ValueError:
            return self._json
        if isinstance(value, dict) and (not value or isinstance(value.get("input"), str)):
            return str(value.get("input", ""))
        return self._json
