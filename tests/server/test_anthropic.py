"""Anthropic's messages on the wire: whole, streamed, counted, refused."""

from __future__ import annotations

import asyncio
import itertools
import json

import pydantic_core
import pytest

from pyrosome.chat.carried import carried
from pyrosome.chat.events import Message
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.anthropic import input_of, stop_reason
from tests.server.answers import ANSWERS, ASK, PARIS, TOOLS, Answer, Loop, block
from tests.server.scripted import events_of, saying, scripted, until

PATH = "/v1/messages"
BODY = {"model": "m", "max_tokens": 4000, "messages": ASK}
DECLARED = [{"name": n, "description": "", "input_schema": s} for n, s in TOOLS.items()]
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "stop_sequence": "stop_sequence"}


@pytest.fixture(scope="module")
def server():
    with scripted(saying("")) as (client, engine, _):
        yield client, engine


def ask(server, written, path=PATH, **fields):
    client, engine = server
    engine.script = saying(written)
    return client.post(path, json={**BODY, **fields})


def assembled(text):
    """The message a stream makes, as Anthropic's client puts it together; the contract is held to on the way."""
    events = [(name, json.loads(data)) for name, data in events_of(text)]
    assert all(name == event["type"] for name, event in events)
    told = [event for name, event in events if name != "ping"]
    assert told[0]["type"] == "message_start" and told[-1]["type"] == "message_stop"
    message = told[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    open_block, pieces = None, []
    for event in told[1:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == len(message["content"])
            open_block, pieces = event["content_block"], []
            message["content"].append(open_block)
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1
            assert not (pieces and pieces[-1]["type"] == "signature_delta"), "nothing follows a signature"
            pieces.append(event["delta"])
        else:
            assert event == {"type": "content_block_stop", "index": len(message["content"]) - 1}
            _fill(open_block, pieces)
            open_block = None
    assert open_block is None
    assert told[-2]["type"] == "message_delta"
    message |= told[-2]["delta"] | {"pyrosome": told[-2]["pyrosome"]}
    message["usage"] |= told[-2]["usage"]
    return message


def _fill(target, pieces):
    kinds = {"thinking": {"thinking_delta", "signature_delta"}, "text": {"text_delta"},
             "tool_use": {"input_json_delta"}}[target["type"]]  # fmt: skip
    assert {p["type"] for p in pieces} <= kinds
    if target["type"] == "tool_use":
        assert target["input"] == {}
        target["input"] = pydantic_core.from_json(
            "".join(p["partial_json"] for p in pieces) or "{}", allow_partial=True
        )
        return
    field = target["type"]
    target[field] = "".join(p.get(field, "") for p in pieces)
    if field == "thinking":
        assert pieces[-1]["type"] == "signature_delta"
        target["signature"] = pieces[-1]["signature"]


def scrubbed(message):
    """Without what differs between two answers to the same request."""
    message = json.loads(json.dumps(message))
    for part in [message, *message["content"]]:
        part.pop("id", None)
        part.pop("signature", None)
    message["pyrosome"].pop("seed")
    return message


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.name)
def test_an_answer_is_what_was_written_and_its_stream_makes_the_same(server, answer: Answer):
    fields = {"max_tokens": answer.max_tokens, "stop_sequences": list(answer.stop)}
    if answer.tools:
        fields["tools"] = DECLARED
    whole = ask(server, answer.written, **fields).json()
    content = [{"type": "thinking", "thinking": answer.thoughts}] if answer.thoughts else []
    content += [{"type": "text", "text": answer.text}] if answer.text else []
    calls = zip(answer.calls, answer.inputs(), strict=True)
    content += [{"type": "tool_use", "name": name, "input": value} for (name, _), value in calls]
    assert scrubbed(whole)["content"] == content
    assert whole["stop_reason"] == REASONS[answer.ends]
    assert whole["stop_sequence"] == (answer.stop[0] if answer.ends == "stop_sequence" else None)
    streamed = ask(server, answer.written, **fields, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert scrubbed(assembled(streamed.text)) == scrubbed(whole)
    assert "DSML" not in json.dumps(content) or "DSML" in answer.text + answer.thoughts


def test_a_message_has_all_its_fields(server):
    reply = ask(server, "hm</think>it is 51")
    message = reply.json()
    assert message == {
        "id": message["id"], "type": "message", "role": "assistant", "model": "m",
        "content": [{"type": "thinking", "thinking": "hm", "signature": message["id"]},
                    {"type": "text", "text": "it is 51"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": message["usage"], "pyrosome": {"mode": "high", "seed": int(reply.headers["x-pyrosome-seed"])},
    }  # fmt: skip
    assert message["id"].startswith("msg_") and reply.headers["request-id"] == message["id"]
    assert reply.headers["x-pyrosome-mode"] == "high"


def test_input_tokens_are_those_the_cache_did_not_give(server):
    num_prompt = server[0].post(PATH + "/count_tokens", json=BODY).json()["input_tokens"]
    usage = ask(server, "hm</think>it is").json()["usage"]
    assert usage["cache_read_input_tokens"] == 3 and usage["cache_creation_input_tokens"] == 0
    assert usage["input_tokens"] == num_prompt - 3
    assert usage["output_tokens"] > usage["output_tokens_details"]["thinking_tokens"] > 0
    assert usage["service_tier"] == "standard"
    events = events_of(ask(server, "hm</think>it is", stream=True).text)
    first = json.loads(events[0][1])["message"]["usage"]
    assert (first["input_tokens"], first["output_tokens"]) == (num_prompt, 0)


def test_a_call_is_streamed_from_its_first_character(server):
    events = events_of(ask(server, "</think>" + block(PARIS), tools=DECLARED, stream=True).text)
    starts = [json.loads(d) for n, d in events if n == "content_block_start"]
    assert [(s["content_block"]["name"], s["content_block"]["input"]) for s in starts] == [("f", {})]
    pieces = [json.loads(d)["delta"]["partial_json"] for n, d in events if n == "content_block_delta"]
    assert pieces[0] == '{"a": "' and len(pieces) > 3 and "".join(pieces) == '{"a": "Paris"}'


@pytest.mark.parametrize(("arguments", "value"), [
    ('{"a": 1}', {"a": 1}), ('{"a": "Par', {}), ('{"a": 1, "b": {"c": [1, 2', {"a": 1, "b": {"c": [1, 2]}}),
    ("{", {}), ("", {}), ("nonsense", {}), ("[1]", {}), ('{"a": "\\ud800"}', {"a": "\ud800"}),
    ('{"a":' * 2000, {}), ('{"n": ' + "9" * 40 + "}", {"n": int("9" * 40)}),
])  # fmt: skip
def test_arguments_that_were_cut_short_are_what_is_complete_in_them(arguments, value):
    assert input_of(arguments) == value


def test_a_loop_that_was_cut_is_a_length_reached():
    assert stop_reason(Message("", "a a a", (), "repetition")) == "max_tokens"
    assert stop_reason(Message("", "a", (), "abort")) == "end_turn"


# Paths, shapes of errors, counting


@pytest.mark.parametrize("prefix", ["/v1", "", "/anthropic/v1", "/anthropic"])  # fmt: skip
@pytest.mark.parametrize("query", ["", "?beta=true"])
def test_every_path_answers_counts_and_renders(server, prefix, query):
    assert ask(server, "a</think>b", f"{prefix}/messages{query}").json()["content"][1]["text"] == "b"
    client, engine = server
    num_asked = len(engine.requests)
    counted = client.post(f"{prefix}/messages/count_tokens{query}", json=BODY).json()
    rendered = client.post(f"{prefix}/messages/render{query}", json=BODY).json()
    assert counted == {"input_tokens": len(rendered["token_ids"])}
    assert rendered["prompt"].endswith("<｜User｜>? falcon<｜Assistant｜><think>")
    assert len(engine.requests) == num_asked, "nothing is generated for that"


@pytest.mark.parametrize(("body", "status", "kind", "words"), [
    ({"messages": []}, 400, "invalid_request_error", "at least one message"),
    ({}, 400, "invalid_request_error", "messages"),
    ({"messages": ASK, "max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ({"messages": ASK, "temperature": 3}, 400, "invalid_request_error", "temperature"),
    ({"messages": ASK, "top_k": "x"}, 400, "invalid_request_error", "top_k"),
    ({"messages": ASK, "stop_sequences": [""]}, 400, "invalid_request_error", "stop"),
    ({"messages": ASK, "thinking": {"type": "enabled", "budget_tokens": "x"}}, 400, "invalid_request_error", "u64"),
    ({"messages": ASK, "tools": [{"name": "a b", "input_schema": {}}]}, 400, "invalid_request_error", "tools"),
    ({"messages": ASK, "tools": DECLARED, "tool_choice": {"type": "tool", "name": "no"}}, 400,
     "invalid_request_error", "no function named 'no'"),
    ({"messages": ASK, "model": 5}, 400, "invalid_request_error", "model"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "zz", "content": "x"}]}]}, 400,
     "invalid_request_error", "zz"),
])  # fmt: skip
def test_an_error_has_anthropics_shape(server, body, status, kind, words):
    for path in (PATH, "/anthropic/messages"):
        reply = server[0].post(path, json=body)
        assert (reply.status_code, reply.json()["type"], reply.json()["error"]["type"]) == (status, "error", kind)
        assert words in reply.json()["error"]["message"]


def test_errors_of_the_server_have_anthropics_shape_too(server):
    client, _ = server
    for reply, status in (
        (client.post(PATH, content=b"{"), 400),
        (client.post(PATH, content=b"{}", headers={"content-type": "text/plain"}), 415),
        (client.get(PATH), 405),
        (client.post("/anthropic/v1/nowhere", json={}), 404),
    ):
        assert reply.status_code == status
        assert reply.json()["type"] == "error" and reply.json()["error"]["message"]


def test_what_does_not_fit_the_context_is_refused_in_words_clients_look_for_lowered_or_counted():
    with scripted(saying("a</think>b")) as (client, engine, service):
        service.chat.context_tokens = 100
        long = {**BODY, "messages": [{"role": "user", "content": "a b " * 100}]}
        num_tokens = client.post(PATH + "/count_tokens", json=long).json()["input_tokens"]
        refused = client.post(PATH, json=long)
        assert client.post(PATH, json=BODY).status_code == 200
    assert refused.status_code == 400 and num_tokens > 100
    message = refused.json()["error"]["message"]
    assert message.startswith(
        f"prompt is too long: {num_tokens + 4000} tokens > 100 maximum; the prompt has {num_tokens}"
    )
    assert engine.requests[-1].params.max_tokens == 100 - len(engine.requests[-1].ids)


# What a request may say


def test_what_claude_code_sends_is_taken(server):  # fmt: skip
    body = {
        "model": "claude-fable-9", "stream": True, "max_tokens": 32000, "temperature": 1,
        "system": [{"type": "text", "text": "You are", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
                   {"type": "text", "text": "an agent", "citations": None}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "go", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "need f", "signature": "whose ever"},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": "x"}, "caller": {"type": "direct"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": [
                    {"type": "text", "text": "no"}], "cache_control": {"type": "ephemeral"}}]},
        ],
        "tools": [{**t, "type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True,
                   "defer_loading": False, "input_examples": []} for t in DECLARED],
        "tool_choice": {"type": "auto"}, "metadata": {"user_id": '{"device_id":"d","session_id":"s"}'},
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "mcp_servers": [], "service_tier": "auto", "diagnostics": None,
    }  # fmt: skip
    client, engine = server
    engine.script = saying("again</think>" + block(PARIS))
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,effort-2025-11-24",
               "x-app": "cli", "authorization": "Bearer sk-1", "x-api-key": "sk-1"}  # fmt: skip
    message = assembled(client.post("/v1/messages?beta=true", json=body, headers=headers).text)
    assert message["model"] == "claude-fable-9" and message["stop_reason"] == "tool_use"
    counted = client.post("/v1/messages/count_tokens?beta=true", json=body, headers=headers)
    assert counted.json() == {"input_tokens": len(engine.requests[-1].ids)}
    prompt = client.post("/v1/messages/render", json=body).json()["prompt"]
    assert "You are\n\nan agent\n\n## Tools" in prompt
    assert "<think>need f</think>" in prompt and "<tool_result>no</tool_result><｜Assistant｜><think>" in prompt


