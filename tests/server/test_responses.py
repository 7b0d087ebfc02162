"""OpenAI's responses on the wire: whole, streamed, refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import ClassVar

import pytest

from pyrosome.chat.carried import carry
from pyrosome.options import ServerOptions
from pyrosome.server.response_items import FreeText
from pyrosome.server.shape import as_json
from tests.server.answers import ANSWERS, ASK, PARIS, TOOLS, Answer, Loop, block, call
from tests.server.scripted import events_of, saying, scripted, until

PATH = "/v1/responses"
BODY = {"model": "m", "input": ASK}
DECLARED = [{"type": "function", "name": n, "parameters": s} for n, s in TOOLS.items()]
EDIT = {"type": "custom", "name": "edit", "description": "edits a file"}
SPACE = {"type": "namespace", "name": "mcp", "description": "d", "tools": [
    {"type": "function", "name": "f", "parameters": TOOLS["f"]}]}  # fmt: skip
TEXT = "response.output_text.delta"


@pytest.fixture(scope="module")
def server():
    with scripted(saying("")) as (client, engine, _):
        yield client, engine


def ask(server, written, path=PATH, **fields):
    client, engine = server
    engine.script = saying(written)
    return client.post(path, json={**BODY, **fields})


def prompt(server, *items, path=PATH, **fields):
    reply = server[0].post(path + "/render", json={"input": list(items), **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["prompt"]


def assembled(text):
    """The response a stream makes out of its deltas; the contract is held to on the way."""
    events = [json.loads(data) for _, data in events_of(text)]
    assert [name for name, _ in events_of(text)] == [e["type"] for e in events]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    items, open_item = [], None
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "in_progress":
            continue
        if kind == "output_item.added":
            assert open_item is None and event["output_index"] == len(items)
            open_item = _Grown(event["item"])
        elif kind == "output_item.done":
            assert event["output_index"] == len(items)
            assert open_item.item | {k: event["item"][k] for k in ("status", "phase", "encrypted_content")
                                     if k in event["item"]} == event["item"]  # fmt: skip
            items.append(event["item"])
            open_item = None
        else:
            assert event["output_index"] == len(items) and event["item_id"] == open_item.item["id"]
            open_item.grow(kind, event)
    assert open_item is None
    last = events[-1]["response"]
    assert events[-1]["type"] == "response." + last["status"] and last["output"] == items
    return last


class _Grown:
    """An item out of its deltas; each `done` is held against them."""

    ENDS: ClassVar = {"content_part": "content", "reasoning_summary_part": "summary"}
    TEXTS: ClassVar = {"output_text": "content", "reasoning_text": "content", "reasoning_summary_text": "summary"}
    CALLS: ClassVar = {"function_call_arguments": "arguments", "custom_tool_call_input": "input"}

    def __init__(self, item):
        assert item["status"] == "in_progress"
        self.item = item

    def grow(self, kind, event):
        name, _, what = kind.rpartition(".")
        if name in self.CALLS:
            field = self.CALLS[name]
            if what == "delta":
                assert event["delta"]
                self.item[field] += event["delta"]
            assert what == "delta" or self.item[field] == event[field]
        elif name in self.ENDS:
            parts = self.item[self.ENDS[name]]
            if what == "added":
                assert parts == [] and event["part"]["text"] == ""
                parts.append(event["part"])
            assert what == "added" or parts[0] == event["part"]
        else:
            part = self.item[self.TEXTS[name]][0]
            if what == "delta":
                part["text"] += event["delta"]
                part.get("logprobs", []).extend(event.get("logprobs", []))
            assert what == "delta" or part["text"] == event["text"]


def scrubbed(response):
    """Without what differs between two answers to the same request."""
    response = json.loads(json.dumps(response))
    assert response["completed_at"] is None or response["completed_at"] >= response["created_at"]
    for name in ("id", "created_at", "completed_at"):
        del response[name]
    for item in response["output"]:
        item.pop("id"), item.pop("call_id", None)
    response["pyrosome"].pop("seed")
    return response


def items_of(answer: Answer):
    """What an answer's output is, without ids."""
    items = []
    if answer.thoughts:
        content = [{"type": "reasoning_text", "text": answer.thoughts}]
        items.append({"type": "reasoning", "content": content, "summary": [], "encrypted_content": None})
    if answer.text:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": answer.text}
        phase = "commentary" if answer.calls else "final_answer"
        items.append({"type": "message", "role": "assistant", "phase": phase, "content": [part]})
    items += [{"type": "function_call", "name": n, "arguments": a} for n, a in answer.calls]
    for item in items:
        item["status"] = "completed"
    if items and answer.ends == "length":
        items[-1]["status"] = "incomplete"
    return items


