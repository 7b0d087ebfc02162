"""What the chat tests share: the golden cases, both tokenizers, and a way to read an answer cut in every way."""

import functools
import itertools
import json
import random
from pathlib import Path

from pyrosome.chat import Chat, Message, Parser, Prompt, Tokenizer
from pyrosome.chat.events import ContentDelta, ReasoningDelta, ToolCall, ToolCallDelta, ToolCallStart
from pyrosome.chat.prompt import Sampling, Tool

DATA = Path(__file__).parent.parent / "data"
OFFICIAL = DATA / "tokenizer"
NANO = Path(__file__).parents[2] / "src" / "pyrosome" / "builtin" / "nano"
END = "<｜end▁of▁sentence｜>"
SPLIT_ALL_BELOW = 160  # ids: up to this length every split point is tried

WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}},
        "required": ["city"],
    },
}
READ = {
    "name": "read",
    "description": "Read a file",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}},
        "required": ["path"],
        "additionalProperties": False,
    },
}
TOOLS = [WEATHER, READ]


@functools.cache
def golden(name):
    return json.loads((DATA / "encoding" / f"{name}.json").read_text(encoding="utf-8"))["cases"]


@functools.cache
def tokenizer(directory=OFFICIAL):
    return Tokenizer.from_dir(directory)


@functools.cache
def chat(dialect="0731", compat=None, directory=OFFICIAL, default_thinking=True):
    return Chat(directory, dialect, compat, default_thinking=default_thinking, tokenizer=tokenizer(directory))


def prompt_for(*, tools=(), start="content", **fields):
    """A prompt as the parser sees it; tools None: calls are parsed and no schema is known."""
    declared = tuple(Tool(t["name"], t["parameters"]) for t in tools or ())
    fields.setdefault("parse_tools", tools is None or bool(tools))
    return Prompt("", (), Sampling(), tools=declared, start=start, thinking=start == "reasoning", **fields)


def block(*calls, head="\n\n"):
    """Tool calls as the model is trained to write them: (name, {key: value}); strings as text, all else as JSON."""
    return f"{head}<｜DSML｜tool_calls>\n" + "\n".join(map(invoke, calls)) + "\n</｜DSML｜tool_calls>"


def invoke(call):
    name, values = call
    lines = [f'<｜DSML｜invoke name="{name}">']
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        kind = "true" if isinstance(value, str) else "false"
        lines.append(f'<｜DSML｜parameter name="{key}" string="{kind}">{text}</｜DSML｜parameter>')
    return "\n".join([*lines, "</｜DSML｜invoke>"])


def read(ids, prompt, cuts=(), directory=OFFICIAL):
    """The message and all events of ids fed in pieces cut at `cuts`."""
    parser = Parser(tokenizer(directory), prompt, call_id=lambda n: f"call_{n}")
    events = []
    edges = [0, *cuts, len(ids)]
    for first, end in itertools.pairwise(edges):
        events += parser.feed(ids[first:end])
    events += parser.flush()
    message = parser.close()
    assert rebuilt(events) == (message.reasoning, message.content, message.tool_calls)
    return message, events, parser


def rebuilt(events):
    """What a client puts together from the stream."""
    calls = []
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            calls.append(ToolCall(event.id, event.name, ""))
        elif isinstance(event, ToolCallDelta):
            old = calls[event.index]
            calls[event.index] = ToolCall(old.id, old.name, old.arguments + event.arguments)
        else:
            assert event.text, "an empty delta"
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    content = "".join(e.text for e in events if isinstance(e, ContentDelta))
    return reasoning, content, tuple(calls)


def chunkings(length, seed=0):
    """Whole, one by one, every single split point of a short answer, and some at random."""
    rng = random.Random(seed)
    yield ()
    yield range(1, length)
    if length <= SPLIT_ALL_BELOW:
        yield from ((at,) for at in range(1, length))
    for _ in range(3):
        yield sorted(rng.sample(range(1, length), min(length - 1, rng.randrange(1, 9)))) if length > 1 else ()


def answer(text, *, both=True, directory=OFFICIAL, **prompt) -> Message:
    """The message of an answer written with control tokens spelled out, the same at every chunking and tokenizer."""
    prompt = prompt_for(**prompt)
    messages = set()
    for home in (OFFICIAL, NANO) if both else (directory,):
        ids = tokenizer(home).encode(text, allow_special=True)
        cuts = chunkings(len(ids)) if home is OFFICIAL else ((), range(1, len(ids)))
        messages |= {read(ids, prompt, c, home)[0] for c in cuts}
    assert len(messages) == 1, messages
    return messages.pop()


def called(message):
    """Names and parsed arguments of a message's calls."""
    return [(c.name, json.loads(c.arguments)) for c in message.tool_calls]
