"""Histories as clients send them back: thoughts by every spelling, results out of order, arguments that broke."""

from __future__ import annotations

import json

import pytest

from pyrosome.chat.carried import carry
from tests.server.answers import ASK, TOOLS
from tests.server.scripted import saying, scripted

PATH = "/v1/responses"
DECLARED = [{"type": "function", "name": n, "parameters": s} for n, s in TOOLS.items()]


@pytest.fixture(scope="module")
def server():
    with scripted(saying("a</think>b")) as (client, _, _):
        yield client


def prompt(server, *items, path=PATH):
    reply = server.post(path + "/render", json={"input": list(items), "tools": DECLARED})
    assert reply.status_code == 200, reply.text
    return reply.json()["prompt"]


CALLED = {"a": "Paris"}


def spelled_histories(thought="need 🙂 f"):
    """One history, in which a tool is called after thinking, as clients of each protocol send it back."""
    call_ = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": json.dumps(CALLED)}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "r"}
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": CALLED}
    used = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "r"}]}
    made = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": json.dumps(CALLED)}
    out = {"type": "function_call_output", "call_id": "c1", "output": "r"}
    functions = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in TOOLS.items()]
    anthropic = [{"name": n, "input_schema": s} for n, s in TOOLS.items()]

    def chat(**thoughts):
        assistant = {"role": "assistant", "content": "ok", "tool_calls": [call_], **thoughts}
        return "/v1/chat/completions", {"messages": [*ASK, assistant, result], "tools": functions}

    def messages(**thoughts):
        content = [{"type": "thinking", **thoughts}, {"type": "text", "text": "ok"}, use]
        history = [*ASK, {"role": "assistant", "content": content}, used]
        return "/v1/messages", {"messages": history, "tools": anthropic, "max_tokens": 9}

    def responses(**thoughts):
        said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]}
        history = [*ASK, {"type": "reasoning", "id": "rs_1", **thoughts}, said, made, out]
        return PATH, {"input": history, "tools": DECLARED}

    text = [{"type": "reasoning_text", "text": thought}]
    return {
        "reasoning_content": chat(reasoning_content=thought),
        "reasoning": chat(reasoning=thought),
        "thinking": messages(thinking=thought, signature="x"),
        "thinking without a signature": messages(thinking=thought),
        "signature": messages(thinking="", signature=carry(thought)),
        "reasoning_text": responses(content=text, summary=[]),
        "summary": responses(summary=[{"type": "summary_text", "text": thought}]),
        "encrypted_content": responses(summary=[], content=None, encrypted_content=carry(thought)),
    }


def test_reas_02_thoughts_that_come_back_render_the_same_prompt_by_every_spelling(server):
    found = {}
    for name, (path, body) in spelled_histories().items():
        reply = server.post(path + "/render", json=body).json()
        found[name] = (reply["prompt"], tuple(reply["token_ids"]), reply["mode"])
    assert "<think>need 🙂 f</think>ok\n\n<｜DSML｜tool_calls>" in found["reasoning_content"][0]
    assert {n for n, f in found.items() if f != found["reasoning_content"]} == set()


# Histories that other servers choke on

OUT_A, OUT_B = ({"type": "function_call_output", "call_id": c, "output": f"out {c}"} for c in "ab")
CALL_A, CALL_B = ({"type": "function_call", "call_id": c, "name": "f", "arguments": json.dumps({"a": c})} for c in "ab")
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "shared"}]}
DEVELOPER = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "note"}]}


def test_enc_12_results_are_paired_with_their_calls_wherever_they_stand(server):
    text = prompt(server, *ASK, THOUGHT, CALL_A, DEVELOPER, OUT_A)
    assert "<think>shared</think>\n\n<｜DSML｜tool_calls>" in text
    assert "<tool_result>out a</tool_result>\n\nnote<｜Assistant｜><think>" in text


def test_enc_12_parallel_calls_with_one_thought_are_one_turn(server):
    expected = prompt(server, *ASK, THOUGHT, CALL_A, CALL_B, OUT_A, OUT_B)
    turn = expected.rpartition("<think>shared</think>")[2]
    assert turn.count('<｜DSML｜invoke name="f">') == 2 and turn.count("<｜Assistant｜>") == 1
    assert turn.index("out a") < turn.index("out b")
    assert prompt(server, *ASK, THOUGHT, CALL_A, CALL_B, OUT_B, OUT_A) == expected
    body = {"input": [*ASK, THOUGHT, CALL_A, CALL_B, OUT_B, OUT_A], "tools": DECLARED}
    assert server.post(PATH, json=body).json()["status"] == "completed"


def test_enc_13_thoughts_that_a_client_has_left_out_are_not_missed(server):
    text = prompt(server, *ASK, CALL_A, OUT_A, *ASK)
    assert "<｜Assistant｜><think></think>\n\n<｜DSML｜tool_calls>" in text
    null = {"type": "reasoning", "id": "rs", "summary": [], "content": None, "encrypted_content": "gAAAAAB"}
    assert prompt(server, *ASK, null, CALL_A, OUT_A, *ASK) == text


@pytest.mark.parametrize("broken", ['{"a": "Par', "not JSON", "[1, 2]", "5", '"x"'])
def test_enc_11_arguments_that_are_no_object_are_rendered_as_they_are(server, broken):
    made = {**CALL_A, "arguments": broken}
    text = prompt(server, *ASK, made, OUT_A)
    assert f'<｜DSML｜parameter name="arguments" string="true">{broken}</｜DSML｜parameter>' in text
    function = {"id": "a", "type": "function", "function": {"name": "f", "arguments": broken}}
    history = [*ASK, {"role": "assistant", "tool_calls": [function]},
               {"role": "tool", "tool_call_id": "a", "content": "out a"}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in TOOLS.items()]
    chat = server.post("/v1/chat/completions/render", json={"messages": history, "tools": tools}).json()
    assert chat["prompt"] == text
    use = {"type": "tool_use", "id": "a", "name": "f", "input": broken}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "out a"}
    history = [*ASK, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    reply = server.post("/v1/messages", json={"messages": history, "max_tokens": 9})
    assert reply.status_code == 200, reply.text
