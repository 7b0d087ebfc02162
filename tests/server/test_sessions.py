"""Sessions over HTTP: what they keep, whose they are, and what becomes of them when something goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat

import pytest

from pyrosome.options import ServerOptions
from pyrosome.server.caller import OpenDoor
from pyrosome.server.exchange import Exchange
from tests.server.remembering import THOUGHT, TOOLS, USER, Doors, as_, error_of, left, made, remembering, shown, turn
from tests.server.scripted import EOS, TOKENIZER, events_of, saying, until

CALL = """</think>

<｜DSML｜tool_calls>
<｜DSML｜invoke name="look">
<｜DSML｜parameter name="at" string="true">sky</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""


# Conversations


def test_a_conversation_is_gone_on_with_by_its_new_messages_alone(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, service):
        session = made(client, name="birds", messages=[USER])
        first = turn(client, session)
        assert first.headers["x-pyrosome-session"] == session
        message = first.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("let me see", "it is 51")
        known = [USER, {"role": "assistant", "content": "it is 51", "reasoning_content": "let me see"}]
        for n in range(3):
            more = {"role": "user", "content": f"and {n}?"}
            before = left(engine)[:]
            second = turn(client, session, messages=[more])
            prompt = service.chat.render({"messages": [*known, more]}).ids
            assert tuple(left(engine)[: len(prompt)]) == prompt, "the engine holds the conversation as it is rendered"
            new = engine.requests[-1].ids
            assert prompt[-len(new) :] == new and list(prompt[: -len(new)]) == before[: len(prompt) - len(new)]
            assert len(new) < len(prompt) // 2
            assert second.json()["usage"]["prompt_tokens"] == len(prompt)
            assert second.json()["usage"]["prompt_cache_hit_tokens"] == 3  # as the script has it
            known += [more, known[1]]
        about = shown(client, session)
        assert about["messages"] == known
        assert (about["name"], about["kind"], about["status"], about["bytes"]) == ("birds", "chat", "open", 0)
        assert about["num_messages"] == 8 and about["tokens"] == len(left(engine)) - 1  # but for the end token


