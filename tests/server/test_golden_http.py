"""DeepSeek's own cases through HTTP: what a request becomes, and what an answer becomes on the wire."""

import hashlib
import json

import pytest

from pyrosome.options import ServerOptions
from pyrosome.testing.full_vocabulary import full_vocabulary
from tests.chat.cases import OFFICIAL, chat, golden, tokenizer
from tests.chat.exceptions import PARSE
from tests.server.processes import served
from tests.server.scripted import EOS, events_of, scripted

REQUESTS, ANSWERS = golden("api_encode"), golden("parse")
PATHS = {"chat_completions": "/v1/chat/completions", "messages": "/anthropic/v1/messages", "responses": "/v1/responses"}
STAGES = {
    "ReasoningStart": ("reasoning", False),
    "ReasoningContinuation": ("reasoning", True),
    "ContentContinuation": ("content", True),
}
SAMPLED = ("temperature", "top_p", "seed")


def scripted_manner(compat):
    options = ServerOptions(compat=compat, names=("DeepSeek-V4-Pro",))
    return scripted(lambda request: [[EOS]], options=options, chat=chat("0731", compat or None))


@pytest.fixture(scope="module")
def official():
    with scripted_manner("deepseek") as found:
        yield found


@pytest.fixture(scope="module")
def usual():
    with scripted_manner("") as found:
        yield found


# Requests


@pytest.mark.parametrize("case", REQUESTS, ids=[c["id"] for c in REQUESTS])
def test_a_request_is_rendered_or_refused_as_the_official_api_does(official, case):
    rendered_or_refused(official[0], case)


def test_the_command_serves_the_official_manner_on_weights_of_the_official_vocabulary(tmp_path):
    """`pyrosome serve MODEL --tokenizer DIR --dialect 0731 --compat deepseek`, every case in one process."""
    model = full_vocabulary(tmp_path / "model", OFFICIAL / "tokenizer.json")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 20}))
    flags = ("--tokenizer", str(OFFICIAL), "--dialect", "0731", "--compat", "deepseek", "--context", str(1 << 20))
    with served(*flags, state=tmp_path / "state", model=str(model), cache_gib=1.0) as server, server.client() as client:
        for case in REQUESTS:
            rendered_or_refused(client, case)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        assert client.post(PATHS["chat_completions"], json=body).json()["usage"]["completion_tokens"] == 4


def rendered_or_refused(client, case):
    want = case["expected"]["v4"]
    answer = client.post(PATHS[case["protocol"]] + "/render", json=case["body"])
    if "error" in want:
        assert answer.status_code == want["error"]["status"]
        assert same_error(answer.json(), want["error"].get("body"), case["protocol"])
        return
    found = answer.json()
    assert answer.status_code == 200, found
    assert found["prompt"] == want["prompt"]
    assert hashlib.sha256(",".join(map(str, found["token_ids"])).encode()).hexdigest() == want["tokens"]["sha256"]
    asked = want["inference"]
    for name in SAMPLED:
        if asked[name] is not None:
            assert found["sampling"][name] == pytest.approx(asked[name]), name
    assert (found["sampling"]["presence_penalty"], found["sampling"]["frequency_penalty"]) == (0, 0)
    if asked["max_tokens"] is not None:
        assert found["sampling"]["max_tokens"] == asked["max_tokens"]
    elif (default := want.get("default_max_tokens_1M_context")) is not None:
        assert found["sampling"]["max_tokens"] == default
    assert found["sampling"]["logprobs"] == ((asked["top_logprobs"] or 0) if asked["logprobs"] else None)
    given = found["constraint"] and {k: found["constraint"][k] for k in ("kind", "schema")}
    assert given == asked["output_constraint"]
    parsing = want["parsing"]
    assert found["sampling"]["stop"] == parsing["stop_sequences"]
    stage = STAGES.get(parsing["thinking_initial_stage"])
    if parsing["starts_in_tool_calls"]:
        stage = ("tools", False)
    elif stage is None:
        final = case["body"].get("messages", [{}])[-1]
        stage = ("content", bool(final.get("prefix") and final.get("content")))
    assert (found["starts_in"], found["continues"]) == stage