def test_the_user_a_request_is_for_shares_no_prefix_with_others(server):
    salts = []
    for fields in ({}, {"metadata": {"user_id": "u"}}, {"metadata": {"user_id": "v"}}, {"metadata": {}}):
        ask(server, "a</think>b", **fields)
        salts.append(server[1].requests[-1].salt)
    assert salts[0] == salts[3] and len(set(salts)) == 3


@pytest.mark.parametrize(("fields", "mode", "budget"), [
    ({}, "high", None),
    ({"thinking": {"type": "disabled"}}, "off", None),
    ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low", None),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "max"}}, "max", 1024),
    ({"output_config": {"effort": "none"}}, "off", None),
])  # fmt: skip
def test_modes_and_the_budget_of_thoughts(server, fields, mode, budget):
    reply = ask(server, "a</think>b", **fields)
    assert reply.headers["x-pyrosome-mode"] == reply.json()["pyrosome"]["mode"] == mode
    assert server[1].requests[-1].params.max_thinking_tokens == budget


def test_a_last_message_of_the_assistant_is_continued(server):
    messages = [*ASK, {"role": "assistant", "content": "it is "}]
    rendered = server[0].post(PATH + "/render", json={**BODY, "messages": messages}).json()
    assert rendered["prompt"].endswith("it is ") and rendered["continues"]
    assert ask(server, " 51", messages=messages).json()["content"] == [{"type": "text", "text": " 51"}]


