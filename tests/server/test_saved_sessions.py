"""Saved sessions: how many there may be, what outlives what, and what is damaged on disk."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from pyrosome.engine import wire
from pyrosome.errors import SessionBusy, UnknownSession
from pyrosome.server import open_sessions
from pyrosome.server.open_sessions import Limits
from tests.server.remembering import THOUGHT, TOOLS, USER, Doors, as_, error_of, left, made, remembering, shown, turn
from tests.server.scripted import saying

# Limits


def limited(monkeypatch, **limits) -> None:
    monkeypatch.setattr(open_sessions, "Limits", lambda: Limits(**limits))


def test_so_many_are_open_and_those_that_are_saved_make_room(tmp_path, monkeypatch):
    limited(monkeypatch, open_each=3)
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        a, b, c = (made(client, messages=[USER]) for _ in range(3))
        for name, full in (("/v1/sessions", {}), (f"/v1/sessions/{a}/fork", {})):
            message = error_of(client.post(name, json=full), 429)
            assert "3 sessions are open" in message and "save or delete one" in message
        turn(client, a)
        turn(client, b)
        client.post(f"/v1/sessions/{b}/save")
        client.post(f"/v1/sessions/{a}/save")
        d = made(client)  # b was used before a
        status = {s["id"]: s["status"] for s in client.get("/v1/sessions").json()["data"]}
        assert status == {a: "open", b: "saved", c: "open", d: "open"} and len(engine.sessions) == 3
        assert turn(client, b, messages=[USER]).status_code == 200  # and comes back in a's place
        status = {s["id"]: s["status"] for s in client.get("/v1/sessions").json()["data"]}
        assert status == {a: "saved", b: "open", c: "open", d: "open"} and len(engine.sessions) == 3
        client.delete(f"/v1/sessions/{c}")
        made(client)


def test_sessions_take_so_much_memory_and_no_more(tmp_path, monkeypatch):
    limited(monkeypatch, open_bytes_each=10_000)
    large, small = {"role": "user", "content": "x" * 4000}, {"role": "user", "content": "x"}
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        a, b = made(client, messages=[large]), made(client, messages=[large])
        assert "of at most 64 and 10,000" in error_of(client.post("/v1/sessions", json={"messages": [large]}), 429)
        error_of(client.post("/v1/sessions", json={"ids": [5] * 50}), 429)  # 40 bytes each
        error_of(client.post(f"/v1/sessions/{a}/extend", json={"messages": [large]}), 429)
        error_of(turn(client, a, messages=[large]), 429)
        text = made(client, ids=[5] * 5)
        error_of(client.post(f"/v1/sessions/{text}/extend", json={"ids": [5] * 50}), 429)
        assert shown(client, text)["tokens"] == 5 and shown(client, a)["messages"] == [large]
        error_of(client.post(f"/v1/sessions/{a}/fork"), 429)
        assert len(engine.sessions) == 3
        client.post(f"/v1/sessions/{b}/save")
        assert client.post(f"/v1/sessions/{a}/extend", json={"messages": [small]}).status_code == 200
        assert client.post(f"/v1/sessions/{a}/extend", json={"messages": [large]}).status_code == 200
        assert shown(client, b)["status"] == "saved" and len(engine.sessions) == 2
        client.post(f"/v1/sessions/{a}/rewind", json={"messages": 1})
        assert shown(client, b)["messages"] == [large] and turn(client, b).status_code == 200


def test_one_account_does_not_take_anothers_places(tmp_path, monkeypatch):
    limited(monkeypatch, open_each=2, open_all=3, saved_each=1)
    with remembering(saying(THOUGHT), tmp_path, door=Doors()) as (client, _, _):

        def create(name):
            return client.post("/v1/sessions", json={}, headers=as_(name))

        ids = [create("ann").json()["id"] for _ in range(2)]
        error_of(create("ann"), 429)
        assert create("bob").status_code == 200
        error_of(create("bob"), 429)  # three are all
        client.post(f"/v1/sessions/{ids[0]}/save", headers=as_("ann"))
        client.post(f"/v1/sessions/{ids[0]}/save", headers=as_("ann"))  # the same again is no second one
        message = error_of(client.post(f"/v1/sessions/{ids[1]}/save", headers=as_("ann")), 429)
        assert "1 sessions are saved" in message and "delete some" in message
        assert create("cat").status_code == 200  # ann's saved one made room


def test_an_account_may_keep_so_many_bytes(tmp_path, monkeypatch):
    limited(monkeypatch, disk_bytes_each=3000)
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        large = {"role": "user", "content": "x" * 2500}
        a, b = made(client, messages=[large]), made(client, messages=[large])
        assert client.post(f"/v1/sessions/{a}/save").status_code == 200
        for _ in range(2):  # what was there counts no more once another takes its place
            assert client.post(f"/v1/sessions/{a}/save").status_code == 200
        assert "3,000 are an account's" in error_of(client.post(f"/v1/sessions/{b}/save"), 429)
        assert len(os.listdir(tmp_path / "sessions")) == 2 and shown(client, b)["bytes"] == 0
        client.delete(f"/v1/sessions/{a}")
        assert client.post(f"/v1/sessions/{b}/save").status_code == 200


def test_what_takes_the_place_of_the_last_bytes_is_taken(tmp_path, monkeypatch):
    with remembering(saying(THOUGHT), tmp_path / "unlimited") as (client, _, _):
        size = client.post(f"/v1/sessions/{made(client, messages=[USER])}/save").json()["bytes"]
    limited(monkeypatch, disk_bytes_each=size)
    with remembering(saying(THOUGHT), tmp_path / "limited") as (client, _, _):
        session = made(client, messages=[USER])
        for _ in range(2):
            assert client.post(f"/v1/sessions/{session}/save").json()["bytes"] == size


def test_a_conversation_that_could_not_be_kept_is_not_begun(tmp_path, monkeypatch):
    limited(monkeypatch, conversation_bytes=2000)
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        large = [{"role": "user", "content": "x" * 2000}]
        error_of(client.post("/v1/sessions", json={"messages": large}), 413)
        session = made(client)
        error_of(client.post(f"/v1/sessions/{session}/extend", json={"messages": large}), 413)
        error_of(turn(client, session, messages=large), 413)
        assert shown(client, session)["messages"] == [] and len(engine.sessions) == 1
        assert turn(client, session, messages=[USER]).status_code == 200


# What outlives what


def test_a_server_that_comes_back_has_what_was_saved_and_nothing_else(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        kept, lost = made(client, messages=[USER], name="kept", tools=TOOLS), made(client, messages=[USER])
        turn(client, kept)
        about = client.post(f"/v1/sessions/{kept}/save", json={"name": "kept well"}).json()
        assert about["bytes"] > 0 and about["saved"] and about["changed"] is False
        before = shown(client, kept)
        turn(client, kept, messages=[USER])
        assert shown(client, kept)["changed"] is True
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, service):
        assert [s["id"] for s in client.get("/v1/sessions").json()["data"]] == [kept]
        error_of(client.get(f"/v1/sessions/{lost}"), 404)
        after = shown(client, kept)
        assert not engine.sessions, "it is opened when it is first used"
        assert after["messages"] == before["messages"] and after["settings"] == {"tools": TOOLS}
        assert (after["name"], after["status"], after["tokens"]) == ("kept well", "saved", before["tokens"])
        assert turn(client, kept, messages=[USER]).status_code == 200
        prompt = service.chat.render({"messages": shown(client, kept)["messages"][:3], "tools": TOOLS}).ids
        assert tuple(left(engine)[: len(prompt)]) == prompt
        assert len(engine.requests[-1].ids) < len(prompt) // 2, "and goes on from what was computed"
        assert client.delete(f"/v1/sessions/{kept}").json() == {
            "id": kept, "object": "session.deleted", "deleted": True,
        }  # fmt: skip
        assert not os.listdir(tmp_path / "sessions") and not engine.sessions
        error_of(client.get(f"/v1/sessions/{kept}"), 404)


def test_what_was_open_in_an_engine_that_ended_is_gone_unless_it_was_saved(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        unsaved, saved, changed = (made(client, messages=[USER]) for _ in range(3))
        for session in (saved, changed):
            turn(client, session)
            client.post(f"/v1/sessions/{session}/save")
        turn(client, changed, messages=[USER])
        engine.forget()
        assert turn(client, saved, messages=[USER]).status_code == 200, "nothing of it was lost"
        assert shown(client, saved)["num_messages"] == 4
        message = error_of(turn(client, unsaved), 410)
        assert "never saved" in message and "create another" in message
        error_of(turn(client, unsaved), 404)
        message = error_of(turn(client, changed, messages=[USER]), 410)
        assert "with 2 messages" in message and "send again what came after" in message
        assert turn(client, changed, messages=[USER]).status_code == 200
        assert shown(client, changed)["num_messages"] == 4


def test_what_the_engines_process_says_of_a_session_is_understood_here():
    for kind in (UnknownSession, SessionBusy):
        assert type(wire.error_of(wire.failure_of(kind("x")))) is kind


@pytest.mark.parametrize("what", ["extend", "fork", "save", "export", "rewind"])
def test_a_lost_session_is_told_whatever_is_asked_of_it(tmp_path, what):
    with remembering(saying("x"), tmp_path) as (client, engine, _):
        session = made(client, ids=[5, 6])
        engine.forget()
        path, body = f"/v1/sessions/{session}/{what}", {"extend": {"ids": [7]}, "rewind": {"tokens": 1}}.get(what)
        error_of(client.request("GET" if what == "export" else "POST", path, json=body), 410)
        error_of(client.get(f"/v1/sessions/{session}"), 404)
        assert not os.listdir(tmp_path / "sessions")


def test_an_engine_that_ends_under_a_turn_leaves_the_saved_session_as_it_was(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, engine, _):
        session = made(client, messages=[USER])
        client.post(f"/v1/sessions/{session}/save")
        engine.hold.set()
        with client.stream("POST", f"/v1/sessions/{session}/generate", json={"stream": True}) as reply:
            pieces = reply.iter_bytes()
            next(pieces)
            engine.forget()
            engine.fail = "the engine process ended"
            engine.hold.clear()
            assert b"ended" in b"".join(pieces)
        assert turn(client, session).status_code == 200 and shown(client, session)["num_messages"] == 2


# The page about them

PAGE = (Path(__file__).parents[2] / "docs" / "sessions.md").read_text()


def test_the_page_has_every_route_and_the_limits_as_they_are(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        found = client.get("/openapi.json").json()["paths"]
    routes = {f"{m.upper()} {path}" for path, methods in found.items() if "/sessions" in path for m in methods}
    assert set(re.findall(r"^\| `([A-Z]+ /v1/sessions\S*)`", PAGE, re.M)) == routes and len(routes) == 11
    limits = Limits()
    assert f"| {limits.open_each} / {limits.open_all} |" in PAGE
    assert f"| {limits.saved_each:,} sessions, {limits.disk_bytes_each >> 30} GiB |" in PAGE
    assert f"of an account | {limits.transfers_each} |" in PAGE
    assert f"| {limits.open_bytes_each >> 20} MiB / {limits.open_bytes_all >> 30} GiB |" in PAGE
    assert f"| {limits.conversation_bytes >> 20} MiB |" in PAGE


# Damage


def test_what_is_damaged_on_disk_is_marked_and_harms_nothing_else(tmp_path):
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        ids = [made(client, messages=[USER], name=str(n)) for n in range(6)]
        for session in ids:
            client.post(f"/v1/sessions/{session}/save")
    whole, short, gone, broken, foreign, illegible = ids
    folder = tmp_path / "sessions"

    def file_of(session: str):
        return next(folder.glob(f"{session}.*.session"))

    file_of(short).write_bytes(file_of(short).read_bytes()[:-1])
    file_of(gone).unlink()
    file_of(broken).write_bytes(b"x" * file_of(broken).stat().st_size)
    record = json.loads((folder / f"{foreign}.json").read_bytes())
    record["record"]["fingerprint"] = "0" * 64
    (folder / f"{foreign}.json").write_text(json.dumps(record))
    (folder / f"{illegible}.json").write_bytes(b'{"version": 1, "rec')
    (folder / f"sess_{'1' * 32}.json").write_text(json.dumps(record))  # another's record under its name
    record["record"]["file"] = "../../secret"
    (folder / f"{foreign[:-1]}x.json").write_text(json.dumps(record))
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        found = {s["id"]: (s["status"], s.get("fault", "")) for s in client.get("/v1/sessions").json()["data"]}
        assert found.keys() == {whole, short, gone, broken, foreign}
        assert found[whole] == ("saved", "") and found[broken] == ("saved", ""), "a file is not read to be listed"
        for session, fault in (
            (short, "bytes and"), (gone, "gone"), (foreign, "another model"), (broken, "header of the session file"),
        ):  # fmt: skip
            message = error_of(turn(client, session), 409)
            assert fault in message and "delete it" in message and str(tmp_path) not in message
            about = shown(client, session)
            assert about["status"] == "unusable" and fault in about["fault"] and about["messages"] == [USER]
        assert turn(client, whole).status_code == 200
        for session in (short, gone, broken, foreign):
            assert client.delete(f"/v1/sessions/{session}").status_code == 200
        assert {f.name.split(".")[0] for f in folder.iterdir()} >= {whole, illegible}, "what cannot be read is kept"
        assert error_of(client.get(f"/v1/sessions/{illegible}"), 404)


def test_a_folder_that_cannot_be_used_costs_sessions_and_nothing_else(tmp_path):
    (tmp_path / "sessions").touch()
    with remembering(saying(THOUGHT), tmp_path) as (client, _, _):
        message = error_of(client.post("/v1/sessions", json={}), 503)
        assert str(tmp_path) not in message
        assert client.post("/v1/chat/completions", json={"messages": [USER]}).status_code == 200
