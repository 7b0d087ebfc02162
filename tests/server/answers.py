"""Answers a model may write, well and badly, and what a client of any protocol is to make of each."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

from tests.server.scripted import TOKENIZER

ASK = [{"role": "user", "content": "? falcon"}]
F = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
G = {
    "type": "object",
    "properties": {
        "flag": {"type": "boolean"}, "n": {"type": "integer"}, "x": {"type": "number"}, "s": {"type": "string"},
        "l": {"type": "array"}, "o": {"type": "object"}, "z": {"type": "null"},
    },
}  # fmt: skip
TOOLS = {"f": F, "g": G, "stop": {"type": "object", "properties": {}}}


def call(name: str, *parameters: tuple[str, str, str]) -> str:
    """A call in the markup; parameters are (name, "true" for text, value)."""
    inner = "".join(
        f'<｜DSML｜parameter name="{n}" string="{is_text}">{value}</｜DSML｜parameter>\n'
        for n, is_text, value in parameters
    )
    return f'<｜DSML｜invoke name="{name}">\n{inner}</｜DSML｜invoke>\n'


def block(*calls: str) -> str:
    """Calls in their block."""
    return "\n\n<｜DSML｜tool_calls>\n" + "".join(calls) + "</｜DSML｜tool_calls>"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model writes, and what is to be read in it."""

    name: str
    written: str
    thoughts: str = ""
    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # names, and arguments as they are written in JSON
    ends: str = "stop"  # or "length": it is cut there; "tool_calls"; "stop_sequence"
    stop: tuple[str, ...] = ()
    cut_input: dict[str, Any] | None = None  # of the last call's arguments, what is complete
    tools: bool = True

    @property
    def max_tokens(self) -> int:
        """So that it is cut at its end, or not at all."""
        return len(TOKENIZER.encode(self.written, allow_special=True)) if self.ends == "length" else 4000

    def inputs(self) -> list[dict[str, Any]]:
        """Arguments as objects."""
        found = [json.loads(a) for _, a in self.calls[: len(self.calls) - (self.cut_input is not None)]]
        return found + ([self.cut_input] if self.cut_input is not None else [])


def _value_of_many_kinds() -> str:
    return call(
        "g", ("flag", "false", "true"), ("n", "false", "-5"), ("x", "false", "2.50"), ("s", "true", "5"),
        ("l", "false", '[1, {"b": null}]'), ("o", "false", "{}"), ("z", "false", "null"),
    )  # fmt: skip


PARIS = call("f", ("a", "true", "Paris"))
F_PARIS = ("f", '{"a": "Paris"}')
FAMILY = "👩‍👩‍👧‍👦 é 🙂"
OPEN = '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">'

