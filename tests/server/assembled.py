"""What a client makes of a stream in OpenAI's shapes; the contract is held to on the way."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx

from pyrosome.engine.worker import EngineThread
from pyrosome.options import ServerOptions
from pyrosome.server.service import Service
from tests.server.scripted import MODEL, Script, ScriptedEngine, events_of, running

HEAD = {"id", "object", "created", "model", "system_fingerprint"}


class Bursts(ScriptedEngine):
    """A scripted engine that does so many steps in one, so that as many tokens of an answer come at once."""

    burst = 1

    def step(self) -> list[Any]:
        events: list[Any] = []
        for _ in range(self.burst):
            events += super().step() if self.has_work else []
        return events


@contextlib.contextmanager
def serving(
    script: Script, options: ServerOptions | None = None, **engine: Any
) -> Iterator[tuple[httpx.Client, Bursts]]:
    """A client of a server over such an engine."""
    said = Bursts(script, **engine)
    service = Service(MODEL, options, None, make_driver=lambda: EngineThread(said))
    with running(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.service = service
        yield client, said


def chunks_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert events[-1] == ("", "[DONE]")
    assert all(name == "" for name, _ in events)
    return [json.loads(data) for _, data in events[:-1]]


def whole_of(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer in one piece that chunks make together."""
    heads = [{k: c[k] for k in HEAD} for c in chunks]
    assert all(h == heads[0] for h in heads)
    is_text = heads[0]["object"] == "text_completion"
    whole = {**heads[0], "object": heads[0]["object"].removesuffix(".chunk"), "choices": []}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for name in chunk.keys() - HEAD - {"choices"}:
            if chunk[name] is not None:
                assert name not in whole, f"{name} comes once"
                whole[name] = chunk[name]
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "logprobs": None})
            assert "finish_reason" not in choice, "nothing follows the finish"
            (_add_text if is_text else _add_delta)(choice, part)
            _add_lists(choice, part)
            if part["finish_reason"]:
                choice |= {k: part[k] for k in part.keys() - {"index", "delta", "text", "logprobs", "token_ids"}}
    whole["choices"] = [choices[i] for i in sorted(choices)]
    assert all(c["finish_reason"] for c in whole["choices"]), "each has one"
    return whole


def _add_text(choice: dict[str, Any], part: dict[str, Any]) -> None:
    choice["text"] = choice.get("text", "") + part["text"]


def _add_delta(choice: dict[str, Any], part: dict[str, Any]) -> None:
    delta = part["delta"]
    if "message" not in choice:
        assert delta["role"] == "assistant", "the role comes first"
        choice["message"] = {"role": delta["role"], "content": ""}
    else:
        assert "role" not in delta, "and once"
        assert delta, "no delta is empty"
    message = choice["message"]
    for name in ("content", "reasoning_content", "reasoning"):
        if name in delta:
            message[name] = message.get(name, "") + (delta[name] or "")
    for call in delta.get("tool_calls", []):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            assert call["index"] == len(calls), "calls begin in their order"
            assert call == {"index": call["index"], "id": call["id"], "type": "function",
                            "function": {"name": call["function"]["name"], "arguments": ""}}  # fmt: skip
            calls.append(json.loads(json.dumps(call)))
        else:
            assert call.keys() == {"index", "function"}
            assert call["function"].keys() == {"arguments"}
            assert call["index"] == len(calls) - 1, "calls do not overlap"
            calls[-1]["function"]["arguments"] += call["function"]["arguments"]


def _add_lists(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if "token_ids" in part:
        choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
    for name, values in (part["logprobs"] or {}).items():
        lists = choice["logprobs"] = choice["logprobs"] or {}
        lists[name] = lists.get(name, []) + values


def without_ids(whole: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is another one each time it is asked for."""
    same = json.loads(json.dumps(whole))
    for name in ("id", "created"):
        same.pop(name)
    for choice in same["choices"]:
        for call in choice.get("message", {}).get("tool_calls", []):
            assert call.pop("id").startswith("call_")
    return same
