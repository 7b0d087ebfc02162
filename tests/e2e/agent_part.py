"""What a model that works says: it has files read or the weather looked up, and then tells what was found."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pyrosome.engine.request import Request
from tests.server.answers import block, call
from tests.server.scripted import TOKENIZER, written

# How each agent's own tool reads a file: its name, and the arguments for a path.
READS = {
    "Read": lambda path: call("Read", ("file_path", "true", path)),
    "read": lambda path: call("read", ("filePath", "true", path)),
    "exec_command": lambda path: call("exec_command", ("cmd", "true", f"cat {path}")),
}


def part(request: Request) -> Sequence[Sequence[int]]:
    """The script.  What was found is told; a file or the weather that is asked about is looked up; else little."""
    return [written(_said(TOKENIZER.decode(list(request.ids))))] * request.params.n


def _said(prompt: str) -> str:
    opening = "" if prompt.endswith("</think>") else "something is to be looked up</think>"
    turn = prompt.rpartition("<｜Assistant｜>")[0].rpartition("<｜User｜>")[2]
    if found := re.findall(r"the word is (\w+)", turn):
        return f"{opening}It says {' and '.join(found)}."
    tool = next((name for name in READS if f'{{"name": "{name}"' in prompt), None)
    path = re.findall(r"Read (/\S+\.txt)", turn)
    if tool and path:
        return f"{opening}I read it.{block(READS[tool](path[-1]))}"
    places = re.findall(r"weather in (\w+) and (\w+)", turn)
    if places and '{"name": "weather"' in prompt:
        return f"{opening}I look.{block(*(call('weather', ('place', 'true', p)) for p in places[0]))}"
    return f"{opening}Nothing to look up"