def test_one_answer_is_given_whatever_number_is_asked_for(server):
    assert ask(server, "a</think>b", n=3, prompt_logprobs=1).json()["content"][1]["text"] == "b"
    params = server[1].requests[-1].params
    assert (params.n, params.prompt_logprobs) == (1, None)


def test_thoughts_that_are_not_to_be_shown_come_in_the_signature_and_go_back_in_it(server):
    fields = {"thinking": {"type": "adaptive", "display": "omitted"}, "tools": DECLARED}
    whole = ask(server, "secret 🙂</think>" + block(PARIS), **fields).json()
    thought, use = whole["content"]
    assert thought["thinking"] == "" and carried(thought["signature"]) == "secret 🙂"
    stream = ask(server, "secret 🙂</think>" + block(PARIS), **fields, stream=True).text
    assert "secret" not in stream and assembled(stream)["content"][0] == thought
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "r"}]}
    prompts = []
    for block_ in (thought, {"type": "thinking", "thinking": "secret 🙂"}):
        messages = [*ASK, {"role": "assistant", "content": [block_, use]}, result]
        body = {**BODY, **fields, "messages": messages}
        prompts.append(server[0].post(PATH + "/render", json=body).json()["prompt"])
    assert prompts[0] == prompts[1] and "<think>secret 🙂</think>" in prompts[0]


