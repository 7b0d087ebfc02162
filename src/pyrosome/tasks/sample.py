"""One sample of the synthetic tasks: a conversation or a plain text, and what a judge must know of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyrosome.errors import RequestError

THINKING = ("off", "high", "max")


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a generator returns.  Text only: ids are the encoder's business.

    Attributes:
        kind: the generator's name, or "text" for a passage in which every token is to be learnt.
        messages: a whole conversation in OpenAI chat shape, the assistant's answers included.
        thinking: "off", "high" or "max": how the assistant answers.
        tools: tools the conversation declares, in OpenAI shape.
        text: plain text instead of messages.
        answers: of plain text, ascending character ranges that follow from what stands before them.
        about: for scoring, at least "expected" (the last answer).  Where facts are asked: "name", "position" (index
            of the fact's first word in its document) and "num_facts", of the last question; "names" and "positions"
            have all questions in order.
    """

    kind: str
    messages: tuple[dict[str, Any], ...] = ()
    thinking: str = "off"
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    answers: tuple[tuple[int, int], ...] = ()
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def user(content: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str, thinking: str) -> dict[str, Any]:
    """An assistant's message, with its reasoning where it thinks."""
    if thinking == "off":
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "reasoning_content": reasoning, "content": content}


def checked_thinking(thinking: str) -> str:
    """`thinking` if there is such a mode.

    Raises:
        RequestError
    """
    if thinking not in THINKING:
        raise RequestError(f"thinking {thinking!r} was asked for; there are {', '.join(map(repr, THINKING))}")
    return thinking


def checked_count(name: str, value: int, most: int, least: int = 1) -> int:
    """`value` of the knob `name` if it is a whole number from `least` to `most`.

    Raises:
        RequestError
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name} = {value!r} was asked for; it is a whole number from {least} to {most}")
    return value
