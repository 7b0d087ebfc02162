"""Session files over the real engine: what comes back goes on as if it had never been away; nothing else gets in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import msgspec
import numpy as np
import pytest
import xxhash

from pyrosome.cache import store
from pyrosome.engine.loaded import open_engine
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server import open_sessions, session_files
from pyrosome.server.open_sessions import Limits
from pyrosome.server.service import Service, engine_process
from tests.server.remembering import Doors, as_, error_of, made, shown, turn
from tests.server.scripted import MODEL, running, until

LONG = {"role": "user", "content": "Tell me about the falcon on the tower, and what it eats in winter. " * 12}
MORE = {"role": "user", "content": "And in summer?"}
PLAIN = {"thinking": {"type": "disabled"}, "temperature": 0, "max_tokens": 12}
BINARY = {"content-type": "application/octet-stream"}


@contextlib.contextmanager
def serving(folder: Path, **options):
    """A client of a server on the built-in model, which saves below `folder`; its engine is `client.driver`."""
    made = EngineThread(lambda: open_engine(MODEL, cache_bytes=64 << 20, max_context=4096))
    options = ServerOptions(state_path=str(folder), **options)
    service = Service(MODEL, options, EngineOptions(cache_bytes=64 << 20), make_driver=lambda: made, door=Doors())
    with running(service) as url, httpx.Client(base_url=url, timeout=60, headers=as_("ann")) as client:
        client.driver, client.folder = made, folder / "sessions"
        yield client


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("real")) as client:
        yield client


@pytest.fixture(scope="module")
def exported(real) -> bytes:
    """The file of a conversation of some 200 tokens and one answer."""
    session = made(real, messages=[LONG])
    assert turn(real, session, **PLAIN).status_code == 200
    reply = real.get(f"/v1/sessions/{session}/export")
    assert reply.headers["content-disposition"] == f'attachment; filename="{session}.session"'
    assert int(reply.headers["content-length"]) == len(reply.content)
    real.delete(f"/v1/sessions/{session}")
    return reply.content


def brought(client, raw: bytes, **headers) -> httpx.Response:
    return client.post("/v1/sessions/import", content=raw, headers=BINARY | headers)


def said_by(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def cached_by(reply: httpx.Response) -> int:
    usage = reply.json()["usage"]
    hits = usage["prompt_cache_hit_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == hits
    assert hits + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    return hits


# What comes back


def test_a_session_answers_as_the_whole_conversation_would_and_computes_only_what_is_new(real):
    session, messages, known = made(real), [], 0
    for message in (LONG, MORE, LONG, MORE):
        reply = turn(real, session, messages=[message], **PLAIN)
        messages.append(message)
        assert said_by(reply) == said_by(real.post("/v1/chat/completions", json={"messages": messages, **PLAIN}))
        usage = reply.json()["usage"]
        assert cached_by(reply) == known, "all that was computed is there"
        # The last token is left to be computed; that of an end is not counted.
        is_cut = reply.json()["choices"][0]["finish_reason"] == "length"
        known = usage["prompt_tokens"] + usage["completion_tokens"] - is_cut
        messages.append({"role": "assistant", "content": said_by(reply)})
    assert [m["content"] for m in shown(real, session)["messages"]] == [m["content"] for m in messages]
    real.delete(f"/v1/sessions/{session}")


def test_an_imported_session_goes_on_as_the_exported_one_would_have(real, exported):
    first, second = (brought(real, exported).json() for _ in range(2))
    assert first["id"] != second["id"] and (first["num_messages"], first["bytes"]) == (2, len(exported))
    replies = [turn(real, s["id"], messages=[MORE], **PLAIN) for s in (first, second)]
    assert said_by(replies[0]) == said_by(replies[1])
    messages = [*shown(real, first["id"])["messages"][:2], MORE]
    whole = real.post("/v1/chat/completions", json={"messages": messages, **PLAIN})
    assert said_by(whole) == said_by(replies[0])
    assert cached_by(replies[0]) > 150
    assert real.get(f"/v1/sessions/{first['id']}/export").content != exported
    assert real.get("/v1/sessions").json()["data"][0]["kind"] == "chat"
    for s in (first, second):
        real.delete(f"/v1/sessions/{s['id']}")


def test_a_text_that_python_saved_is_a_session_too(real, tmp_path):
    session = real.driver.call("session_open", ids=[5, 6, 7])
    real.driver.call("session_save", session=session, path=str(tmp_path / "a"), notes={"messages": []})
    real.driver.call("session_close", session=session)
    found = brought(real, (tmp_path / "a").read_bytes()).json()
    assert (found["kind"], found["tokens"]) == ("text", 3)
    assert turn(real, found["id"], max_tokens=4, temperature=0).status_code == 200
    real.delete(f"/v1/sessions/{found['id']}")


SERVER = """
import sys, time
from pathlib import Path
from tests.server.test_session_files import serving
with serving(Path(sys.argv[1])) as client:
    print(client.base_url, flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def process(folder: Path):
    """A server in a process of its own, that is killed in the end; (a client of it, the process)."""
    root = Path(__file__).parents[2]
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        url = server.stdout.readline().strip()
        assert url, "the server did not start"
        with httpx.Client(base_url=url, timeout=60, headers=as_("ann")) as client:
            yield client, server
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_what_was_saved_survives_a_kill_in_the_middle_of_everything(tmp_path):
    with process(tmp_path) as (client, server):
        kept, lost = made(client, messages=[LONG], name="kept"), made(client, messages=[LONG])
        turn(client, kept, **PLAIN)
        assert client.post(f"/v1/sessions/{kept}/save").status_code == 200
        before = shown(client, kept)
        expected = client.post("/v1/chat/completions", json={"messages": [*before["messages"], MORE], **PLAIN})
        expected = said_by(expected)

        def busy(session: str) -> None:
            with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=client.base_url, headers=as_("ann")) as c:
                while True:
                    turn(c, session, messages=[MORE], **PLAIN)
                    c.post(f"/v1/sessions/{session}/save")

        crowd = [threading.Thread(target=busy, args=(made(client, messages=[LONG]),), daemon=True) for _ in range(2)]
        for thread in crowd:
            thread.start()
        time.sleep(1)
        server.send_signal(signal.SIGKILL)
        for thread in crowd:
            thread.join(30)
    with serving(tmp_path) as client:
        found = {s["id"]: s for s in client.get("/v1/sessions").json()["data"]}
        assert kept in found and lost not in found and all(s["status"] == "saved" for s in found.values())
        assert shown(client, kept)["messages"] == before["messages"]
        reply = turn(client, kept, messages=[MORE], **PLAIN)
        assert said_by(reply) == expected and cached_by(reply) > 150
        for session in found.keys() - {kept}:
            assert turn(client, session, messages=[MORE], **PLAIN).status_code == 200
    names = {f.name.split(".")[0] for f in (tmp_path / "sessions").glob("*.json")}
    assert names == found.keys()