def test_an_answer_that_is_sent_back_renders_what_the_model_wrote(server):
    written = "need 🙂</think>ok" + block(PARIS)
    message = ask(server, written, tools=DECLARED).json()
    use = message["content"][-1]["id"]
    messages = [*ASK, {"role": "assistant", "content": message["content"]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use, "content": "r"}]}]  # fmt: skip
    rendered = server[0].post(PATH + "/render", json={**BODY, "tools": DECLARED, "messages": messages}).json()
    assert f"<think>{written}<｜end▁of▁sentence｜>" in rendered["prompt"]
    asked = server[1].requests[-1].ids
    assert tuple(rendered["token_ids"][: len(asked)]) == tuple(asked)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "stop"}])
def test_tool_20_a_required_tool_is_called_after_thinking(nano, choice):
    tools = [{"name": "stop", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}]
    body = {**BODY, "max_tokens": 400, "tools": tools, "tool_choice": choice, "temperature": 0,
            "thinking": {"type": "enabled", "budget_tokens": 8}}  # fmt: skip
    message = nano.post(PATH, json=body).json()
    assert {(b["name"], str(b["input"])) for b in message["content"] if b["type"] == "tool_use"} == {("stop", "{}")}
    assert message["stop_reason"] == "tool_use" and message["pyrosome"]["mode"] == "high"


def test_the_format_of_an_answer_holds_after_thinking(nano):
    schema = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x", "y"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    body = {**BODY, "max_tokens": 200, "output_config": {"format": {"type": "json_schema", "schema": schema}},
            "thinking": {"type": "enabled", "budget_tokens": 8}}  # fmt: skip
    message = nano.post(PATH, json=body).json()
    assert json.loads(message["content"][-1]["text"])["a"] in ("x", "y")


