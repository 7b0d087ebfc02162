"""Conversations as clients send them, turn after turn: what prefix reuse is measured on.

Made from a seed, so that a trace is the same on every machine; texts are nonsense of a plausible shape and length.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

TEXT = (
    "cell colony current deep drift edge engine field file flash glow layer light line list map node note path "
    "plan pool query rate ring row search shell signal state step table test trace tree value wave window"
)
WORDS = TEXT.split()
TOOLS: list[dict[str, Any]] = [
    {"name": name, "description": text, "parameters": {"type": "object", "properties": properties}}
    for name, text, properties in (
        ("read_file", "Read part of a file.", {"path": {"type": "string"}, "offset": {"type": "integer"}}),
        ("search", "Search the code base.", {"pattern": {"type": "string"}, "limit": {"type": "integer"}}),
        ("run", "Run a command and return its output.", {"command": {"type": "string"}}),
    )
]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One request of a conversation: everything the client sends again, and what is new."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def agent_trace(num_turns: int = 40, preamble: int = 20_000, total: int = 60_000, seed: int = 0) -> Iterator[Turn]:
    """An agent with tools that thinks: a long preamble, then tool calls whose results make the context grow.

    Args:
        preamble: characters of the system message.
        total: characters of the last turn's messages, about.
    """
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": _prose(random.Random(-1), preamble)},  # one preamble for all agents
        {"role": "user", "content": f"Task {seed}: " + _prose(rng, 200)},
    ]
    room = max(0, total - preamble - 200) // max(1, num_turns - 1)
    for turn in range(num_turns):
        yield Turn([*messages], TOOLS)
        thought, said, result = room // 5, room // 20, room - room // 5 - room // 20 - 150
        tool = TOOLS[turn % len(TOOLS)]
        arguments = {k: _prose(rng, 12) if v["type"] == "string" else turn
                     for k, v in tool["parameters"]["properties"].items()}  # fmt: skip
        call = {"id": f"call_{turn}", "type": "function",
                "function": {"name": tool["name"], "arguments": json.dumps(arguments)}}  # fmt: skip
        messages += [
            {"role": "assistant", "reasoning_content": _prose(rng, thought), "content": _prose(rng, said),
             "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{turn}", "content": _prose(rng, max(20, result))},
        ]  # fmt: skip


def chat_trace(num_turns: int = 40, preamble: int = 20_000, total: int = 50_000, seed: int = 0) -> Iterator[Turn]:
    """A chat about a document that thinks and has no tools: what was thought is left out of the turns that follow.

    Args:
        preamble: characters of the system message, with the document.
        total: characters of the last turn's messages, about; thoughts come to as many again, and are not sent.
    """
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": _prose(random.Random(-2), preamble)}]
    room = max(90, total - preamble) // num_turns
    for _ in range(num_turns):
        messages.append({"role": "user", "content": _prose(rng, room // 3)})
        yield Turn([*messages], None)
        messages.append(
            {"role": "assistant", "reasoning_content": _prose(rng, room), "content": _prose(rng, room - room // 3)}
        )


def _prose(rng: random.Random, length: int) -> str:
    words: list[str] = []
    size = 0
    while size < length:
        words.append(rng.choice(WORDS))
        size += len(words[-1]) + 1
    return " ".join(words)[:length]
