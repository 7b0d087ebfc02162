"""One request through all layers, both ways, before anything is said about details."""

import json

from tests.server.scripted import events_of, saying, scripted, until

BODY = {"messages": [{"role": "user", "content": "? falcon"}]}


def test_an_answer_whole_and_streamed_is_the_same():
    with scripted(saying("let me see</think>it is 51")) as (client, _, _):
        whole = client.post("/v1/chat/completions", json=BODY).json()
        text = client.post("/v1/chat/completions", json={**BODY, "stream": True}).text
    chunks = [json.loads(data) for _, data in events_of(text)[:-1]]
    assert events_of(text)[-1] == ("", "[DONE]")
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("reasoning_content") or "" for d in deltas) == "let me see"
    assert "".join(d.get("content") or "" for d in deltas) == "it is 51"
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("let me see", "it is 51")
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_client_that_leaves_ends_the_work_within_a_step():
    with scripted(saying("never said"), step_s=0.01, prompt_steps=10_000) as (client, engine, service):
        with client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as reply:
            next(reply.iter_bytes())
        until(lambda: engine.aborted and not engine.has_work)
        until(lambda: service.gate.num_inside == 0 and not service.exchanges)


def test_the_built_in_model_answers_over_http(nano):
    reply = nano.post("/v1/chat/completions", json={**BODY, "thinking": {"type": "disabled"}, "max_tokens": 8})
    assert reply.status_code == 200
    assert reply.headers["x-pyrosome-mode"] == "off"