def test_when_the_engines_process_is_killed_what_was_saved_goes_on_in_the_next_one(tmp_path):
    drivers = []

    def make():
        drivers.append(engine_process(MODEL, EngineOptions(cache_bytes=64 << 20))())
        return drivers[-1]

    def asked(session: str) -> httpx.Response:
        """The answer once there is an engine again."""
        found = []
        until(lambda: found.append(turn(client, session, messages=[MORE], **PLAIN)) or found[-1].status_code < 500)
        return found[-1]

    service = Service(MODEL, ServerOptions(state_path=str(tmp_path)), make_driver=make)
    with running(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        kept, lost = made(client, messages=[LONG]), made(client, messages=[LONG])
        turn(client, kept, **PLAIN)
        client.post(f"/v1/sessions/{kept}/save")
        expected = said_by(
            turn(client, client.post(f"/v1/sessions/{kept}/fork").json()["id"], messages=[MORE], **PLAIN)
        )
        os.kill(drivers[0].pid, signal.SIGKILL)
        reply = asked(kept)
        assert said_by(reply) == expected and cached_by(reply) > 150
        assert "never saved" in error_of(asked(lost), 410)


# What does not get in


def header_of(raw: bytes) -> dict:
    (length,) = struct.unpack_from("<Q", raw, 24)
    return msgspec.json.decode(raw[48 : 48 + length])


def forged(raw: bytes, body: bytes | None = None, ids: bytes | None = None, **changes) -> bytes:
    """A file whose header says something else, and which holds together all the same."""
    (length,) = struct.unpack_from("<Q", raw, 24)
    about = header_of(raw)
    at = -(-(48 + length) // 4096) * 4096
    old_ids, rest = raw[at : at + 4 * about["num_ids"]], raw[at + -(-4 * about["num_ids"] // 4096) * 4096 :]
    new_ids = old_ids if ids is None else ids
    about |= changes
    about["xxh3"]["ids"] = xxhash.xxh3_128_hexdigest(new_ids)
    body = msgspec.json.encode(about) if body is None else body
    head = struct.pack("<16sIIQ16s", store.MAGIC, 1, 0x01020304, len(body), xxhash.xxh3_128_digest(body)) + body
    return head + bytes(-len(head) % 4096) + new_ids + bytes(-len(new_ids) % 4096) + rest


def ids_of(raw: bytes, **places: int) -> bytes:
    about = header_of(raw)
    (length,) = struct.unpack_from("<Q", raw, 24)
    ids = np.frombuffer(raw, "<i4", about["num_ids"], -(-(48 + length) // 4096) * 4096).copy()
    for place, value in places.items():
        ids[int(place[1:])] = value
    return ids.tobytes()


def flipped(raw: bytes, at: int) -> bytes:
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def many_ids(raw: bytes, count: int) -> bytes:
    return forged(raw, ids=np.ones(count, "<i4").tobytes(), num_ids=count)


HOSTILE = {
    "nothing": (lambda raw: b"", "no saved session"),
    "noise": (lambda raw: os.urandom(9000), "no saved session"),
    "an archive": (lambda raw: b"PK\x03\x04" + bytes(9000), "no saved session"),
    "half a preamble": (lambda raw: raw[:40], "no saved session"),
    "another version": (lambda raw: raw[:16] + b"\x09" + raw[17:], "version"),
    "half a header": (lambda raw: raw[:90], "ends within its header"),
    "half the tokens": (lambda raw: raw[: 4096 + 9], "promises"),
    "all but the last byte": (lambda raw: raw[:-1], "promises"),
    "a bit of the header": (lambda raw: flipped(raw, 60), "header"),
    "a bit of the tokens": (lambda raw: flipped(raw, 4096 + 5), "damaged"),
    "a bit of the last block": (lambda raw: flipped(raw, -1), "damaged"),
    "a header of all memory": (lambda raw: raw[:24] + struct.pack("<Q", 2**62) + raw[32:], "of at most"),
    "a header of very much": (lambda raw: forged(raw, b'{"a":[' + b"0," * (9 << 20) + b"0]}"), "of at most"),
    "a header that is deep": (lambda raw: forged(raw, b'{"extra":' + b'{"a":' * 99_999), "header"),
    "tokens without end": (lambda raw: forged(raw, num_ids=2**40), "promises"),
    "blocks without end": (lambda raw: forged(raw, num_blocks=2**40), "header"),
    "a chunk of all memory": (lambda raw: forged(raw, blocks_per_chunk=2**40), "header"),
    "state without end": (
        lambda raw: forged(raw, snapshot={**header_of(raw)["snapshot"], "bytes": 2**40}), "promises",
    ),
    "blocks of another size": (lambda raw: forged(raw, block_bytes=1), "bytes of a block"),
    "more tokens than there is room for": (lambda raw: many_ids(raw, 5000), "the context holds 4096"),
    "a token beyond the vocabulary": (lambda raw: forged(raw, ids=ids_of(raw, _3=2**30)), "vocabulary"),
    "a token below zero": (lambda raw: forged(raw, ids=ids_of(raw, _9=-1)), "vocabulary"),
    "another model": (lambda raw: forged(raw, fingerprint="0" * 64), "another model"),
    "messages that are none": (lambda raw: forged(raw, extra={"messages": "x"}), "messages is a list"),
    "a role there is not": (lambda raw: forged(raw, extra={"messages": [{"role": "root"}]}), "role is 'root'"),
    "settings that are none": (lambda raw: forged(raw, extra={"messages": [], "settings": [1]}), "settings"),
    "a message of too much": (
        lambda raw: forged(raw, extra={"messages": [{"role": "user", "content": "x" * (9 << 20)}]}), "shorten it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("forge", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_and_leaves_nothing_behind(real, exported, forge, message):
    raw, before = forge(exported), state_of(real)
    reply = brought(real, raw)
    assert reply.status_code in (400, 413), reply.text
    told = reply.json()["error"]["message"]
    assert message in told and str(real.folder) not in told
    assert state_of(real) == before


def state_of(client) -> tuple:
    """What may not change: files, sessions, and what is free in the engine's cache."""
    stats = client.driver.call("stats")
    held = {r: stats.num_pages[r] - stats.free_pages[r] - stats.tree_pages[r] for r in stats.num_pages}
    return sorted(os.listdir(client.folder)), stats.sessions, held, client.get("/v1/sessions").json()


def test_a_file_says_nothing_about_where_it_goes_and_whose_it_is(real, exported):
    path, victim = str(real.folder / "x"), f"sess_{'0' * 32}"
    notes = {
        "messages": [LONG], "kind": "../../chat", "name": "../../etc/passwd", "path": path, "file": path, "id": victim,
        "account": "bob", "salt": "salt of bob", "settings": {"tools": [], "account": "bob", "path": path},
    }  # fmt: skip
    before = sorted(os.listdir(real.folder))
    reply = real.post(
        "/v1/sessions/import?name=../../../etc/cron.d/x", content=forged(exported, extra=notes),
        headers={**BINARY, "content-disposition": f'attachment; filename="{path}"', "x-session-id": victim},
    )  # fmt: skip
    found = reply.json()
    assert reply.status_code == 200 and found["id"] != victim
    assert (found["name"], found["kind"]) == ("../../../etc/cron.d/x", "chat")
    assert shown(real, found["id"])["settings"] == {"tools": []}
    new = set(os.listdir(real.folder)) - set(before)
    assert len(new) == 2 and all(name.startswith(found["id"]) for name in new)
    assert real.get("/v1/sessions", headers=as_("bob")).json()["data"] == []
    real.delete(f"/v1/sessions/{found['id']}")
    assert sorted(os.listdir(real.folder)) == before


@pytest.mark.parametrize("rows", ["noise", "no numbers"])
def test_forged_rows_are_believed_in_their_own_session_alone(real, exported, rows):
    """Whoever writes a file can say anything in it: nobody else finds its rows as a prefix, its own account neither."""
    conversation = {"messages": [LONG], **PLAIN}
    expected = said_by(real.post("/v1/chat/completions", json=conversation, headers=as_("dan")))
    about = header_of(exported)
    size = about["num_blocks"] * about["block_bytes"]
    assert size
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    blocks = noise if rows == "noise" else b"\xff" * size
    step = about["blocks_per_chunk"] * about["block_bytes"]
    sums = [xxhash.xxh3_128_hexdigest(blocks[at : at + step]) for at in range(0, size, step)]
    raw = forged(exported, xxh3={**about["xxh3"], "chunks": sums})[:-size] + blocks
    forger = as_(f"eve with {rows}")  # an account whose prefixes are not known yet
    session = real.post("/v1/sessions/import", content=raw, headers=BINARY | forger).json()["id"]
    reply = real.post(f"/v1/sessions/{session}/generate", json={"messages": [MORE], **PLAIN}, headers=forger)
    assert reply.status_code in (200, 500)
    for headers in (forger, as_("dan")):
        assert said_by(real.post("/v1/chat/completions", json=conversation, headers=headers)) == expected
    real.delete(f"/v1/sessions/{session}", headers=forger)


# How it comes


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""])
def test_a_file_is_sent_as_one(real, exported, kind):
    message = error_of(real.post("/v1/sessions/import", content=exported, headers={"content-type": kind}), 415)
    assert "Content-Type: application/octet-stream" in message


def test_a_file_is_no_larger_than_there_is_room_for_whether_it_says_so_or_not(tmp_path, exported, monkeypatch):
    monkeypatch.setattr(open_sessions, "Limits", lambda: Limits(disk_bytes_each=len(exported) + 100))
    with serving(tmp_path) as client:
        raw = exported + bytes(101)
        assert "are left to this account" in error_of(brought(client, raw), 413)
        chunked = (raw[at : at + 50_000] for at in range(0, len(raw), 50_000))
        assert client.post("/v1/sessions/import", content=chunked, headers=BINARY).status_code == 413
        assert brought(client, exported).status_code == 200
        assert "left" in error_of(brought(client, exported), 413)
        assert len(os.listdir(client.folder)) == 2


def test_a_file_is_never_held_in_memory(tmp_path, exported, monkeypatch):
    monkeypatch.setattr(session_files, "CHUNK_BYTES", 64 << 10)
    with serving(tmp_path, max_body_bytes=128 << 10) as client:  # all bodies together may have four times that
        error_of(client.post("/v1/sessions", json={"messages": [{**LONG, "content": "x" * (128 << 10)}]}), 413)
        raw = exported + bytes(2 << 20)  # what is behind a file's end means nothing
        session = brought(client, raw).json()["id"]
        assert client.get(f"/v1/sessions/{session}/export").content == raw


def test_so_many_files_are_on_their_way_at_once(tmp_path, exported, monkeypatch):
    monkeypatch.setattr(open_sessions, "Limits", lambda: Limits(transfers_each=1))
    with serving(tmp_path) as client:
        session = brought(client, exported).json()["id"]
        begun, go_on = threading.Event(), threading.Event()

        def slowly():
            yield exported[:1000]
            begun.set()
            go_on.wait(30)
            yield exported[1000:]

        with httpx.Client(base_url=client.base_url, timeout=60, headers=as_("ann")) as other:
            replies = []
            thread = threading.Thread(
                target=lambda: replies.append(other.post("/v1/sessions/import", content=slowly(), headers=BINARY))
            )
            thread.start()
            assert begun.wait(30)
            until(lambda: any(name.startswith(".import") for name in os.listdir(client.folder)))
            error_of(client.get(f"/v1/sessions/{session}/export"), 429)
            error_of(brought(client, exported), 429)
            assert client.get("/v1/sessions", headers=as_("bob")).status_code == 200
            go_on.set()
            thread.join(60)
        assert replies[0].status_code == 200
        assert client.get(f"/v1/sessions/{session}/export").content == exported


def test_a_file_that_stops_coming_is_given_up(tmp_path, exported):
    with serving(tmp_path, body_s=0.2) as client:
        stop = threading.Event()

        def stalling():
            yield exported[:5000]
            stop.wait(30)
            yield exported[5000:]

        threading.Timer(1.0, stop.set).start()
        assert "nothing for 0.2 s" in error_of(
            client.post("/v1/sessions/import", content=stalling(), headers=BINARY), 408
        )
        assert os.listdir(client.folder) == []


def test_a_download_nobody_finishes_is_closed(tmp_path, exported):
    with serving(tmp_path) as client:
        session = brought(client, exported).json()["id"]
        handles = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            with client.stream("GET", f"/v1/sessions/{session}/export") as reply:
                assert reply.status_code == 200
        assert client.get(f"/v1/sessions/{session}/export").content == exported
        deadline = time.monotonic() + 10
        while len(os.listdir("/proc/self/fd")) > handles + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= handles + 2
        assert json.loads(client.delete(f"/v1/sessions/{session}").content)["deleted"]