@pytest.mark.parametrize("answer", [a for a in ANSWERS if not a.stop], ids=lambda a: a.name)
def test_an_answer_is_what_was_written_and_its_stream_makes_the_same(server, answer: Answer):
    fields = {"max_output_tokens": answer.max_tokens} | ({"tools": DECLARED} if answer.tools else {})
    whole = ask(server, answer.written, **fields).json()
    assert scrubbed(whole)["output"] == items_of(answer)
    is_cut = answer.ends == "length"
    assert whole["status"] == ("incomplete" if is_cut else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)
    streamed = ask(server, answer.written, **fields, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream") and "[DONE]" not in streamed.text
    assert scrubbed(assembled(streamed.text)) == scrubbed(whole)


def test_a_response_has_all_its_fields(server):
    reply = ask(server, "hm</think>it is 51", instructions="be brief", metadata={"k": "v"}, user="u", temperature=0.5,
                max_output_tokens=77, store=True, parallel_tool_calls=False, text={"verbosity": "low"})  # fmt: skip
    response = reply.json()
    number = response["id"]
    assert response["output"] == [
        {"type": "reasoning", "id": f"rs_{number}_0", "status": "completed", "summary": [], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": f"msg_{number}_1", "status": "completed", "role": "assistant",
         "phase": "final_answer",
         "content": [{"type": "output_text", "annotations": [], "logprobs": [], "text": "it is 51"}]},
    ]  # fmt: skip
    expected = {
        "object": "response", "status": "completed", "error": None, "incomplete_details": None, "model": "m",
        "instructions": "be brief", "max_output_tokens": 77, "metadata": {"k": "v"}, "parallel_tool_calls": False,
        "previous_response_id": None, "reasoning": {"effort": "high", "summary": None}, "store": False,
        "temperature": 0.5, "text": {"format": {"type": "text"}, "verbosity": "low"}, "tool_choice": "auto",
        "tools": [], "top_p": 1.0, "truncation": "disabled", "user": "u", "background": False,
        "pyrosome": {"mode": "high", "seed": int(reply.headers["x-pyrosome-seed"])},
    }  # fmt: skip
    assert {k: response[k] for k in expected} == expected
    assert number.startswith("resp_") and isinstance(response["created_at"], int)
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens"] == len(server[1].requests[-1].ids)
    assert usage["input_tokens_details"] == {"cached_tokens": 3, "cache_write_tokens": 0}
    assert usage["output_tokens"] > usage["output_tokens_details"]["reasoning_tokens"] > 0


def test_half_a_character_is_echoed_as_a_question_mark(server):
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "default": "\ud800"}}
    server[1].script = saying("a</think>b")
    body = json.dumps({**BODY, "tools": [tool]})
    reply = server[0].post(PATH, content=body, headers={"content-type": "application/json"}).json()
    assert reply["tools"][0]["parameters"]["default"] == "?" and reply["status"] == "completed"


def test_what_a_model_writes_is_json_whatever_its_numbers_are():
    value = {"n": 10**30, "x": float("inf"), "y": [float("nan"), 1.5], "s": "\ud800 é"}
    expected = {"n": 10**30, "x": None, "y": [None, 1.5], "s": "? é"}
    assert json.loads(as_json(value), parse_constant=pytest.fail) == expected
    assert json.loads(as_json({"x": float("inf")}), parse_constant=pytest.fail) == {"x": None}


# Thoughts


