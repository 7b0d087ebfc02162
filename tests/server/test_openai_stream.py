"""Streams of chat completions and completions: however an answer is cut into pieces, they make the whole one."""

import json

import pytest

from pyrosome.options import ServerOptions
from tests.server.answers import ANSWERS, ASK, FAMILY, PARIS, TOOLS, block, call
from tests.server.assembled import chunks_of, serving, whole_of, without_ids
from tests.server.scripted import EOS, TOKENIZER, events_of, saying

PATH = "/v1/chat/completions"
DECLARED = [{"type": "function", "function": {"name": n, "description": "", "parameters": s}} for n, s in TOOLS.items()]
SEED = {"seed": 7}


@pytest.fixture(scope="module")
def server():
    with serving(saying("")) as (client, engine):
        yield client, engine


@pytest.fixture(scope="module")
def official():
    with serving(saying(""), ServerOptions(compat="deepseek")) as (client, engine):
        yield client, engine


def both(server, script, body, path=PATH, burst=1):
    """An answer whole, and as its stream makes it."""
    client, engine = server
    engine.script, engine.burst = script if callable(script) else saying(script), burst
    whole = client.post(path, json=body)
    assert whole.status_code == 200, whole.text
    return whole.json(), chunks_of(client.post(path, json={**body, "stream": True}))


def body_of(answer):
    tools = {"tools": DECLARED} if answer.tools else {}
    stop = {"stop": list(answer.stop)} if answer.stop else {}
    return {"messages": ASK, "max_tokens": answer.max_tokens, **tools, **stop, **SEED}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.name)