@pytest.mark.parametrize("case", [c for c in REQUESTS if "error" in c["expected"]["v4"]], ids=lambda c: c["id"])
def test_what_cannot_be_rendered_is_refused_before_anything_is_generated(official, case):
    client, engine, _ = official
    before = len(engine.requests)
    want = case["expected"]["v4"]["error"]
    for stream in ({}, {"stream": True}):
        if stream and "stream_options" in case["body"]:
            continue  # with a stream they are allowed
        answer = client.post(PATHS[case["protocol"]], json={**case["body"], **stream})
        assert answer.status_code == want["status"]
        assert same_error(answer.json(), want.get("body"), case["protocol"])
    assert len(engine.requests) == before


def same_error(found, want, protocol):
    """Whether an error is the official one; Anthropic's protocol says the same in its own shape."""
    if protocol == "messages":
        assert found["type"] == "error" and found["error"]["type"] == "invalid_request_error"
        return want is None or found["error"]["message"] == want["error"]["message"]
    return want is None or found == want


# Answers


def body_of(case):
    """A request in the manner that the case was read in."""
    options, thinking = case["options"], case["mode"] == "thinking"
    body = {"messages": [{"role": "user", "content": "json, please"}]}
    body["thinking"] = {"type": "enabled" if thinking else "disabled"}
    if options.get("parse_tool_calls", True) and not options.get("parse_json_output") and "stage" not in options:
        names = {c["name"] for c in case["expected"]["tool_calls"]} | {"f"}
        body["tools"] = [
            {"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in sorted(names)
        ]
    if options.get("starts_in_tool_calls"):
        body["tool_choice"] = "required"
    if options.get("stop_sequences"):
        body["stop"] = options["stop_sequences"]
    if options.get("parse_json_output"):
        body["response_format"] = {"type": "json_object"}
    if case["expected"]["finish_reason"] == "length":  # cut short, where the case ends
        body["max_tokens"] = len(ids_of(case))
    if stage := options.get("stage"):
        final = {"role": "assistant", "content": "", "prefix": True, "reasoning_content": "so"}
        body["messages"].append(final | ({"content": "well"} if stage == "ContentContinuation" else {}))
    return body


def ids_of(case):
    return tokenizer().encode(case["text"], allow_special=True)


def merged(deltas):
    """The same stream with neighbouring pieces of one kind put together; ids of calls are not compared."""
    out = []
    for delta in deltas:
        for call in delta.get("tool_calls") or ():
            if "id" in call:
                out.append(["call", call["index"], call["type"], call["function"]["name"]])
            text = call["function"]["arguments"]
            if out[-1][0] == "arguments":
                out[-1][1] += text
            elif text:
                out.append(["arguments", text])
        for kind in ("reasoning_content", "content"):
            if text := delta.get(kind):
                if out and out[-1][0] == kind:
                    out[-1][1] += text
                else:
                    out.append([kind, text])
    return out


def stripped(parts, case):
    """JSON answers are compared without the blanks that one of the two puts around them."""
    if not case["options"].get("parse_json_output"):
        return parts
    return [[k, v.strip()] for k, v in parts if v.strip()]


# Nothing is computed behind complete calls, so it is not counted either.
GOES_ON = ("m_content_after_block", "m_two_blocks")
STREAMED = [c for c in ANSWERS if "chat_chunks_one_token_each" in c and c["id"] not in PARSE]


@pytest.mark.parametrize("case", STREAMED, ids=lambda c: c["id"])
def test_a_stream_of_chunks_is_the_official_one(official, case):
    client, engine, _ = official
    engine.script = lambda request: [ids_of(case)]
    text = client.post(PATHS["chat_completions"], json={**body_of(case), "stream": True}).text
    found = [json.loads(data) for _, data in events_of(text)[:-1]]
    want = case["chat_chunks_one_token_each"]
    assert events_of(text)[-1][1] == "[DONE]"
    deltas, wanted = ([c["choices"][0]["delta"] for c in chunks] for chunks in (found, want))
    assert deltas[0] == wanted[0] and deltas[-1] == wanted[-1]
    assert stripped(merged(deltas), case) == stripped(merged(wanted), case)
    assert {frozenset(d) for d in deltas[1:-1]} <= {frozenset(d) for d in wanted[1:-1]}
    assert [c["choices"][0]["finish_reason"] for c in (found[-1], want[-1])] == [case["expected"]["finish_reason"]] * 2
    assert set(found[-1]) == set(want[-1]) and set(found[0]) == set(want[0])
    if case["id"] not in GOES_ON:
        assert usage(found[-1]) == usage(want[-1])


def usage(chunk):
    """Counts of what was said; those of the prompt are of another prompt."""
    found = chunk["usage"]
    assert found["prompt_cache_hit_tokens"] + found["prompt_cache_miss_tokens"] == found["prompt_tokens"]
    return found["completion_tokens"], found.get("completion_tokens_details"), sorted(found)


WHOLE = [c for c in ANSWERS if c["id"] not in PARSE]


@pytest.mark.parametrize("case", WHOLE, ids=lambda c: c["id"])
def test_a_whole_answer_is_the_official_one_in_every_protocol(official, case):
    client, engine, _ = official
    engine.script = lambda request: [ids_of(case)]
    message = client.post(PATHS["chat_completions"], json=body_of(case)).json()["choices"][0]["message"]
    calls = [c["function"] for c in message.get("tool_calls") or ()]
    assert calls == [{"name": c["name"], "arguments": c["arguments"]} for c in case["expected"]["tool_calls"]]
    assert message.get("reasoning_content") == case["expected"]["reasoning_content"]
    trimmed = str.strip if case["options"].get("parse_json_output") else str
    assert trimmed(message["content"]) == trimmed(case["expected"]["content"])
    if "stage" in case["options"] or case["options"].get("parse_json_output"):
        return  # no other protocol can ask for that
    answered(client, case)


def answered(client, case):
    chat_body = body_of(case)
    tools = [t["function"] for t in chat_body.get("tools", ())]
    thinking = chat_body["thinking"]
    most = chat_body.get("max_tokens", 4000)
    body = {"model": "m", "max_tokens": most, "messages": chat_body["messages"], "thinking": thinking}
    if tools:
        body["tools"] = [{"name": t["name"], "input_schema": t["parameters"]} for t in tools]
    if "tool_choice" in chat_body:
        body["tool_choice"] = {"type": "tool", "name": "f"}
    if "stop" in chat_body:
        body["stop_sequences"] = chat_body["stop"]
    found, want = client.post(PATHS["messages"], json=body).json(), case["expected_messages_response"]
    assert blocks(found) == blocks(want)
    assert (found["stop_reason"], found["stop_sequence"]) == (want["stop_reason"], want["stop_sequence"])
    assert set(found) >= set(want)
    if "stop" in chat_body:
        return
    body = {
        "input": "x",
        "max_output_tokens": most,
        "reasoning": {"effort": "high" if thinking["type"] == "enabled" else "none"},
    }
    if tools:
        body["tools"] = [{"type": "function", **t} for t in tools]
    if "tool_choice" in chat_body:
        body["tool_choice"] = "required"
    found = client.post(PATHS["responses"], json=body).json()
    assert found["status"] == case["expected_responses_status"]
    assert [item(i) for i in found["output"]] == [item(i) for i in case["expected_responses_output"]]


def blocks(message):
    """Content blocks without ids; numbers as doubles: the official API rounds large integers, this server does not."""
    found = [{k: v for k, v in b.items() if k not in ("id", "signature")} for b in message["content"]]
    return json.loads(json.dumps(found), parse_int=float)


def item(found):
    """An output item without its ids."""
    return {k: v for k, v in found.items() if k not in ("id", "call_id", "encrypted_content", "namespace")}


@pytest.mark.parametrize("case", ANSWERS, ids=lambda c: c["id"])
def test_the_usual_manner_streams_what_it_answers_whole(usual, case):
    client, engine, _ = usual
    for size in (1, 3, 1000):
        engine.script, engine.at_once = (lambda request: [ids_of(case)]), size
        whole = client.post(PATHS["chat_completions"], json=body_of(case)).json()["choices"][0]
        text = client.post(PATHS["chat_completions"], json={**body_of(case), "stream": True}).text
        parts = merged([json.loads(d)["choices"][0]["delta"] for _, d in events_of(text)[:-1]])
        message = whole["message"]
        assert "".join(p[1] for p in parts if p[0] == "content") == message["content"]
        assert "".join(p[1] for p in parts if p[0] == "reasoning_content") == (message.get("reasoning_content") or "")
        calls = [c["function"] for c in message.get("tool_calls") or ()]
        assert [p[3] for p in parts if p[0] == "call"] == [c["name"] for c in calls]
        assert "".join(p[1] for p in parts if p[0] == "arguments") == "".join(c["arguments"] for c in calls)
    engine.at_once = 1