def test_thoughts_go_to_the_client_and_back_in_every_way_it_asks_for(server):
    fields = {"tools": DECLARED, "include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}
    written = "need 🙂</think>ok" + block(PARIS)
    whole = ask(server, written, **fields).json()
    thought = whole["output"][0]
    assert thought["summary"] == [{"type": "summary_text", "text": "need 🙂"}]
    assert thought["content"] == [{"type": "reasoning_text", "text": "need 🙂"}]
    stream = ask(server, written, **fields, stream=True).text
    assert scrubbed(assembled(stream)) == scrubbed(whole)
    assert "response.reasoning_summary_text.delta" in stream
    out = {"type": "function_call_output", "call_id": whole["output"][-1]["call_id"], "output": "r"}
    kept = {"type": "reasoning", "summary": [], "encrypted_content": thought["encrypted_content"]}
    for spelled in (thought, kept, {**thought, "encrypted_content": None, "content": None}):
        text = prompt(server, *ASK, spelled, *whole["output"][1:], out, tools=DECLARED)
        assert f"<think>{written}<｜end▁of▁sentence｜>" in text
    asked = server[1].requests[-1].ids
    rendered = server[0].post(PATH + "/render", json={"input": [*ASK, *whole["output"], out], "tools": DECLARED}).json()
    assert tuple(rendered["token_ids"][: len(asked)]) == tuple(asked)


def test_nothing_is_said_twice_that_was_not_asked_for(server):
    text = ask(server, "need</think>ok", stream=True).text
    assert "summary_text" not in text and assembled(text)["output"][0]["encrypted_content"] is None


def test_tool_08_values_have_the_types_they_were_written_with(server):
    answer = next(a for a in ANSWERS if a.name == "values of every kind")
    for stream in (False, True):
        reply = ask(server, answer.written, tools=DECLARED, stream=stream)
        response = assembled(reply.text) if stream else reply.json()
        value = json.loads(response["output"][-1]["arguments"])
        assert value == {"flag": True, "n": -5, "x": 2.5, "s": "5", "l": [1, {"b": None}], "o": {}, "z": None}
        assert type(value["flag"]) is bool and type(value["n"]) is int and type(value["s"]) is str


# Tools of OpenAI's own kinds


def test_a_tool_of_free_text_is_called_with_text(server):  # fmt: skip
    patch = '*** Begin "Patch"\n+a\\b 🙂\n'
    written = "a</think>ok" + block(call("edit", ("input", "true", patch)), PARIS)
    whole = ask(server, written, tools=[EDIT, *DECLARED]).json()
    made = whole["output"][2]
    assert made == {"type": "custom_tool_call", "id": made["id"], "status": "completed", "call_id": made["call_id"],
                    "name": "edit", "input": patch}  # fmt: skip
    assert made["id"].startswith("ctc_") and whole["output"][3]["type"] == "function_call"
    stream = ask(server, written, tools=[EDIT, *DECLARED], stream=True).text
    assert scrubbed(assembled(stream)) == scrubbed(whole)
    pieces = [json.loads(d)["delta"] for n, d in events_of(stream) if n == "response.custom_tool_call_input.delta"]
    assert len(pieces) > 3 and "".join(pieces) == patch
    out = {"type": "custom_tool_call_output", "call_id": made["call_id"], "output": "done"}
    text = prompt(server, *ASK, *whole["output"][:3], out, tools=[EDIT])
    assert f'<｜DSML｜parameter name="input" string="true">{patch}</｜DSML｜parameter>' in text


def test_a_text_behind_another_argument_is_found(server):
    written = "a</think>" + block(call("edit", ("why", "true", "so"), ("input", "true", "text")))
    whole = ask(server, written, tools=[EDIT]).json()
    assert whole["output"][1]["input"] == "text"
    assert scrubbed(assembled(ask(server, written, tools=[EDIT], stream=True).text)) == scrubbed(whole)


def test_a_text_that_is_cut_is_given_as_far_as_it_came(server):
    written = "a</think>" + block(call("edit", ("input", "true", "one two"))).partition("two")[0]
    fields = {"tools": [EDIT], "max_output_tokens": Answer("", written, ends="length").max_tokens}
    whole = ask(server, written, **fields).json()
    assert (whole["output"][-1]["input"], whole["output"][-1]["status"]) == ("one ", "incomplete")
    assert scrubbed(assembled(ask(server, written, **fields, stream=True).text)) == scrubbed(whole)


def test_a_tool_of_a_namespace_is_called_by_both_names(server):
    written = "a</think>" + block(PARIS.replace('"f"', '"mcp__f"'))
    whole = ask(server, written, tools=[SPACE]).json()
    made = whole["output"][1]
    inner = whole["tools"][0]["tools"][0]
    assert (inner["strict"], inner["description"], inner["parameters"]) == (None, None, TOOLS["f"])
    assert (made["namespace"], made["name"], made["arguments"]) == ("mcp", "f", '{"a": "Paris"}')
    assert scrubbed(assembled(ask(server, written, tools=[SPACE], stream=True).text)) == scrubbed(whole)
    out = {"type": "function_call_output", "call_id": made["call_id"], "output": "r"}
    assert '<｜DSML｜invoke name="mcp__f">' in prompt(server, *ASK, *whole["output"], out, tools=[SPACE])


@pytest.mark.parametrize("space", ["mcp", "mcp_", "mcp__", "a__b"])
def test_tools_of_a_namespace_are_named_as_the_template_names_them(server, space):
    tools = [{**SPACE, "name": space}]
    name = json.loads(prompt(server, *ASK, tools=tools).partition('{"name": ')[2].partition(",")[0])
    made = ask(server, "a</think>" + block(PARIS.replace('"f"', f'"{name}"')), tools=tools).json()["output"][1]
    assert (made["namespace"], made["name"]) == (space, "f")


@pytest.mark.parametrize("text", ["", "plain", 'a "b" \\ \n\t\x01', "🙂‍ é", "\\u0041 \\n", "</｜DSML｜"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_free_text_is_read_however_its_json_is_cut(text, ascii_only):
    arguments = json.dumps({"input": text, "more": 5}, ensure_ascii=ascii_only)
    rng = random.Random(text)
    for _ in range(20):
        reader, said, at = FreeText(), [], 0
        while at < len(arguments):
            size = rng.randint(1, 4)
            said.append(reader.feed(arguments[at : at + size]))
            at += size
        assert "".join(said) + reader.close() == text


@pytest.mark.parametrize(("arguments", "text"), [
    ("", ""), ("{}", ""), ("{", ""), ('{"inp', ""), ('{"input": ', ""), ('{"input": 5}', '{"input": 5}'),
    ('{"a": "x", "input": "y"}', "y"), ('{"a": "x"}', '{"a": "x"}'), ("junk", "junk"), ('{"input": "a\\u00', "a"),
    ('{"input": "a\\ud83d', "a"), ('{"input": "a\nb"}', "a\nb"),
])  # fmt: skip
def test_arguments_without_the_text_at_their_beginning_are_read_at_the_end(arguments, text):
    reader = FreeText()
    said = "".join(reader.feed(c) for c in arguments)
    assert said + reader.close() == text


# Log probabilities


def test_log_probabilities_are_of_the_text_alone_and_the_same_in_the_stream(server):  # fmt: skip
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "tools": DECLARED}
    written = "hm hm</think>é 🙂 so" + block(PARIS)
    whole = ask(server, written, **fields).json()
    logprobs = whole["output"][1]["content"][0]["logprobs"]
    assert bytes(b for entry in logprobs for b in entry["bytes"]).decode() == "é 🙂 so"
    assert all(e["logprob"] == -0.25 and len(e["top_logprobs"]) == 2 for e in logprobs)
    assert set(logprobs[0]) == {"token", "bytes", "logprob", "top_logprobs"}
    assert scrubbed(assembled(ask(server, written, **fields, stream=True).text)) == scrubbed(whole)


def test_log_probabilities_may_be_asked_for_without_others_beside_them(server):
    part = ask(server, "</think>so", include=["message.output_text.logprobs"]).json()["output"][0]["content"][0]
    assert [e["top_logprobs"] for e in part["logprobs"]] and not any(e["top_logprobs"] for e in part["logprobs"])


# Requests


@pytest.mark.parametrize("prefix", ["/v1", "", "/beta", "/beta/v1"])  # fmt: skip
def test_every_path_answers_and_renders(server, prefix):
    assert ask(server, "</think>b", f"{prefix}/responses").json()["output"][0]["content"][0]["text"] == "b"
    asked = len(server[1].requests)
    assert prompt(server, *ASK, path=f"{prefix}/responses").endswith("<think>")
    assert len(server[1].requests) == asked
    missing = server[0].get(f"{prefix}/responses/resp_1")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    assert "resp_1" in missing.json()["error"]["message"]


@pytest.mark.parametrize(("body", "words"), [
    ({"input": []}, "empty"), ({}, "input"), ({"input": ASK, "max_output_tokens": 0}, "max_"),
    ({"input": ASK, "temperature": 3}, "temperature"), ({"input": ASK, "stream": "x"}, "expected a boolean"),
    ({"input": ASK, "previous_response_id": "resp_1"}, "send the whole conversation as input"),
    ({"input": ASK, "conversation": "conv_1"}, "send the whole conversation as input"),
    ({"input": ASK, "background": True}, "background: false"),
    ({"input": ASK, "prompt": {"id": "p"}}, "instructions"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "no message"),
    ({"input": ASK, "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"input": ASK, "tools": DECLARED, "tool_choice": {"type": "function", "name": "no"}}, "no function named 'no'"),
    ({"input": [*ASK, {"type": "function_call_output", "call_id": "zz", "output": "x"}]}, "zz"),
    ({"input": ASK, "text": {"format": {"type": "yaml"}}}, "yaml"),
])  # fmt: skip
def test_an_error_has_openais_shape_and_says_what_to_do(server, body, words):
    for path in (PATH, PATH + "/render"):
        reply = server[0].post(path, json=body)
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.json()["error"]["type"] == "invalid_request_error" and words in reply.json()["error"]["message"]


def test_what_does_not_fit_the_context_has_the_code_clients_look_for():
    with scripted(saying("a</think>b")) as (client, _, service):
        service.chat.context_tokens = 100
        reply = client.post(PATH, json={"input": "a b " * 100})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"


def test_what_codex_sends_is_taken(server):
    body = {
        "model": "gpt-7-codex", "instructions": "You are", "stream": True, "store": False, "parallel_tool_calls": True,
        "tool_choice": "auto", "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "reasoning": {"effort": "xhigh", "summary": "auto"}, "text": {"verbosity": "medium"},
        "client_metadata": {"x": "y"}, "service_tier": "auto",
        "tools": [*DECLARED, {"type": "custom", "name": "apply_patch", "description": "d",
                              "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}},
                  EDIT, SPACE, {"type": "web_search", "external_web_access": False}, {"type": "local_shell"}],
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "old"}],
             "encrypted_content": carry("need")},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}],
             "phase": "commentary"},
            {"type": "custom_tool_call", "call_id": "p", "name": "apply_patch", "input": "*** x"},
            {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}},
            {"type": "custom_tool_call_output", "call_id": "p", "output": "ok"},
        ],
    }  # fmt: skip
    client, engine = server
    engine.script = saying("again</think>" + block(call("apply_patch", ("input", "true", "*** y"))))
    response = assembled(client.post(PATH, json=body).text)
    assert response["output"][1]["type"] == "custom_tool_call" and response["output"][1]["input"] == "*** y"
    assert response["reasoning"] == {"effort": "xhigh", "summary": "auto"}
    assert response["pyrosome"]["mode"] == "high"
    text = client.post(PATH + "/render", json=body).json()["prompt"]
    assert '<think>need</think>so\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="apply_patch">' in text
    assert "<tool_result>ok</tool_result><｜Assistant｜><think>" in text


