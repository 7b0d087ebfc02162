"""What a client chooses costs the others nothing: names, salts, stop strings, and texts of a million tokens."""

from __future__ import annotations

import asyncio
import json

import pytest

from pyrosome.chat import Tokenizer
from pyrosome.engine import wire
from pyrosome.server.caller import ANYBODY
from pyrosome.server.openai_chat import ChatShape
from pyrosome.server.openai_text import TextShape
from pyrosome.server.routes import LONGEST_SALT, LONGEST_STOP, salt_of
from pyrosome.server.service import MAX_NAME_CHARS
from tests.server.scripted import saying, scripted

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
SAY_HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
BODIES = {CHAT: SAY_HI, MESSAGES: SAY_HI, RESPONSES: {"input": "hi"}, TEXT: {"prompt": "hi"}}


@pytest.fixture(scope="module")
def server():
    with scripted(saying("</think>hello")) as found:
        yield found


@pytest.mark.parametrize("path", BODIES)
def test_a_model_s_name_that_every_chunk_would_repeat_is_bounded(server, path):
    client, engine, _ = server
    assert client.post(path, json={**BODIES[path], "model": "m" * MAX_NAME_CHARS}).status_code == 200
    before = len(engine.requests)
    reply = client.post(path, json={**BODIES[path], "model": "m" * (MAX_NAME_CHARS + 1)})
    assert reply.status_code == 400 and "model has 257 characters" in reply.text
    assert len(engine.requests) == before


@pytest.mark.parametrize(("path", "name"), [(CHAT, "stop"), (MESSAGES, "stop_sequences"), (TEXT, "stop")])
def test_a_stop_string_is_as_long_as_can_be_looked_for_with_each_token(server, path, name):
    client, engine, _ = server
    assert client.post(path, json={**BODIES[path], name: ["s" * LONGEST_STOP]}).status_code == 200
    before = len(engine.requests)
    reply = client.post(path, json={**BODIES[path], name: ["s" * (LONGEST_STOP + 1)]})
    assert reply.status_code == 400 and "a string of 4,097 characters" in reply.text
    assert len(engine.requests) == before


def test_a_salt_is_short_and_plain_whatever_a_client_names():
    named = ["a", "b" * LONGEST_SALT, "b" * (LONGEST_SALT + 1), "b" * 10**6, "é", "\ud800", "\ud801", "/a", "#a"]
    salts = [salt_of(ANYBODY, {"cache_salt": name}) for name in named]
    assert len(set(salts)) == len(named)
    assert all(salt.isascii() and len(salt) <= LONGEST_SALT + 1 for salt in salts)


def test_a_salt_that_is_no_text_is_one_like_any_other(server):
    client, engine, service = server
    before = service.replay.num_tokens
    ids = [t for c in "some words, oddly spelled" for t in service.chat.tokenizer.encode(c)]
    engine.script = lambda request: [[*ids, service.card.end_token]]
    body = {**SAY_HI, "max_tokens": 100, "thinking": {"type": "disabled"}, "cache_salt": "\ud800"}

    def post():  # as JSON escapes it; in UTF-8 nobody could send it
        headers = {"content-type": "application/json"}
        reply = client.post(CHAT, content=json.dumps(body).encode(), headers=headers)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]

    body["messages"] = [*body["messages"], post(), {"role": "user", "content": "and?"}]
    post()
    asked = " ".join(map(str, engine.requests[-1].ids))
    assert " ".join(map(str, ids)) in asked and service.replay.num_tokens > before
    assert wire.encode_add(1, engine.requests[-1])


@pytest.fixture
def decoded_on_loop(monkeypatch):
    """Numbers of ids that were decoded where all clients wait for it."""
    found: list[int] = []
    decode = Tokenizer.decode

    def watched(self, ids):
        ids = list(ids)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            found.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", watched)
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a b c " * 50, "return_token_strs": True}),
        ("/detokenize", {"tokens": [5, 6, 7] * 50}),
        (TEXT + "/render", {"prompt": "a b c " * 50}),
        (CHAT + "/render", SAY_HI),
    ],
)
def test_a_long_text_is_decoded_beside_the_loop_that_serves_everybody(server, decoded_on_loop, path, body):
    client, _, _ = server
    assert client.post(path, json=body).status_code == 200
    assert not decoded_on_loop


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "a b c " * 800, "echo": True, "logprobs": 2, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "a b c " * 800}], "prompt_logprobs": 2, "max_tokens": 1}),
    ],
)
def test_log_probabilities_of_a_long_prompt_are_written_beside_the_loop(server, monkeypatch, path, body):
    client, engine, _ = server
    engine.script = saying("</think>hello")
    on_loop: list[bool] = []
    for shape in (TextShape, ChatShape):
        whole = shape.whole

        def watched(self, whole=whole):
            on_loop.append(asyncio._get_running_loop() is not None)
            return whole(self)

        monkeypatch.setattr(shape, "whole", watched)
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert on_loop == [False]
    short = {**body, "prompt": "a"} if "prompt" in body else {**body, **SAY_HI}
    assert client.post(path, json=short).status_code == 200
    assert on_loop == [False, True]  # a short one is not worth a thread


def test_an_error_repeats_no_more_of_a_body_than_a_person_reads(server):
    client, _, _ = server
    for body in ({"priority": "p" * 10**6}, {"max_tokens": "m" * 10**6}, {"n": ["n" * 10**6]}):
        reply = client.post(TEXT, json={"prompt": "x", **body})
        assert reply.status_code == 400 and len(reply.content) < 10_000, body
        assert next(iter(body)) in reply.json()["error"]["message"]
