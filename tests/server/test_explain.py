"""`X-Cache-Explain`: what was found in the cache and why not more, in every protocol, for who asks and nobody else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import httpx2 as httpx
import pytest

from pyrosome.engine.request import Reuse
from pyrosome.options import ServerOptions
from pyrosome.server.explain import Telling
from tests.server.remembering import made, remembering, turn
from tests.server.scripted import events_of, saying, scripted

ASKED = {"x-cache-explain": "1"}
FIELDS = ["computed_tokens", "limit", "matched_tokens", "prompt_tokens", "reason", "replayed_tokens", "reused_tokens",
          "stream"]  # fmt: skip
USER = [{"role": "user", "content": "What does the falcon eat?"}]
BODIES = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "What does the falcon eat?", "max_tokens": 5},
    "/v1/messages": {"messages": USER, "max_tokens": 50},
    "/v1/responses": {"input": "What does the falcon eat?"},
}


@pytest.fixture(scope="module")
def client():
    with scripted(saying("7 and more</think>it is 51")) as (client, _, _):
        yield client


def comments(text: str) -> list[dict]:
    """What a stream tells of the cache."""
    lines = [line for line in text.split("\n") if line.startswith(": x-cache-explain ")]
    return [json.loads(line.removeprefix(": x-cache-explain ")) for line in lines]


def is_sound(told: dict) -> bool:
    reused, computed = told["reused_tokens"], told["computed_tokens"]
    return sorted(told) == FIELDS and reused + computed == told["prompt_tokens"] and reused == 3  # as the script has it


@pytest.mark.parametrize("path", BODIES)
def test_a_whole_answer_tells_it_in_a_header_and_in_its_own_field(client, path):
    reply = client.post(path, json=BODIES[path], headers=ASKED)
    told = json.loads(reply.headers["x-cache-explain"])
    assert is_sound(told) and reply.json()["pyrosome"]["cache"] == told


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_tells_it_before_the_first_token_and_in_its_last_events(client, path):
    text = client.post(path, json={**BODIES[path], "stream": True}, headers=ASKED).text
    (told,) = comments(text)
    assert is_sound(told)
    assert text.index(": x-cache-explain") < text.index('"7'), "where the answer begins"
    datas = [json.loads(data) for _, data in events_of(text) if data != "[DONE]"]
    fields = [d.get("pyrosome") or d.get("response", {}).get("pyrosome") or {} for d in datas]
    assert [f["cache"] for f in fields if "cache" in f] == [told]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("value", [None, "0", "", "no", "2"])
def test_who_does_not_ask_is_not_told(client, path, value):
    headers = {} if value is None else {"x-cache-explain": value}
    reply = client.post(path, json=BODIES[path], headers=headers)
    assert "x-cache-explain" not in reply.headers and "cache" not in reply.json()["pyrosome"]
    text = client.post(path, json={**BODIES[path], "stream": True}, headers=headers).text
    assert "cache-explain" not in text and '"cache"' not in text


def test_to_the_letter_of_the_official_api_it_is_beside_the_answer_alone():
    options = ServerOptions(compat="deepseek")
    with scripted(saying("let me see</think>it is 51"), options=options) as (client, _, _):
        reply = client.post("/v1/chat/completions", json={"messages": USER}, headers=ASKED)
        assert is_sound(json.loads(reply.headers["x-cache-explain"])) and "pyrosome" not in reply.json()
        text = client.post("/v1/chat/completions", json={"messages": USER, "stream": True}, headers=ASKED).text
        assert len(comments(text)) == 1 and "pyrosome" not in text


def test_of_several_prompts_each_is_told(client):
    body = {"prompt": ["one falcon in winter", "two falcons and more"], "max_tokens": 3}
    told = json.loads(client.post("/v1/completions", json=body, headers=ASKED).headers["x-cache-explain"])
    assert len(told) == 2 and all(is_sound(t) for t in told) and len({t["prompt_tokens"] for t in told}) == 2
    (told,) = comments(client.post("/v1/completions", json={**body, "stream": True}, headers=ASKED).text)
    assert len(told) == 2


def test_of_several_prompts_nothing_is_told_before_all_is_known():
    outcomes = [SimpleNamespace(explains=True, reuse=Reuse()) for _ in range(2)]
    telling = Telling(SimpleNamespace(exchanges=[SimpleNamespace(outcome=o) for o in outcomes]))
    outcomes[1].reuse = Reuse(7, reused_tokens=3)
    assert telling.comment() == [] and telling.header() == {}
    outcomes[0].reuse = Reuse(9)
    (comment,) = telling.comment()
    assert [t["prompt_tokens"] for t in comments(comment.decode())[0]] == [9, 7] and telling.comment() == []


def test_an_answer_that_failed_tells_its_error_alone():
    with scripted(saying("x")) as (client, engine, _):
        engine.fail = "no"
        reply = client.post("/v1/chat/completions", json={"messages": USER}, headers=ASKED)
        assert reply.status_code == 500 and "x-cache-explain" not in reply.headers


def test_an_answer_that_takes_long_has_it_in_its_body():
    options = ServerOptions(keep_alive_s=0.05)
    with scripted(saying("</think>x"), options=options, step_s=0.02, prompt_steps=20) as (client, _, _):
        reply = client.post("/v1/chat/completions", json={"messages": USER}, headers=ASKED)
        assert reply.text.startswith("\n") and "x-cache-explain" not in reply.headers  # the head was sent long before
        assert is_sound(reply.json()["pyrosome"]["cache"])


def test_a_session_tells_it_too(tmp_path):
    with remembering(saying("</think>x"), tmp_path) as (client, _, _):
        client.headers.update(ASKED)
        assert is_sound(json.loads(turn(client, made(client, messages=USER)).headers["x-cache-explain"]))
        assert is_sound(json.loads(turn(client, made(client, ids=[5, 6, 7, 8])).headers["x-cache-explain"]))


def told_by(reply: httpx.Response) -> dict:
    assert reply.status_code == 200, reply.text
    told = json.loads(reply.headers["x-cache-explain"])
    usage = reply.json()["usage"]
    assert usage["prompt_cache_hit_tokens"] == told["reused_tokens"]
    assert usage["prompt_tokens"] == told["prompt_tokens"]
    return told


def test_the_engine_says_how_much_was_reused_and_why_not_more(nano):
    system = {"role": "system", "content": "You watch the birds of a town and tell of them. " * 20}
    body = {"max_tokens": 2, "temperature": 0, "thinking": {"type": "disabled"}, "cache_salt": "test_explain"}

    def ask(text: str) -> dict:
        messages = [system, {"role": "user", "content": text}]
        return told_by(nano.post("/v1/chat/completions", json={**body, "messages": messages}, headers=ASKED))

    first, again, other = ask("the falcon"), ask("the falcon"), ask("owls")
    assert (first["reused_tokens"], first["limit"]) == (0, "no common prefix")
    assert again["reused_tokens"] > 128 and again["matched_tokens"] >= again["reused_tokens"]
    assert again["reason"] and other["reused_tokens"] > 128 and other["prompt_tokens"] != again["prompt_tokens"]
    stranger = nano.post("/v1/chat/completions", headers=ASKED,
                         json={**body, "cache_salt": "another", "messages": [system]})  # fmt: skip
    assert told_by(stranger)["matched_tokens"] == 0, "what others have asked is not told"
