"""Signs of life, and counts that are those of the prompt: what proxies, clients and other accounts see of a request."""

from __future__ import annotations

import dataclasses

import pytest

from pyrosome.options import ServerOptions
from pyrosome.server.caller import ANYBODY, OpenDoor
from tests.server.scripted import events_of, saying, scripted

CHAT, MESSAGES, RESPONSES, TEXT = "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"
SAY_HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4000}
BODIES = {CHAT: SAY_HI, MESSAGES: SAY_HI, RESPONSES: {"input": "hi"}, TEXT: {"prompt": "hi", "max_tokens": 4000}}
LONG = "and so on " * 20


@pytest.fixture(scope="module")
def slow():
    """A step takes a tenth of the time between two signs of life."""
    with scripted(saying(LONG), options=ServerOptions(keep_alive_s=0.1), step_s=0.01) as found:
        yield found


@pytest.mark.parametrize("path", [*BODIES, "group"])
def test_a_whole_answer_that_is_long_in_being_written_shows_that_it_is(slow, path):
    client, _, _ = slow
    body = {**BODIES[TEXT], "prompt": ["a", "b"]} if path == "group" else BODIES[path]
    reply = client.post(TEXT if path == "group" else path, json=body)
    assert reply.status_code == 200 and reply.content.startswith(b"\n") and reply.json()["usage"]
    assert b"\n\n" in reply.content[:100]


def test_a_whole_answer_that_comes_soon_has_its_length(slow):
    client, engine, _ = slow
    engine.step_s = 0.0
    reply = client.post(CHAT, json={**SAY_HI, "max_tokens": 2})
    engine.step_s = 0.01
    assert int(reply.headers["content-length"]) == len(reply.content) and reply.content.startswith(b"{")


def test_thoughts_that_are_left_out_of_messages_leave_signs_of_life(slow):
    client, engine, _ = slow
    engine.script = saying(LONG + "</think>hello")
    body = {**SAY_HI, "stream": True, "thinking": {"type": "enabled", "budget_tokens": 2000, "display": "omitted"}}
    told = events_of(client.post(MESSAGES, json=body).text)
    engine.script = saying(LONG)
    kinds = [kind for kind, _ in told]
    begun, closed = kinds.index("content_block_start"), kinds.index("content_block_stop")
    assert kinds[begun:closed].count("ping") >= 3  # the first belongs to the beginning
    assert "and so on" not in str(told)


class Names(OpenDoor):
    """Whoever has a key is the account of that name."""

    async def caller(self, presented):
        return dataclasses.replace(ANYBODY, account=presented or "", salt=presented or "")


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_a_prompt_is_counted_with_one_s_own_turns_and_nobody_else_s(path):
    with scripted(saying("")) as (client, engine, service):
        service.door = Names()
        ids = [t for c in "fifty one, surely" for t in service.chat.tokenizer.encode(c)]
        engine.script = lambda request: [[*ids, service.card.end_token]]
        body = {**SAY_HI, "thinking": {"type": "disabled"}}
        nobody, ann = {}, {"authorization": "Bearer ann"}

        def count(headers):
            found = client.post(path, json=body, headers=headers).json()
            return found.get("count", found.get("input_tokens"))

        def say(headers):
            return client.post(CHAT, json=body, headers=headers).json()["choices"][0]["message"]

        said = say(nobody)
        body["messages"] = [*body["messages"], said, {"role": "user", "content": "and?"}]
        plain = count(ann)
        assert count(nobody) > plain  # as its next prompt will have; ann learns nothing of it
        del body["messages"][1:]
        say(ann)
        body["messages"] = [*body["messages"], said, {"role": "user", "content": "and?"}]
        client.post(CHAT, json=body, headers=ann)
        assert count(ann) == len(engine.requests[-1].ids) > plain