def test_an_answer_in_a_session_is_the_same_whole_and_streamed(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        whole = turn(client, made(client, messages=[USER])).json()
        session = made(client)
        text = turn(client, session, messages=[USER], stream=True).text
        assert shown(client, session)["num_messages"] == 2
    chunks = [json.loads(data) for _, data in events_of(text)[:-1]]
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert events_of(text)[-1] == ("", "[DONE]")
    message = whole["choices"][0]["message"]
    for name in ("content", "reasoning_content"):
        assert "".join(d.get(name) or "" for d in deltas) == message[name]
    assert chunks[-1]["usage"] == whole["usage"] and whole["object"] == "chat.completion"


def test_tools_and_the_mode_are_the_sessions_and_a_turn_may_have_its_own(tmp_path):
    with remembering(saying(CALL), tmp_path) as (client, engine, service):
        session = made(client, messages=[USER], tools=TOOLS, reasoning_effort="max")
        reply = turn(client, session)
        (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "look", "arguments": '{"at": "sky"}'}
        assert reply.headers["x-pyrosome-mode"] == "max"
        engine.script = saying("blue")
        result = {"role": "tool", "tool_call_id": call["id"], "content": "blue"}
        reply = turn(client, session, messages=[result], thinking={"type": "disabled"})
        assert reply.headers["x-pyrosome-mode"] == "off" and reply.json()["choices"][0]["message"]["content"] == "blue"
        assert [m["role"] for m in shown(client, session)["messages"]] == ["user", "assistant", "tool", "assistant"]
        assert shown(client, session)["settings"] == {"tools": TOOLS, "reasoning_effort": "max"}
        reply = turn(client, session, messages=[USER])
        assert reply.headers["x-pyrosome-mode"] == "max"
        messages = shown(client, session)["messages"][:-1]
        prompt = service.chat.render({"messages": messages, "tools": TOOLS, "reasoning_effort": "max"}).ids
        assert tuple(left(engine)[: len(prompt)]) == prompt
        session = made(client, messages=[USER], thinking={"type": "disabled"})
        assert turn(client, session, reasoning_effort="low").headers["x-pyrosome-mode"] == "low"
        assert turn(client, session, messages=[USER]).headers["x-pyrosome-mode"] == "off"


def test_messages_are_appended_and_taken_back(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, service):
        session = made(client)
        added = [{"role": "system", "content": "be short"}, USER]
        reply = client.post(f"/v1/sessions/{session}/extend", json={"messages": added})
        assert reply.json()["num_messages"] == 2 and not engine.requests
        turn(client, session)
        turn(client, session, messages=[{"role": "user", "content": "again"}])
        reply = client.post(f"/v1/sessions/{session}/rewind", json={"messages": 2})
        assert reply.json()["num_messages"] == 3 and shown(client, session)["messages"][:2] == added
        error_of(client.post(f"/v1/sessions/{session}/rewind", json={"messages": 4}), 400)
        turn(client, session, messages=[{"role": "user", "content": "otherwise"}])
        prompt = service.chat.render({"messages": shown(client, session)["messages"][:-1]}).ids
        assert tuple(left(engine)[: len(prompt)]) == prompt


def test_an_answer_can_be_asked_for_again(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, service):
        session = made(client, messages=[USER])
        for _ in range(3):
            assert turn(client, session, seed=5).status_code == 200
            client.post(f"/v1/sessions/{session}/rewind", json={"messages": 1})
        assert len(engine.requests[-1].ids) == 1, "the last id of the prompt, from which the answer is chosen"
        prompt = service.chat.render({"messages": [USER]}).ids
        assert tuple(left(engine)[: len(prompt)]) == prompt


def test_a_fork_goes_its_own_way(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        session = made(client, messages=[USER], name="one")
        turn(client, session)
        twin = client.post(f"/v1/sessions/{session}/fork", json={"name": "other"}).json()
        assert twin["id"] != session and twin["name"] == "other" and twin["num_messages"] == 2
        turn(client, twin["id"], messages=[USER])
        assert shown(client, session)["num_messages"] == 2 and shown(client, twin["id"])["num_messages"] == 4
        assert len(engine.sessions) == 2
        assert client.post(f"/v1/sessions/{session}/fork").json()["name"] == ""


# Texts


def test_a_text_is_gone_on_with(tmp_path):
    with remembering(saying(" upon a time"), tmp_path) as (client, engine, service):
        begin = [service.card.begin_token, *TOKENIZER.encode("Once")]
        said = TOKENIZER.encode(" upon a time")
        session = made(client, text="Once")
        reply = turn(client, session)
        assert reply.json()["object"] == "text_completion"
        assert reply.json()["choices"][0]["text"] == " upon a time"
        assert reply.json()["usage"]["prompt_tokens"] == len(begin)
        assert shown(client, session)["tokens"] == len(begin) + len(said)
        reply = turn(client, session, prompt=" there", stream=True)
        chunks = [json.loads(data) for _, data in events_of(reply.text)[:-1]]
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == " upon a time"
        whole = [*begin, *said, *TOKENIZER.encode(" there"), *said]
        assert left(engine) == [*whole, EOS], "the end token is cut away before anything else is said"
        client.post(f"/v1/sessions/{session}/extend", json={"ids": [7, 8]})
        client.post(f"/v1/sessions/{session}/extend", json={"text": "so"})
        assert left(engine) == [*whole, 7, 8, *TOKENIZER.encode("so")]
        reply = client.post(f"/v1/sessions/{session}/rewind", json={"tokens": len(TOKENIZER.encode("so")) + 1})
        assert left(engine) == [*whole, 7] and reply.json()["tokens"] == len(whole) + 1
        assert reply.json()["tokens_to_compute"] == 1
        error_of(client.post(f"/v1/sessions/{session}/rewind", json={"tokens": 1000}), 400)


def test_a_text_may_begin_with_a_prompt_or_ids(tmp_path):
    with remembering(saying("x"), tmp_path) as (client, engine, service):
        for body, ids in (
            ({"prompt": "Once"}, [service.card.begin_token, *TOKENIZER.encode("Once")]), ({"prompt": [5, 6]}, [5, 6]),
        ):  # fmt: skip
            session = made(client, ids=[])
            assert "empty" in error_of(turn(client, session), 400)
            turn(client, session, **body)
            assert engine.requests[-1].ids == tuple(ids)
            client.delete(f"/v1/sessions/{session}")


def test_what_a_stop_string_ended_is_cut_where_it_was_found(tmp_path):
    # The engine has not ended the turn yet when the next request comes.
    with remembering(saying("one\ntwo\nthree\n"), tmp_path, step_s=0.02) as (client, engine, _):
        session = made(client, ids=[5])
        reply = turn(client, session, stop="two")
        assert reply.json()["choices"][0]["text"] == "one\n"
        kept = shown(client, session)["tokens"]
        client.post(f"/v1/sessions/{session}/extend", json={"ids": [9]})
        assert TOKENIZER.decode(left(engine)[1:-1]).startswith("one\ntwo") and left(engine)[-1] == 9
        assert "three" not in TOKENIZER.decode(left(engine)) and len(left(engine)) == kept + 1


# One thing at a time


def routes_on(session: str) -> list[tuple[str, str, dict | None]]:
    """Everything that can be asked about one session."""
    at = f"/v1/sessions/{session}"
    return [
        ("POST", f"{at}/generate", {"messages": [USER]}), ("POST", f"{at}/extend", {"messages": [USER]}),
        ("POST", f"{at}/rewind", {"messages": 1}), ("POST", f"{at}/fork", None), ("POST", f"{at}/save", None),
        ("GET", f"{at}/export", None), ("DELETE", at, None),
    ]  # fmt: skip


def test_whatever_comes_while_a_session_answers_is_told_to_wait(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        session = made(client, messages=[USER])
        engine.hold.set()
        with client.stream("POST", f"/v1/sessions/{session}/generate", json={"stream": True}) as reply:
            pieces = reply.iter_bytes()
            next(pieces)
            for method, path, body in routes_on(session):
                message = error_of(client.request(method, path, json=body), 409)
                assert "busy (generate)" in message and "wait for its end" in message
            assert shown(client, session)["busy"] is True
            engine.hold.clear()
            assert b"[DONE]" in b"".join(pieces)
        for method, path, body in routes_on(session):
            assert client.request(method, path, json=body).status_code == 200, path


@pytest.fixture
def slow_to_close(monkeypatch):
    """What follows an answer takes its time."""
    close = Exchange.close

    async def slowly(exchange):
        await asyncio.sleep(0.2)
        await close(exchange)

    monkeypatch.setattr(Exchange, "close", slowly)


@pytest.mark.usefixtures("slow_to_close")
def test_the_next_turn_may_be_asked_for_as_soon_as_the_answer_is_there_or_has_failed(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        session = made(client)
        for stream in (True, False) * 2:
            assert turn(client, session, messages=[USER], stream=stream).status_code == 200
            engine.fail = "no"
            assert "no" in turn(client, session, messages=[USER], stream=stream).text
        assert shown(client, session)["num_messages"] == 8


# Turns that are broken off


def leave(client, engine, session: str, body: dict) -> None:
    """Be gone in the middle of an answer."""
    aborted = len(engine.aborted)
    with client.stream("POST", f"/v1/sessions/{session}/generate", json={**body, "stream": True}) as reply:
        for piece in reply.iter_text():
            if "let" in piece:
                break
    until(lambda: len(engine.aborted) > aborted and not engine.has_work)


def slowly(request):
    """An answer nobody waits for the end of."""
    return [[*TOKENIZER.encode("let me see " + "and see " * 2000), EOS]]


def test_when_its_client_leaves_a_conversation_is_as_before(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, service):
        session = made(client, messages=[USER])
        turn(client, session)
        before, held = shown(client, session), left(engine)[:]
        engine.script, engine.step_s = slowly, 0.002
        leave(client, engine, session, {"messages": [{"role": "user", "content": "and then?"}]})
        until(lambda: not shown(client, session)["busy"])
        assert shown(client, session)["messages"] == before["messages"]
        client.post(f"/v1/sessions/{session}/save")
        assert left(engine) == held[: len(left(engine))], "and its file has nothing of the turn"
        engine.script, engine.step_s = saying(THOUGHT), 0
        turn(client, session, messages=[{"role": "user", "content": "and then?"}])
        messages = shown(client, session)["messages"]
        assert len(messages) == 4
        prompt = service.chat.render({"messages": messages[:3]}).ids
        assert tuple(left(engine)[: len(prompt)]) == prompt


def test_when_its_client_leaves_a_text_is_as_before(tmp_path):
    with remembering(slowly, tmp_path, step_s=0.002) as (client, engine, _):
        session = made(client, ids=[5, 6, 7])
        leave(client, engine, session, {"prompt": [8], "max_tokens": 5000})
        assert len(left(engine)) > 4
        until(lambda: not shown(client, session)["busy"])
        assert shown(client, session)["tokens"] == 3
        client.post(f"/v1/sessions/{session}/extend", json={"ids": [9]})
        assert left(engine) == [5, 6, 7, 9]


def test_a_turn_that_fails_never_was(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        session = made(client, messages=[USER])
        engine.fail = "the network gave values that are no numbers"
        assert "no numbers" in error_of(turn(client, session), 500)
        assert shown(client, session)["messages"] == [USER] and not shown(client, session)["busy"]
        engine.fail = "again"
        text = turn(client, session, stream=True).text
        assert "again" in text and shown(client, session)["messages"] == [USER]
        assert turn(client, session).status_code == 200
        refused = turn(client, session, messages=[{"role": "tool", "content": "no such call", "tool_call_id": "x"}])
        assert error_of(refused, 400) and shown(client, session)["num_messages"] == 2
        assert turn(client, session, messages=[USER]).status_code == 200


def test_a_deadline_that_passes_leaves_the_session_as_it_was(tmp_path):
    options = ServerOptions(state_path=str(tmp_path), deadline_s=0.2)
    with remembering(slowly, tmp_path, options=options, step_s=0.002) as (client, _, _):
        session = made(client, messages=[USER])
        assert turn(client, session).status_code == 504
        assert shown(client, session)["messages"] == [USER]


# Whose they are


def test_nobody_sees_what_is_anothers(tmp_path):
    with remembering(saying(THOUGHT), tmp_path, door=Doors()) as (client, engine, _):
        session = client.post("/v1/sessions", json={"messages": [USER]}, headers=as_("ann")).json()["id"]
        assert list(engine.salts.values()) == ["salt of ann"]
        client.post(f"/v1/sessions/{session}/save", headers=as_("ann"))
        nobodys = f"sess_{'0' * 32}"
        for method, path, body in (*routes_on(session), ("GET", f"/v1/sessions/{session}", None)):
            answers = [
                client.request(method, path.replace(session, name), json=body, headers=as_("bob"))
                for name in (session, nobodys)
            ]
            assert error_of(answers[0], 404) == error_of(answers[1], 404), "that it is there is not told either"
            assert client.request(method, path, json=body).status_code == 401
        assert client.get("/v1/sessions", headers=as_("bob")).json()["data"] == []
        error_of(client.get(f"/v1/sessions?after={session}", headers=as_("bob")), 404)
        assert [s["id"] for s in client.get("/v1/sessions", headers=as_("ann")).json()["data"]] == [session]


def test_sessions_need_their_scope_and_answers_that_of_answers(tmp_path):
    with remembering(saying(THOUGHT), tmp_path, door=Doors()) as (client, _, _):
        session = client.post("/v1/sessions", json={"messages": [USER]}, headers=as_("ann:sessions")).json()["id"]
        for scopes, status in (("sessions", 403), ("generate", 403), ("sessions,generate", 200)):
            reply = client.post(f"/v1/sessions/{session}/generate", json={}, headers=as_(f"ann:{scopes}"))
            assert reply.status_code == status
        assert client.get("/v1/sessions", headers=as_("ann:generate")).status_code == 403


@pytest.mark.parametrize(
    "name",
    ["x", "sess_", f"sess_{'0' * 31}", f"sess_{'0' * 33}", f"sess_{'A' * 32}", f"SESS_{'0' * 32}", "%2e%2e", "..%2f..",
     "..%2fserver.db", f"sess_{'0' * 32}.json", f"sess_{'0' * 32}%0a", f"sess_{'0' * 32}%00", "import", "a" * 5000],
)  # fmt: skip
def test_what_is_no_id_is_not_found(guarded, name):
    client, folder = guarded
    for method, path, body in routes_on(name):
        assert client.request(method, path, json=body).status_code in (400, 404, 405), (method, path)
    assert sorted(os.listdir(folder)) == ["secret"] and not os.listdir(folder / "secret" / "sessions")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    with remembering(saying(THOUGHT), folder / "secret") as (client, _, _):
        client.get("/v1/sessions")
        yield client, folder


def test_ids_cannot_be_guessed_and_names_never_reach_the_disk(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        name = "../../etc/passwd; rm -rf ~ 日本"
        ids = {made(client, name=name) for _ in range(20)}
        assert len({i[:20] for i in ids}) == 20 and all(re.fullmatch(r"sess_[0-9a-f]{32}", i) for i in ids)
        session = ids.pop()
        assert client.post(f"/v1/sessions/{session}/save").json()["name"] == name
        folder = tmp_path / "sessions"
        assert all(f.startswith(session) for f in os.listdir(folder)) and len(os.listdir(folder)) == 2
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / f"{session}.json").stat().st_mode) == 0o600


# What is asked wrongly

DEEP: list = []
for _ in range(70):
    DEEP = [DEEP]
BAD = [
    ("", {"messages": "hello"}, "messages is a list"), ("", {"messages": ["hello"]}, "messages is a list"),
    ("", {"messages": [{"content": "x"}]}, "messages[0].role is None"),
    ("", {"messages": [USER, {"role": "root"}]}, "messages[1].role is 'root'"),
    ("", {"messages": [{**USER, "x": 2**70}]}, "64 bits"), ("", {"messages": [{**USER, "x": DEEP}]}, "deep"),
    ("", {"tools": [{"x": 2**64}]}, "64 bits"), ("", {"messages": [USER], "text": "x"}, "messages and text"),
    ("", {"text": 5}, "text is int"), ("", {"ids": "x"}, "ids is a list"), ("", {"ids": [True]}, "ids is a list"),
    ("", {"ids": [9999]}, "vocabulary"), ("", {"name": "a\nb"}, "one line"), ("", {"name": "x" * 201}, "200"),
    ("", {"name": 5}, "name is text"), ("/extend", {}, "nothing was sent"),
    ("/extend", {"text": "x"}, "kind 'chat'; send messages"), ("/extend", {"messages": 5}, "messages is a list"),
    ("/rewind", {"tokens": 1}, "cut back by messages"), ("/rewind", {}, "cut back by messages"),
    ("/rewind", {"messages": 0}, "from 1"), ("/rewind", {"messages": True}, "from 1"),
    ("/rewind", {"messages": 99}, "99 messages"), ("/save", {"name": []}, "name is text"),
    ("/fork", {"name": "\x00"}, "one line"), ("/generate", {"messages": [USER], "n": 2}, "fork it for more"),
    ("/generate", {"messages": [{"role": "assistant", "content": "so", "prefix": True}]}, "whole"),
    ("/generate", {"temperature": 99}, "temperature"), ("/generate", {"stream": "yes"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "message"), BAD)
def test_what_is_asked_wrongly_is_told_and_changes_nothing(conversation, path, body, message):
    client, session = conversation
    before = client.get("/v1/sessions").json()
    url = f"/v1/sessions/{session}{path}" if path else "/v1/sessions"
    assert message in error_of(client.post(url, json=body), 400)
    assert client.get("/v1/sessions").json() == before and shown(client, session)["messages"] == [USER]


@pytest.fixture(scope="module")
def conversation(tmp_path_factory):
    with remembering(saying(THOUGHT), tmp_path_factory.mktemp("asked")) as (client, _, _):
        yield client, made(client, messages=[USER])


@pytest.mark.parametrize(
    ("body", "message"),
    [({"n": 2}, "n is 2"), ({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"),
     ({"prompt": ["a", "b"]}, "one prompt"),
     ({"max_tokens": 0}, "at least one token"), ({"prompt": [99999]}, "99999"), ({"top_p": 7}, "top_p")],
)  # fmt: skip
def test_a_text_takes_no_more_than_one_prompt_and_one_answer(tmp_path, body, message):
    with remembering(saying("x"), tmp_path) as (client, _, _):
        session = made(client, ids=[5])
        assert message in error_of(turn(client, session, **body), 400)
        assert "cut back by tokens" in error_of(
            client.post(f"/v1/sessions/{session}/rewind", json={"messages": 1}), 400
        )
        assert shown(client, session)["tokens"] == 1 and not shown(client, session)["busy"]


def test_half_a_surrogate_pair_is_kept_as_what_it_can_be(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        body = b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}'
        session = client.post("/v1/sessions", content=body, headers={"content-type": "application/json"}).json()["id"]
        assert shown(client, session)["messages"][0]["content"] == "a?b"
        assert turn(client, session).status_code == 200
        assert client.post(f"/v1/sessions/{session}/save").status_code == 200


def test_sessions_are_listed_page_by_page(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        assert client.get("/v1/sessions").json() == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
        }  # fmt: skip
        ids = {made(client) for _ in range(7)}
        found, after, pages = [], "", 0
        while True:
            page = client.get(f"/v1/sessions?limit=3{after}").json()
            found += [s["id"] for s in page["data"]]
            pages += 1
            assert (page["first_id"], page["last_id"]) == (found[-len(page["data"])], found[-1])
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert pages == 3 and set(found) == ids and len(found) == 7
        for limit in ("0", "101", "x", "-1", "9" * 30, "²"):
            assert "from 1 to 100" in error_of(client.get("/v1/sessions", params={"limit": limit}), 400)


def test_a_turn_has_one_line_in_the_ledger_whatever_becomes_of_it(tmp_path):
    lines = []

    class Ledger(OpenDoor):
        async def enter(self, caller, request, prompt_tokens, max_tokens):
            ticket = await super().enter(caller, request, prompt_tokens, max_tokens)

            async def settle(entry):
                lines.append(entry)

            ticket.settle = settle
            return ticket

    with remembering(saying(THOUGHT), tmp_path, door=Ledger()) as (client, engine, _):
        session = made(client, messages=[USER])
        reply = turn(client, session)
        engine.fail = "no"
        turn(client, session, messages=[USER])
    assert [e.status for e in lines] == ["stop", "error"]
    assert lines[0].path == "/v1/sessions/{id}/generate" and lines[0].mode == "high"
    assert lines[0].request == reply.json()["id"]
    assert lines[0].usage.prompt_tokens == reply.json()["usage"]["prompt_tokens"]