# In the middle of things


def test_srv_04_a_long_prompt_is_waited_for_with_pings():  # fmt: skip
    options = ServerOptions(keep_alive_s=0.01)
    with scripted(saying("a</think>b"), options=options, prompt_steps=2) as (client, engine, _):
        engine.hold.set()
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as reply:
            lines = reply.iter_lines()
            assert next(lines) == "event: message_start"
            waited = [line for line in itertools.islice(lines, 60) if line.startswith("event: ")]
            engine.hold.clear()
            rest = "\n".join(lines)
    assert set(waited) == {"event: ping"} and events_of(rest)[-1][0] == "message_stop"


def test_pings_leave_the_stream_as_it_is():
    options = ServerOptions(keep_alive_s=0.001)
    with scripted(saying("a</think>b"), options=options, step_s=0.02, prompt_steps=3) as (client, _, _):
        text = client.post(PATH, json={**BODY, "stream": True}).text
    assert assembled(text)["content"][1]["text"] == "b" and "prompt tokens" in text


def test_a_failure_on_the_way_is_an_event_of_its_own():
    with scripted(saying("a</think>" + "more " * 300), step_s=0.001) as (client, engine, _):
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(line for line in lines if "text_delta" in line)
            engine.fail = "it broke"
            last = events_of("\n".join(lines))[-1]
        assert last[0] == "error"
        error = json.loads(last[1])
        assert error["type"] == "error" and error["error"]["type"] == "api_error" and "it broke" in last[1]
        engine.fail = "again"
        reply = client.post(PATH, json=BODY)
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "api_error"


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
            next(line for line in lines if "text_delta" in line)
            asyncio.run_coroutine_threadsafe(service.drain(), loop.loop).result(20)
            name, data = events_of("\n".join(lines))[-1]
        assert name == "error" and json.loads(data)["error"]["type"] == "overloaded_error"
        refused = client.post(PATH, json=BODY)
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "overloaded_error"


def test_a_full_server_answers_429_with_anthropics_type():
    options, engine_options = ServerOptions(max_queue=0), EngineOptions(max_sequences=1)
    with scripted(saying("a"), options=options, engine_options=engine_options) as (client, engine, service):
        engine.hold.set()
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as first:
            until(lambda: service.exchanges)
            refused = client.post(PATH, json=BODY)
            engine.hold.clear()
            first.read()
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1


# The official manner


@pytest.fixture(scope="module")  # fmt: skip
def official():
    with scripted(saying(""), options=ServerOptions(compat="deepseek")) as (client, engine, _):
        yield client, engine


def test_the_official_manner_tells_nothing_of_its_own_and_ignores_the_budget(official):
    fields = {"thinking": {"type": "enabled", "budget_tokens": 5, "display": "omitted"}, "temperature": 0.2}
    message = ask(official, "hm</think>it is", **fields).json()
    assert sorted(message) == ["content", "id", "model", "role", "stop_reason", "stop_sequence", "type", "usage"]
    assert message["content"][0] == {"type": "thinking", "thinking": "hm", "signature": message["id"]}
    assert sorted(message["usage"]) == [
        "cache_creation_input_tokens", "cache_read_input_tokens", "input_tokens", "output_tokens", "service_tier",
    ]  # fmt: skip
    params = official[1].requests[-1].params
    assert params.max_thinking_tokens is None and params.temperature == 1.0


def test_the_official_manner_gives_no_input_of_a_call_that_was_cut(official):
    answer = next(a for a in ANSWERS if a.name == "cut in the second value")
    message = ask(official, answer.written, tools=DECLARED, max_tokens=answer.max_tokens).json()
    assert message["content"][-1]["input"] == {} and message["stop_reason"] == "max_tokens"


def test_the_official_refusals_keep_their_words_in_anthropics_shape(official):
    refused = ask(official, "", tools=DECLARED, tool_choice={"type": "tool", "name": "f"})
    assert refused.json() == {"type": "error", "error": {
        "message": "Thinking mode does not support this tool_choice", "type": "invalid_request_error", "param": None,
        "code": "invalid_request_error"}}  # fmt: skip