ANSWERS = [
    Answer("plain", "hm</think>it is 51", "hm", "it is 51"),
    Answer("no thoughts", "</think>it is", "", "it is"),
    Answer("thoughts never closed", "on and on", "on and on", ""),
    Answer("thoughts closed twice", "a</think>b</think>c", "a", "bc"),
    Answer("thoughts opened again", "a</think>b<think>c", "a", "b<think>c"),
    Answer("newlines round the thoughts", "\n\na\n\n</think>\n\nb", "a", "b"),
    Answer("emoji over several tokens", f"{FAMILY}</think>{FAMILY}", FAMILY, FAMILY),
    Answer("half a character at the end", "a</think>b", "a", "b"),
    Answer("spaces alone", "a</think>  b  ", "a", "  b  "),
    Answer("one call", "a</think>ok" + block(PARIS), "a", "ok", (F_PARIS,), "tool_calls"),
    Answer("a call and no text", "a</think>" + block(PARIS), "a", "", (F_PARIS,), "tool_calls"),
    Answer("a call at once", "</think>" + block(PARIS), "", "", (F_PARIS,), "tool_calls"),
    Answer("two calls", "a</think>" + block(PARIS, call("f", ("a", "true", "Rome\n\"x\" \\ 🙂"))), "a", "",
           (F_PARIS, ("f", '{"a": "Rome\\n\\"x\\" \\\\ 🙂"}')), "tool_calls"),
    Answer("values of every kind", "a</think>" + block(_value_of_many_kinds()), "a", "", (
        ("g", '{"flag": true, "n": -5, "x": 2.50, "s": "5", "l": [1, {"b": null}], "o": {}, "z": null}'),),
        "tool_calls"),
    Answer("no arguments", "a</think>" + block(call("stop")), "a", "", (("stop", "{}"),), "tool_calls"),
    Answer("an integer of thirty digits", "a</think>" + block(call("g", ("n", "false", "1" * 30))), "a", "",
           (("g", '{"n": ' + "1" * 30 + "}"),), "tool_calls"),
    Answer("a call within the thoughts", "hm" + block(PARIS) + "</think>late", "hm", "", (F_PARIS,), "tool_calls"),
    Answer("a call within the thoughts that does not close", "hm\n\n" + OPEN + "Par</think>ok",
           "hm\n\n" + OPEN + "Par", "ok"),
    Answer("text behind the calls", "a</think>" + block(PARIS) + "and more" + block(PARIS), "a", "", (F_PARIS,),
           "tool_calls"),
    Answer("a block that does not close", "a</think>\n\n<｜DSML｜tool_calls>\n" + PARIS, "a", "", (F_PARIS,),
           "tool_calls"),
    Answer("a tag in prose", 'a</think>write <｜DSML｜invoke name="f"> to call', "a",
           'write <｜DSML｜invoke name="f"> to call'),
    Answer("a tool nobody declared, in prose", "a</think>so: " + call("rm", ("a", "true", "x")) + "done", "a",
           "so: " + call("rm", ("a", "true", "x")) + "done"),
    Answer("markup where no tools are", "a</think>" + block(PARIS).strip(), "a", block(PARIS).strip(), tools=False),
    Answer("other bars", "a</think>" + block(PARIS).replace("｜DSML｜", "‖DSML‖"), "a", "", (F_PARIS,), "tool_calls"),
    Answer("arguments wrapped", "a</think>" + block(call("f", ("arguments", "false", '{"a": "Paris"}'))), "a", "",
           (F_PARIS,), "tool_calls"),
    Answer("stop strings", "has STOP</think>abcSTOPdef", "has STOP", "abc", ends="stop_sequence", stop=("STOP",)),
    Answer("a stop string over tokens", "a</think>aaS T OPx", "a", "aa", ends="stop_sequence", stop=("S T OP",)),
    Answer("what only begins a stop string", "a</think>xST", "a", "xST", stop=("STOP",)),
    Answer("cut in the thoughts", "one two thr", "one two thr", "", ends="length"),
    Answer("cut in the text", "a</think>one two thr", "a", "one two thr", ends="length"),
    Answer("cut between thoughts and text", "a</think>", "a", "", ends="length"),
    Answer("cut in a call's name", 'a</think>ok\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f', "a", "ok",
           ends="length"),
    Answer("cut in a value", "a</think>\n\n" + OPEN + "Par", "a", "", (("f", '{"a": "Par'),), "length", cut_input={}),
    Answer("cut in the second value",
           "a</think>\n\n<｜DSML｜tool_calls>\n" + call("g", ("s", "true", "x")).split("</｜DSML｜invoke>")[0]
           + '<｜DSML｜parameter name="l" string="false">[1, 2', "a", "", (("g", '{"s": "x", "l": [1, 2'),), "length",
           cut_input={"s": "x", "l": [1, 2]}),
    Answer("cut in the second call",
           "a</think>" + block(PARIS).replace("</｜DSML｜tool_calls>", "") + OPEN.split("\n", 1)[1] + "Ro", "a", "",
           (F_PARIS, ("f", '{"a": "Ro')), "length", cut_input={}),
]  # fmt: skip


class Loop:
    """A watcher of a service that keeps its event loop."""

    def taken(self, exchange: Any) -> None:
        self.loop = asyncio.get_running_loop()

    def waited(self, num_tokens: int, seconds: float) -> None:
        pass

    def ended(self, outcome: Any) -> None:
        pass

    def refused(self, path: str, problem: Any) -> None:
        pass