@pytest.mark.parametrize(("fields", "mode", "budget"), [
    ({}, "high", None), ({"reasoning": {"effort": "none"}}, "off", None), ({"reasoning": None}, "high", None),
    ({"reasoning": {"effort": "minimal"}}, "low", None), ({"reasoning": {"effort": "max"}}, "max", None),
    ({"thinking": {"type": "disabled"}}, "off", None), ({"thinking_budget": 7}, "high", 7),
])  # fmt: skip
def test_modes_and_the_budget_of_thoughts(server, fields, mode, budget):
    reply = ask(server, "b", **fields)
    assert reply.headers["x-pyrosome-mode"] == reply.json()["pyrosome"]["mode"] == mode
    asked = (fields.get("reasoning") or {}).get("effort")
    assert reply.json()["reasoning"]["effort"] == asked or ("none" if mode == "off" else mode)
    assert server[1].requests[-1].params.max_thinking_tokens == budget


def test_one_answer_is_given_whatever_number_is_asked_for(server):
    assert ask(server, "</think>b", n=3, prompt_logprobs=1).json()["output"][0]["content"][0]["text"] == "b"
    params = server[1].requests[-1].params
    assert (params.n, params.prompt_logprobs) == (1, None)


@pytest.mark.parametrize("thinking", [True, False])
def test_the_servers_own_mode_and_effort_hold_where_a_client_names_none(thinking):
    options = ServerOptions(thinking=thinking, effort="low")
    bodies = {PATH: {"input": ASK}, "/v1/messages": {"messages": ASK, "max_tokens": 9}}
    with scripted(saying("a</think>b"), options=options) as (client, _, _):

        def mode(path, **fields):
            return client.post(path + "/render", json={**bodies[path], **fields}).json()["mode"]

        for path in bodies:
            assert mode(path) == ("low" if thinking else "off")
            assert mode(path, thinking={"type": "disabled"}) == "off"
        assert mode(PATH, reasoning={"effort": "max"}) == "max"
        assert mode("/v1/messages", output_config={"effort": "max"}) == "max"
        assert mode("/v1/messages", thinking={"type": "adaptive"}) == "low"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "stop"}])
