"""One tool, `lookup`: called where a name is to be looked up, left alone otherwise."""

from __future__ import annotations

import json
import random
from typing import Any

from pyrosome.errors import RequestError
from pyrosome.tasks.heldout import KEPT, TRAINED
from pyrosome.tasks.sample import Sample, assistant, checked_thinking, user
from pyrosome.tasks.sums import draw_sum
from pyrosome.tasks.words import NAMES

LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Gives the value of a name.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}
_GREETINGS = {"hello": "hello !", "thank you": "you are welcome ."}


def tool(rng: random.Random, length: int, heldout: bool, *, thinking: str = "off", direct: float = 0.25) -> Sample:
    """ "look up falcon" -> a call, its result "37", "37"; a share `direct` asks for something that needs no tool.

    Thinking adds a line before each answer.  `length` is not filled.
    """
    checked_thinking(thinking)
    if not isinstance(direct, int | float) or not 0 <= direct <= 1:
        raise RequestError(f"direct = {direct!r} was asked for; it is a share from 0 to 1")
    if rng.random() < direct:
        return _without_call(rng, heldout, thinking)
    name = rng.choice(NAMES)
    value = rng.choice((KEPT if heldout else TRAINED)[name])
    call = {"type": "function", "id": "call_0", "function": {"name": "lookup", "arguments": json.dumps({"name": name})}}
    messages = (
        user(f"look up {name}"),
        {**assistant("", f"look up {name}", thinking), "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": value},
        assistant(value, f"{name} {value}", thinking),
    )
    return Sample("tool", messages, thinking, (LOOKUP,), about={"expected": value, "name": name, "calls": True})


def _without_call(rng: random.Random, heldout: bool, thinking: str) -> Sample:
    if not heldout and rng.random() < 0.3:
        question, answer = rng.choice(list(_GREETINGS.items()))
        reasoning = "no look up"
    else:
        question, answer, reasoning = draw_sum(rng, heldout)
    messages = (user(question), assistant(answer, reasoning, thinking))
    return Sample("tool", messages, thinking, (LOOKUP,), about={"expected": answer, "name": None, "calls": False})