def test_every_way_of_cutting_an_answer_gives_the_same_one(server, answer):
    """TOOL-01, 05, 06, 08, 09, 11, 12, 14, 15, 16, 17, REAS-04: whole, token by token, in pairs, all at once."""
    body = {**body_of(answer), "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    seen = []
    for burst in (1, 2, 3, 1000):
        whole, chunks = both(server, answer.written, body, burst=burst)
        seen.append(without_ids(whole))
        streamed = without_ids(whole_of(chunks))
        for choice in (*seen[-1]["choices"], *streamed["choices"]):
            lists = choice["logprobs"] or {}
            choice["logprobs"] = {name: lists.get(name, []) for name in ("content", "reasoning_content")}
        assert streamed == seen[-1]
    assert all(s == seen[0] for s in seen)
    (choice,) = seen[0]["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == (answer.thoughts, answer.text)
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    assert calls == list(answer.calls)
    assert choice["finish_reason"] == {"stop_sequence": "stop"}.get(answer.ends, answer.ends)
    for name, text in (("content", answer.text), ("reasoning_content", answer.thoughts)):
        spelled = b"".join(bytes(e["bytes"]) for e in choice["logprobs"][name]).decode("utf-8", "replace")
        is_cut = bool(answer.stop)  # a token may hold half of a stop string
        assert spelled.startswith(text) if is_cut else spelled.strip("\n") == text.strip("\n")


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.name)
def test_plain_completions_take_the_same_text_as_it_is(server, answer):
    for burst in (1, 3, 1000):
        body = {"prompt": "x", "max_tokens": answer.max_tokens, "logprobs": 1, "return_token_ids": True, **SEED}
        whole, chunks = both(server, answer.written, body, "/v1/completions", burst)
        assert without_ids(whole_of(chunks)) == {k: v for k, v in without_ids(whole).items() if k != "usage"}
        assert whole["choices"][0]["text"] == answer.written
        tokens = whole["choices"][0]["logprobs"]["tokens"]
        assert len(tokens) == len(whole["choices"][0]["token_ids"]) + (whole["choices"][0]["finish_reason"] == "stop")


@pytest.mark.parametrize("stops", [["wor"], ["o w"], ["lo world"], ["x", "rld"], ["helloworld"], ["d"]])
def test_stop_strings_cut_a_completion_at_the_same_place_in_every_stream(server, stops):
    text = "hello world"
    at = min([text.find(s) for s in stops if s in text], default=len(text))
    for burst in (1, 2, 1000):
        body = {"prompt": "x", "stop": stops, "logprobs": 0, "echo": True, **SEED}
        whole, chunks = both(server, text, body, "/v1/completions", burst)
        assert without_ids(whole_of(chunks)) == {k: v for k, v in without_ids(whole).items() if k != "usage"}
        choice = whole["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("x" + text[:at], "stop")
        offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
        told = tokens[:-1] if tokens[-1] == TOKENIZER.decode([EOS]) else tokens
        assert "".join(told).startswith(choice["text"])
        assert len("".join(told[:-1])) < len(choice["text"]), "no token that is all cut off"
        assert offsets == [len("".join(tokens[:n])) for n in range(len(tokens))]


def test_a_cut_after_any_token_gives_what_was_said_until_then(server):
    text = f"one {FAMILY}</think>ok" + block(PARIS, call("f", ("a", "true", "Rome")))
    size = len(TOKENIZER.encode(text, allow_special=True))
    for most in range(1, size + 1, 3):
        body = {"messages": ASK, "tools": DECLARED, "max_tokens": most, **SEED}
        whole, chunks = both(server, text, body)
        assert without_ids(whole_of(chunks)) == without_ids(whole)
        (choice,) = whole["choices"]
        message = choice["message"]
        assert choice["finish_reason"] == ("length" if most < size else "tool_calls")
        assert f"one {FAMILY}".startswith(message["reasoning_content"].rstrip("\ufffd"))
        assert "ok\n\n<".startswith(message["content"])  # a tag that has only begun is text
        for call_made, arguments in zip(
            message.get("tool_calls", []), ('{"a": "Paris"}', '{"a": "Rome"}'), strict=False
        ):
            assert call_made["function"]["name"] == "f"
            assert arguments.startswith(call_made["function"]["arguments"].removesuffix("</"))  # perhaps a value's own
    assert message == {**message, "content": "ok", "reasoning_content": f"one {FAMILY}"}
    assert len(message["tool_calls"]) == 2


def test_a_call_in_any_number_of_pieces_is_the_same_one(server):
    """TOOL-12, TOOL-14, TOOL-15: in two pieces, in every other number, whole, by choice and by force."""
    text = "</think>" + block(call("f", ("a", "true", "find /tmp")))
    size = len(TOKENIZER.encode(text, allow_special=True))
    for burst in sorted({-(-size // pieces) for pieces in range(1, size + 1)}):
        for choice in ("auto", "required"):
            body = {"messages": ASK, "tools": DECLARED, "tool_choice": choice, "include_reasoning": False, **SEED}
            for answer in (lambda w, c: w, lambda w, c: whole_of(c)):
                (made,) = answer(*both(server, text, body, burst=burst))["choices"]
                (called,) = made["message"]["tool_calls"]
                assert called["function"] == {"name": "f", "arguments": '{"a": "find /tmp"}'}
                assert (made["message"]["content"], made["finish_reason"]) == ("", "tool_calls")


def test_several_answers_are_streamed_beside_each_other(server):
    script = saying("a</think>one" + block(PARIS), "b</think>two", "never closed")
    body = {"messages": ASK, "tools": DECLARED, "n": 3, "logprobs": True, "top_logprobs": 1, **SEED}
    whole, chunks = both(server, script, body)
    streamed = without_ids(whole_of(chunks))
    assert [c["message"]["reasoning_content"] for c in streamed["choices"]] == ["a", "b", "never closed"]
    assert [c["finish_reason"] for c in streamed["choices"]] == ["tool_calls", "stop", "stop"]
    assert streamed["usage"] == whole["usage"]
    said = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["delta"].get("reasoning_content")]
    assert said[:3] == [0, 1, 2], "they grow together"
    for one, other in zip(streamed["choices"], whole["choices"], strict=True):
        assert one["message"]["content"] == other["message"]["content"]
        assert one["logprobs"].get("content", []) == other["logprobs"]["content"]


def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(server):
    """ENC-14: role first, one finish, usage last with cached and reasoning tokens."""
    body = {"messages": ASK, "stream_options": {"include_usage": True}}
    whole, chunks = both(server, "a b</think>c", body)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert all(c["usage"] is None and len(c["choices"]) == 1 for c in chunks[:-1])
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]].count("stop") == 1
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_usage_is_on_the_last_chunk_where_nothing_is_said_about_it_and_nowhere_where_it_is_unwanted(server):
    whole, chunks = both(server, "</think>c", {"messages": ASK})
    assert chunks[-1]["usage"] == whole["usage"]
    assert not any("usage" in c for c in chunks[:-1])
    _, chunks = both(server, "</think>c", {"messages": ASK, "stream_options": {"include_usage": False}})
    assert not any("usage" in c for c in chunks)


def test_calls_begin_with_their_name_and_go_on_while_they_are_written(server):
    """TOOL-11: a long value comes as it is written, and not when it is complete."""
    text = "line of a file\n" * 60
    _, chunks = both(server, "</think>" + block(call("f", ("a", "true", text))), {"messages": ASK, "tools": DECLARED})
    deltas = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert deltas[0].keys() == {"index", "id", "type", "function"}
    pieces = [d["function"]["arguments"] for d in deltas[1:]]
    assert len(pieces) > 100
    assert max(map(len, pieces)) < 40
    assert json.loads("".join(pieces)) == {"a": text}
    assert not any("DSML" in p for p in pieces)


def test_an_error_in_the_middle_is_an_error_chunk_and_the_end(server):
    client, engine = server
    engine.script, engine.burst = saying("one two three four five"), 1
    engine.hold.set()
    with client.stream("POST", PATH, json={"messages": ASK, "stream": True}) as reply:
        engine.fail = "a fault in the middle"
        engine.hold.clear()
        text = reply.read().decode()
    events = events_of(text)
    assert events[-1] == ("", "[DONE]")
    error = json.loads(events[-2][1])["error"]
    assert "a fault in the middle" in error["message"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert reply.headers["x-request-id"] in error["message"]
    engine.fail = "another"
    whole = client.post(PATH, json={"messages": ASK})
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "internal_error"


def test_while_nothing_is_said_there_are_signs_of_life_a_client_heeds():
    """SRV-04: comments with the progress, and idle deltas that open nothing."""
    options = ServerOptions(keep_alive_s=0.05)
    with serving(saying("a</think>b"), options, prompt_steps=12, step_s=0.02) as (client, _):
        reply = client.post(PATH, json={"messages": ASK, "stream": True})
        whole = client.post(PATH, json={"messages": ASK})
    assert "prompt tokens\n\n" in reply.text
    chunks = chunks_of(reply)
    assert {"content": None, "reasoning_content": ""} in [c["choices"][0]["delta"] for c in chunks]
    assert whole_of(chunks)["choices"][0]["message"] == whole.json()["choices"][0]["message"]
    assert whole.text.startswith("\n"), "a whole answer that takes long begins with blank lines"


def test_thoughts_that_are_hidden_still_show_that_the_model_is_there():
    options = ServerOptions(keep_alive_s=0.05)
    with serving(saying("thinking " * 20 + "</think>b"), options, step_s=0.02) as (client, _):
        reply = client.post(PATH, json={"messages": ASK, "stream": True, "include_reasoning": False})
    chunks = chunks_of(reply)
    assert ": keep-alive\n\n" in reply.text
    assert sum(c["choices"][0]["delta"] == {"content": ""} for c in chunks) >= 2
    assert whole_of(chunks)["choices"][0]["message"] == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.name)
def test_the_official_manner_streams_as_the_official_api(official, answer):
    """Keys, nulls and order of every chunk, and nothing beside."""
    _, chunks = both(official, answer.written, body_of(answer))
    first, *middle, last = [c["choices"][0] for c in chunks]
    assert first["delta"] == {"role": "assistant", "content": None, "reasoning_content": ""}
    assert last["delta"] == {"content": "", "reasoning_content": None}
    assert chunks[-1].keys() == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert all("usage" not in c for c in chunks[:-1])
    for choice in (first, *middle, last):
        assert choice.keys() == {"index", "delta", "logprobs", "finish_reason"}
    for choice in middle:
        delta = choice["delta"]
        assert delta.keys() in ({"content", "reasoning_content"}, {"tool_calls"})
        if "content" in delta:
            assert sorted(v is None for v in delta.values()) == [False, True]
    for part in ("pyrosome", "stop_reason", "malformed"):
        assert part not in json.dumps(chunks)