def test_tool_20_a_required_tool_is_called_after_thinking(nano, choice):
    tools = [{"type": "function", "name": "stop", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}]  # fmt: skip
    body = {**BODY, "max_output_tokens": 400, "tools": tools, "tool_choice": choice, "temperature": 0,
            "parallel_tool_calls": False, "thinking_budget": 8}  # fmt: skip
    response = nano.post(PATH, json=body).json()
    calls = [(i["name"], i["arguments"]) for i in response["output"] if i["type"] == "function_call"]
    assert calls == [("stop", "{}")] and response["status"] == "completed" and response["pyrosome"]["mode"] == "high"


def test_the_format_of_an_answer_holds_after_thinking(nano):
    schema = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x", "y"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    text = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    response = nano.post(PATH, json={**BODY, "max_output_tokens": 200, "text": text, "thinking_budget": 8}).json()
    assert json.loads(response["output"][-1]["content"][0]["text"])["a"] in ("x", "y")
    assert response["text"] == {**text, "verbosity": None}


# In the middle of things


def test_srv_04_a_long_prompt_is_waited_for_with_events():  # fmt: skip
    options = ServerOptions(keep_alive_s=0.01)
    with scripted(saying("a</think>b"), options=options, prompt_steps=2) as (client, engine, _):
        engine.hold.set()
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as reply:
            lines = reply.iter_lines()
            waited = [line for line in itertools.islice(lines, 60) if line.startswith("event: ")]
            engine.hold.clear()
            rest = "\n".join(lines)
    assert (
        waited.count("event: response.in_progress") == len(waited) - 1 > 3
        and events_of(rest)[-1][0] == "response.completed"
    )


