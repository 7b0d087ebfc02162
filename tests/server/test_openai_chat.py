"""Chat completions on the wire: what is asked, what comes out, whole and streamed, and what is refused."""

import json
import re
import time

import httpx2 as httpx
import pytest

from pyrosome.answer import TokenLog
from pyrosome.options import ServerOptions
from pyrosome.server.logprobs import LEAST, token_entries
from tests.server.answers import ASK, OPEN, PARIS, TOOLS, block, call
from tests.server.assembled import chunks_of, serving, whole_of, without_ids
from tests.server.scripted import TOKENIZER, saying

PATH = "/v1/chat/completions"
DECLARED = [{"type": "function", "function": {"name": n, "description": "", "parameters": s}} for n, s in TOOLS.items()]
OFF = {"thinking": {"type": "disabled"}}
PLAIN = {"message": {"role": "assistant", "content": "hi"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def server():
    with serving(saying("")) as (client, engine):
        yield client, engine


@pytest.fixture(scope="module")
def official():
    with serving(saying(""), ServerOptions(compat="deepseek")) as (client, engine):
        yield client, engine


def ask(server, written, path=PATH, **fields):
    """One answer's body, the same whole and streamed."""
    client, engine = server
    engine.script = written if callable(written) else saying(written)
    body = {"messages": ASK, "seed": 7, **fields}
    whole = client.post(path, json=body)
    assert whole.status_code == 200, whole.text
    streamed = whole_of(chunks_of(client.post(path, json={**body, "stream": True})))
    told, same = without_ids(whole.json()), without_ids(streamed)
    for answer in (told, same):
        for choice in answer["choices"]:
            choice["logprobs"] = {k: v for k, v in (choice["logprobs"] or {}).items() if v}
    assert same == told
    return whole.json()


def ids_of(text):
    return TOKENIZER.encode(text, allow_special=True)


# What is asked, what is written, and what is in the choice.  "..." stands for the parts that a case says nothing of.
CASES = {
    "a thought and an answer": ({}, "hm</think>hi", {"message": {"content": "hi", "reasoning_content": "hm"}}),
    "thinking off by its own field": (OFF, "hi", PLAIN),
    "thinking off by an effort": ({"reasoning_effort": "none"}, "hi", PLAIN),
    "thinking off by a flag": ({"thinking": False}, "hi", PLAIN),
    "thinking off by the template": ({"chat_template_kwargs": {"enable_thinking": False}}, "hi", PLAIN),
    "thinking on by the template": (
        {"chat_template_kwargs": {"thinking": True}}, "a</think>b", {"message": {"reasoning_content": "a"}}),
    "no thoughts shown": ({"include_reasoning": False}, "hm</think>hi", PLAIN),
    "no thoughts shown, in another spelling": (
        {"reasoning": {"exclude": True, "effort": "low"}}, "hm</think>hi", PLAIN),
    "thoughts alone": ({}, "on and on", {"message": {"content": "", "reasoning_content": "on and on"}}),
    "an answer of many lines": (OFF, "a\\n\\n b\\n", {"message": {"content": "a\\n\\n b\\n"}}),
    "stop": (OFF, "hi", {"finish_reason": "stop"}),
    "length": ({**OFF, "max_tokens": 2}, "one two three four", {"finish_reason": "length"}),
    "length, by OpenAI's newer name": (
        {**OFF, "max_completion_tokens": 2}, "one two three four", {"finish_reason": "length"}),
    "a stop string": ({**OFF, "stop": "wo"}, "one two", {"message": {"content": "one t"}, "stop_reason": "wo"}),
    "a list of stop strings": (
        {**OFF, "stop": ["zz", " t"]}, "one two", {"message": {"content": "one"}, "stop_reason": " t"}),
    "a stop string in the thoughts": (
        {"stop": "wo"}, "two</think>one", {"message": {"content": "one", "reasoning_content": "two"}}),
    "a stop string within a call": (
        {**OFF, "tools": DECLARED, "stop": "Par"}, block(PARIS).strip(), {"finish_reason": "tool_calls"}),
    "a call": ({"tools": DECLARED}, "</think>" + block(PARIS), {"finish_reason": "tool_calls"}),
    "a call and text": ({"tools": DECLARED}, "</think>so" + block(PARIS), {"message": {"content": "so"}}),
    "a call that was cut": (
        {**OFF, "tools": DECLARED, "max_tokens": len(ids_of(OPEN + "Par"))}, OPEN + "Paris",
        {"finish_reason": "length"}),
    "tools that may not be used": (
        {**OFF, "tools": DECLARED, "tool_choice": "none"}, "hi", {**PLAIN, "finish_reason": "stop"}),
    "a required tool without thinking": (
        {**OFF, "tools": DECLARED, "tool_choice": "required"}, PARIS + "</｜DSML｜tool_calls>",
        {"message": {"content": ""}, "finish_reason": "tool_calls"}),
    "a required tool after thinking": (
        {"tools": DECLARED, "tool_choice": "required"}, "hm</think>" + block(PARIS), {"finish_reason": "tool_calls"}),
    "a named tool after thinking": (
        {"tools": DECLARED, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "hm</think>" + block(PARIS), {"finish_reason": "tool_calls"}),
    "a JSON object": (
        {**OFF, "response_format": {"type": "json_object"}}, '{"a": 1}', {"message": {"content": '{"a": 1}'}}),
    "a JSON object in a fence": (
        {**OFF, "response_format": {"type": "json_object"}}, 'Here:\\n```json\\n{"a": 1}\\n```',
        {"message": {"content": '{"a": 1}'}}),
    "a JSON object after thinking": (
        {"response_format": {"type": "json_object"}}, 'hm {</think>{"a": 1}',
        {"message": {"content": '{"a": 1}', "reasoning_content": "hm {"}}),
    "a JSON schema": (
        {**OFF, "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        '{"a": 1}', {"message": {"content": '{"a": 1}'}}),
    "fields that are left alone": (
        {**OFF, "metadata": {"k": "v"}, "store": True, "user": "u", "service_tier": "auto", "logit_bias": {},
         "skip_special_tokens": False, "min_tokens": 0, "parallel_tool_calls": None, "modalities": ["text"],
         "verbosity": "low", "safety_identifier": "s", "prompt_cache_key": "k", "spaces_between_special_tokens": True},
        "hi", {"message": {"content": "hi"}}),
    "fields that are null": (
        {**OFF, "max_tokens": None, "stop": None, "tools": None, "tool_choice": None, "n": None, "logprobs": None,
         "response_format": None, "stream_options": None, "temperature": None, "include_reasoning": None,
         "return_token_ids": None, "reasoning_effort": None, "user": None},
        "hi", {"message": {"content": "hi"}}),
    "a role token in the answer": (OFF, "a<｜User｜>b", {"message": {"content": "a<｜User｜>b"}}),
    "a lone tag in the answer": (
        {**OFF, "tools": DECLARED}, 'see <｜DSML｜invoke name="f"> there',
        {"message": {"content": 'see <｜DSML｜invoke name="f"> there'}, "finish_reason": "stop"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_comes_out_whole_and_streamed(server, case):
    fields, written, expected = CASES[case]
    (choice,) = ask(server, written.replace("\\n", "\n"), **fields)["choices"]
    for name, value in expected.items():
        value = json.loads(json.dumps(value).replace("\\\\n", "\\n"))
        if name == "message" and "role" in value:
            assert choice["message"] == value
        elif name == "message":
            assert {k: choice["message"].get(k) for k in value} == value
        else:
            assert choice[name] == value


def test_an_answer_has_the_fields_of_the_official_one_and_what_it_was_made_with(server):
    client, engine = server
    engine.script = saying("hm</think>hi")
    reply = client.post(PATH, json={"messages": ASK, "seed": 7, "model": "any name"})
    body = reply.json()
    num_prompt, num_written = len(engine.requests[-1].ids), len(ids_of("hm</think>hi"))
    assert re.fullmatch(r"chatcmpl-[0-9a-f]+", body["id"])
    assert body | {"id": 0, "created": 0} == {
        "id": 0, "object": "chat.completion", "created": 0, "model": "any name",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi", "reasoning_content": "hm"},
                     "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": num_prompt, "completion_tokens": num_written, "total_tokens": num_prompt + num_written,
            "prompt_tokens_details": {"cached_tokens": 3}, "prompt_cache_hit_tokens": 3,
            "prompt_cache_miss_tokens": num_prompt - 3,
            "completion_tokens_details": {"reasoning_tokens": len(ids_of("hm"))},
        },
        "system_fingerprint": "fp_" + "f" * 16,
        "pyrosome": {"mode": "high", "seed": 7},
    }  # fmt: skip
    assert abs(body["created"] - time.time()) < 60
    assert reply.headers["x-request-id"] == body["id"]
    assert (reply.headers["x-pyrosome-mode"], reply.headers["x-pyrosome-seed"]) == ("high", "7")
    assert reply.headers["x-pyrosome-fingerprint"] == "f" * 16


def test_tool_calls_are_whole_and_numbered(server):
    """TOOL-08: values keep their kind, text stays text."""
    many = call("g", ("flag", "false", "true"), ("s", "true", "5"), ("n", "false", "5"), ("z", "false", "null"))
    (choice,) = ask(server, "</think>" + block(PARIS, many), tools=DECLARED)["choices"]
    first, second = choice["message"]["tool_calls"]
    assert re.fullmatch(r"call_00_\w{20}", first["id"])
    assert first | {"id": ""} == {
        "index": 0, "id": "", "type": "function", "function": {"name": "f", "arguments": '{"a": "Paris"}'}}  # fmt: skip
    assert second["index"] == 1
    assert first["id"] != second["id"]
    assert json.loads(second["function"]["arguments"]) == {"flag": True, "s": "5", "n": 5, "z": None}


def test_a_required_tool_can_be_had_while_thinking_and_the_engine_is_told(server):
    """TOOL-20."""
    named = {"type": "function", "function": {"name": "f"}}
    body = ask(server, "hm</think>" + block(PARIS), tools=DECLARED, tool_choice=named)
    (called,) = body["choices"][0]["message"]["tool_calls"]
    assert called["function"]["name"] == "f"
    constraint = server[1].requests[-1].constraint
    assert (constraint.kind, constraint.after_reasoning) == ("tool_call_required", True)
    assert [t["function"]["name"] for t in json.loads(constraint.schema)] == ["f"]
    ask(server, "hm</think>" + block(PARIS), tools=DECLARED, parallel_tool_calls=False)
    assert server[1].requests[-1].constraint.parallel is False


def test_what_was_odd_in_an_answer_is_said(server):
    """TOOL-16: markup that is no call stays, with a note; nothing is dropped in silence."""
    (choice,) = ask(server, "</think>hello<‖DSML‖tool_calls>world", tools=DECLARED)["choices"]
    assert choice["message"]["content"] == "hello<‖DSML‖tool_calls>world"
    assert "markup of tool calls was spelled out in the text" in choice["malformed"]
    (choice,) = ask(server, "</think>" + block(PARIS).replace("｜DSML｜", "‖DSML‖"), tools=DECLARED)["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "Paris"}'
    assert "malformed" not in ask(server, "</think>fine", tools=DECLARED)["choices"][0]


def test_an_answer_that_would_be_empty_is_asked_of_the_engine_not_to_be(server):
    """TOOL-19: the engine rules the end out until something was said; an answer of blanks alone is told of."""
    (choice,) = ask(server, "hm</think>\n\n")["choices"]
    assert server[1].requests[-1].never_empty
    assert "the answer is empty" in choice["malformed"]


def test_a_loop_that_was_cut_is_told_of(server):
    """REAS-14, REAS-15."""
    client, engine = server
    engine.script = saying("</think>Run. Run.")
    ending = engine._end
    engine._end = lambda state, indexes, reason, error="": ending(state, indexes, "repetition", error)
    try:
        body = client.post(PATH, json={"messages": ASK, "max_repeats": 3, "max_tokens": 2}).json()
    finally:
        del engine._end
    assert engine.requests[-1].params.max_repeats == 3
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("length", "repetition")


# Log probabilities


def test_log_probabilities_are_of_the_channel_their_token_is_in(server):
    body = ask(server, "one\n</think>\n\ntwo 😀" + block(PARIS), tools=DECLARED, logprobs=True, top_logprobs=1)
    found = body["choices"][0]["logprobs"]
    assert found.keys() == {"content", "reasoning_content"}
    assert [e["token"] for e in found["reasoning_content"]] == [TOKENIZER.decode([t]) for t in ids_of("one")]
    assert b"".join(bytes(e["bytes"]) for e in found["content"]) == "two 😀".encode()
    assert found["content"][0] == {
        "token": TOKENIZER.decode(ids_of("two")[:1]), "logprob": -0.25,
        "bytes": list(TOKENIZER.token_bytes(ids_of("two")[0])),
        "top_logprobs": [{"token": TOKENIZER.decode(ids_of("two")[:1]), "logprob": -0.25,
                          "bytes": list(TOKENIZER.token_bytes(ids_of("two")[0]))}],
    }  # fmt: skip
    emoji = [e["token"] for e in found["content"]][-len(TOKENIZER.encode("😀")) :]
    assert "".join(emoji).endswith("\\xf0\\x9f\\x98\\x80"), "parts of a character are written by their bytes"


def test_log_probabilities_without_top_ones_and_none_at_all(server):
    found = ask(server, "a</think>b", logprobs=True)["choices"][0]["logprobs"]
    assert [e["top_logprobs"] for e in found["content"]] == [[]]
    assert ask(server, "a</think>b")["choices"][0]["logprobs"] is None
    hidden = ask(server, "a</think>b", logprobs=True, include_reasoning=False)["choices"][0]["logprobs"]
    assert hidden.keys() == {"content"}
    assert ask(server, "on and on", logprobs=True)["choices"][0]["logprobs"]["content"] == []


def test_top_tokens_are_the_most_probable_and_not_the_chosen_one_beside_them():
    logs = [TokenLog(70, {70: -9.0, 71: -0.5, 72: -1.0}), TokenLog(71, {71: float("-inf")})]
    first, second = token_entries(TOKENIZER, logs, 2)
    assert [e["logprob"] for e in first["top_logprobs"]] == [-0.5, -1.0]
    assert first["logprob"] == -9.0
    assert second["logprob"] == LEAST


def test_a_prompts_own_log_probabilities_can_be_had(server):
    body = ask(server, "</think>b", prompt_logprobs=1)
    ids = server[1].requests[-1].ids
    assert server[1].requests[-1].params.prompt_logprobs == 1
    assert body["prompt_logprobs"][0] is None
    assert [p[str(t)]["logprob"] for p, t in zip(body["prompt_logprobs"][1:], ids[1:], strict=True)] == [
        -p / 8 for p in range(1, len(ids))
    ]


# Several answers, ids


def test_several_answers_whole(server):
    client, engine = server
    engine.script = saying("a</think>one", "b</think>two", "c</think>three")
    body = client.post(PATH, json={"messages": ASK, "n": 3}).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in body["choices"]] == ["one", "two", "three"]
    assert [c["message"]["reasoning_content"] for c in body["choices"]] == ["a", "b", "c"]
    assert engine.requests[-1].params.n == 3
    written = [len(ids_of(t)) for t in ("a</think>one", "b</think>two", "c</think>three")]
    assert body["usage"]["completion_tokens"] == sum(written)
    assert body["usage"]["prompt_tokens"] == len(engine.requests[-1].ids), "the prompt was computed once"


def test_raw_ids_and_text_show_what_the_model_wrote(server):
    """REAS-16: an answer without thoughts is provably the model's own."""
    text = "</think>" + "so" + block(PARIS)
    body = ask(server, text, tools=DECLARED, return_token_ids=True)
    (choice,) = body["choices"]
    assert choice["raw_text"] == text
    assert choice["token_ids"] == ids_of(text)
    assert tuple(body["prompt_token_ids"]) == server[1].requests[-1].ids
    assert body["prompt_token_ids"][-1] == TOKENIZER.id_of("<think>")
    assert choice["message"]["reasoning_content"] == ""


def test_thoughts_are_given_as_reasoning_too_where_the_server_is_told_to():
    with serving(saying("hm</think>hi"), ServerOptions(reasoning_field=True)) as server:
        (choice,) = ask(server, "hm</think>hi")["choices"]
        assert choice["message"] == {
            "role": "assistant", "content": "hi", "reasoning_content": "hm", "reasoning": "hm"}  # fmt: skip
        client, _ = server
        chunks = chunks_of(client.post(PATH, json={"messages": ASK, "stream": True}))
        deltas = [c["choices"][0]["delta"] for c in chunks]
        assert all(d["reasoning"] == d["reasoning_content"] for d in deltas)


# How tokens are chosen


def test_fields_of_vllms_clients_reach_the_engine(server):
    fields = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [9], "ignore_eos": False,
        "max_repeats": 4, "min_tokens": 2, "temperature": 0.5, "top_p": 0.5, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "seed": -3, "priority": -5, "cache_salt": "mine", "thinking_budget": 12,
    }  # fmt: skip
    body = ask(server, "a</think>b", **fields)
    request = server[1].requests[-1]
    given = {**fields, "stop_token_ids": (9,), "max_thinking_tokens": fields["thinking_budget"]}
    for name in ("priority", "cache_salt", "thinking_budget"):
        del given[name]
    assert {name: getattr(request.params, name) for name in given} == given
    assert (request.priority, request.salt) == (-5, "/mine")
    assert body["pyrosome"]["seed"] == -3


def test_a_thought_can_be_bounded_in_every_spelling(server):
    """REAS-09."""
    for fields in (
        {"thinking_budget": 5}, {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"chat_template_kwargs": {"thinking_budget": 5}},
    ):  # fmt: skip
        body = ask(server, "a</think>b", **fields)
        assert server[1].requests[-1].params.max_thinking_tokens == 5
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 1


def test_sampling_is_honoured_while_thinking_and_its_defaults_are_the_official_ones(server):
    """REAS-14."""
    ask(server, "a</think>b")
    params = server[1].requests[-1].params
    assert (params.temperature, params.top_p, params.presence_penalty) == (1.0, 1.0, 0.0)
    ask(server, "a</think>b", temperature=0, top_p=0.5)
    params = server[1].requests[-1].params
    assert (params.temperature, params.top_p) == (0, 0.5)


def test_the_mode_is_the_servers_unless_the_request_has_its_own():
    """REAS-13."""
    with serving(saying("a</think>b"), ServerOptions(thinking=False)) as (client, _):
        assert client.post(PATH, json={"messages": ASK}).headers["x-pyrosome-mode"] == "off"
        reply = client.post(PATH, json={"messages": ASK, "reasoning_effort": "max"})
        assert (reply.headers["x-pyrosome-mode"], reply.json()["pyrosome"]["mode"]) == ("max", "max")
        reply = client.post(PATH, json={"messages": ASK, "thinking": {"type": "enabled"}})
        assert reply.json()["choices"][0]["message"]["reasoning_content"] == "a"


@pytest.mark.parametrize(
    ("fields", "kind", "after"),
    [
        ({"guided_json": SCHEMA}, "json", True),
        ({"structured_outputs": {"regex": "[ab]"}}, "regex", True),
        ({"guided_choice": ["yes", "no"], **OFF}, "lark", False),
        ({"guided_grammar": 'start: "a"', **OFF}, "lark", False),
        ({"response_format": {"type": "json_object"}}, "json", True),
    ],
)
def test_schemas_bind_the_answer_and_not_the_thoughts(server, fields, kind, after):
    """REAS-06."""
    ask(server, "{hm</think>x" if after else "x", **fields)
    constraint = server[1].requests[-1].constraint
    assert (constraint.kind, constraint.after_reasoning) == (kind, after)


# What is refused

REFUSED = {
    "no messages": ({"messages": []}, "invalid_request_error", "messages"),
    "messages of a wrong type": ({"messages": "hi"}, "invalid_request_error", ""),
    "an unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_request_error", "robot"),
    "a temperature too high": ({"temperature": 3}, "invalid_request_error", "temperature"),
    "a top_p of nothing": ({"top_p": 0}, "invalid_request_error", "top_p"),
    "no tokens": ({"max_tokens": 0}, "invalid_request_error", "max_tokens"),
    "tokens as text": ({"max_tokens": "5"}, "invalid_request_error", ""),
    "top ones without any": ({"top_logprobs": 2}, "invalid_request_error", "logprobs"),
    "too many top ones": ({"logprobs": True, "top_logprobs": 21}, "invalid_request_error", "top_logprobs"),
    "too many answers": ({"n": 129}, "invalid_request_error", "n is 129"),
    "half an answer": ({"n": 1.5}, "invalid_request_error", "n is 1.5"),
    "a stream that is no flag": ({"stream": "yes"}, "invalid_request_error", ""),
    "ids that are no flag": ({"return_token_ids": 1}, "invalid_request_error", "return_token_ids is 1"),
    "thoughts that are no flag": ({"include_reasoning": "no"}, "invalid_request_error", "include_reasoning"),
    "a model that is no name": ({"model": 3}, "invalid_request_error", "model is 3"),
    "a bias": ({"logit_bias": {"5": 1}}, "invalid_request_error", "logit_bias"),
    "a least length below zero": ({"min_tokens": -5}, "invalid_request_error", "min_tokens is -5"),
    "the old form of tools": ({"functions": [{"name": "f"}]}, "invalid_request_error", "functions"),
    "speech": ({"modalities": ["text", "audio"]}, "invalid_request_error", "audio"),
    "two grammars": ({"guided_regex": "a", "guided_json": {}}, "invalid_request_error", "guided_json, guided_regex"),
    "a named tool that is not there": (
        {"tools": DECLARED, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
        "invalid_request_error", "rm"),
    "a prompt too long": (
        {"messages": [{"role": "user", "content": "word " * 1000}]}, "context_length_exceeded", "holds 512"),
    "an answer too long": ({"max_tokens": 512}, "context_length_exceeded", "holds 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("path", [PATH, PATH + "/render"])
def test_what_is_wrong_is_a_400_that_names_it(server, case, path):
    client, engine = server
    fields, code, named = REFUSED[case]
    if code == "context_length_exceeded":
        client.service.chat.context_tokens = 512
    count = len(engine.requests)
    try:
        reply = client.post(path, json={"messages": ASK, **fields})
    finally:
        client.service.chat.context_tokens = client.service.card.context_tokens
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert named in error["message"]
    assert len(engine.requests) == count, "nothing was computed"


def test_a_body_that_is_no_json_object_is_refused(server):
    client, _ = server
    for body, status in ((b"{", 400), (b"[]", 400), (b'{"messages": NaN}', 400), (b"\xff", 400)):
        reply = client.post(PATH, content=body, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")
    assert client.get(PATH).status_code == 405
    plain = httpx.post(f"{client.base_url}{PATH}", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415


# The official manner


def test_the_official_manner_gives_the_official_fields_alone(official):
    client, engine = official
    engine.script = saying("hm</think>hi")
    body = client.post(PATH, json={"messages": ASK, "return_token_ids": True, "include_reasoning": False}).json()
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "hi", "reasoning_content": "hm"}, "logprobs": None,
         "finish_reason": "stop"}]  # fmt: skip
    assert engine.requests[-1].params.temperature == 1.0


def test_the_official_manner_ignores_what_the_official_api_ignores(official):
    client, engine = official
    engine.script = saying("on and on")
    fields = {
        "logit_bias": {"5": 1},
        "min_tokens": 5,
        "top_k": 3,
        "guided_regex": "a",
        "temperature": 0.3,
        "top_p": 0.2,
    }
    body = client.post(PATH, json={"messages": ASK, "logprobs": True, **fields}).json()
    assert body["choices"][0]["logprobs"].keys() == {"reasoning_content"}, "no list of a channel nothing was said in"
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    assert engine.requests[-1].constraint is None


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2}, {"tools": DECLARED, "tool_choice": "required"}, {"stream_options": {"include_usage": True}},
        {"messages": [{"role": "developer", "content": "x"}]},
    ],
)  # fmt: skip
def test_the_official_manner_refuses_what_the_official_api_refuses(official, fields):
    client, _ = official
    reply = client.post(PATH, json={"messages": ASK, **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_request_error"


def test_the_official_manner_sends_usage_with_the_finish_even_where_a_chunk_for_it_is_asked_for(official):
    client, engine = official
    engine.script = saying("a</think>b")
    body = {"messages": ASK, "stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(client.post(PATH, json=body))
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] > 0


def test_every_path_answers(server):
    client, engine = server
    engine.script = saying("</think>b")
    for prefix in ("/v1", "", "/beta", "/beta/v1"):
        body = client.post(f"{prefix}/chat/completions", json={"messages": ASK}).json()
        assert body["choices"][0]["message"]["content"] == "b"
        assert "prompt" in client.post(f"{prefix}/chat/completions/render", json={"messages": ASK}).json()


def test_the_document_says_what_is_taken_and_answered(server):
    client, _ = server
    route = client.get("/openapi.json").json()["paths"][PATH]["post"]
    body = route["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["messages"]
    assert {"tools", "stream", "logprobs", "guided_json", "thinking"} <= body["properties"].keys()
    assert {"200", "400", "401", "429", "500", "503"} <= route["responses"].keys()
    assert "text/event-stream" in route["responses"]["200"]["content"]