def test_events_while_waiting_leave_the_stream_as_it_is():
    options = ServerOptions(keep_alive_s=0.001)
    with scripted(saying("a</think>b"), options=options, step_s=0.02, prompt_steps=3) as (client, _, _):
        text = client.post(PATH, json={**BODY, "stream": True}).text
    assert assembled(text)["output"][1]["content"][0]["text"] == "b" and "prompt tokens" in text


def test_a_failure_on_the_way_ends_the_stream_with_what_there_is():
    with scripted(saying("hm</think>" + "more " * 300), step_s=0.001) as (client, engine, _):
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(line for line in lines if TEXT in line)
            engine.fail = "it broke"
            name, data = events_of("\n".join(lines))[-1]
        assert name == "response.failed"
        response = json.loads(data)["response"]
        assert response["status"] == "failed" and response["error"]["code"] == "server_error"
        assert "it broke" in response["error"]["message"]
        assert [i["status"] for i in response["output"]] == ["completed", "incomplete"]
        engine.fail = "again"
        reply = client.post(PATH, json=BODY)
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"


def test_a_client_that_leaves_ends_the_work():
    with scripted(saying("never said"), step_s=0.005, prompt_steps=100_000) as (client, engine, service):
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as reply:
            next(reply.iter_bytes())
        until(lambda: engine.aborted and not engine.has_work and not service.exchanges)


def test_a_server_that_closes_says_so_in_the_stream():
    options, loop = ServerOptions(drain_s=0), Loop()
    with scripted(saying("</think>" + "more " * 3000), step_s=0.002, options=options) as (client, _, service):
        service.watchers.append(loop)
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(line for line in lines if TEXT in line)
            asyncio.run_coroutine_threadsafe(service.drain(), loop.loop).result(20)
            name, data = events_of("\n".join(lines))[-1]
        assert name == "response.failed" and "shutting down" in json.loads(data)["response"]["error"]["message"]
        assert client.post(PATH, json=BODY).status_code == 503


# The official manner


def test_the_official_manner_is_written_as_the_official_api_does():  # fmt: skip
    fields = {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}, "temperature": 0.3,
              "previous_response_id": "resp_1"}  # fmt: skip
    with scripted(saying("hm</think>it is"), options=ServerOptions(compat="deepseek")) as (client, engine, _):
        response = client.post(PATH, json={**BODY, **fields}).json()
    thought = response["output"][0]
    assert thought["encrypted_content"] == f"{response['id']}-0" and thought["summary"] == []
    assert "pyrosome" not in response and response["temperature"] == 0.3
    assert engine.requests[-1].params.temperature == 1.0
