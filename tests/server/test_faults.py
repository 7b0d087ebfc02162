"""What goes wrong with one request, or with the engine, costs what was in it and nothing else (SRV-07)."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading

import httpx2 as httpx
import pytest

from pyrosome.answer import ChatReader, TextReader
from pyrosome.engine.loaded import load_model
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions
from pyrosome.server import run
from pyrosome.server.service import READY, Service
from tests.server.processes import LONG, children, is_alive, served
from tests.server.scripted import MODEL, TOKENIZER, ScriptedEngine, events_of, running, saying, until
from tests.server.test_disconnects import Books, all_is_given_back
from tests.server.wires import BODY, CHAT, Wire, head, post, wired

MESSAGES, RESPONSES, COMPLETIONS = "/v1/messages", "/v1/responses", "/v1/completions"
STREAM = {**BODY, "stream": True}
LONGER = saying("</think>" + "so it is " * 100)
EACH = [
    (CHAT, BODY), (CHAT, STREAM), (COMPLETIONS, {"prompt": "a"}), (COMPLETIONS, {"prompt": "a", "stream": True}),
    (MESSAGES, {**BODY, "max_tokens": 500}), (MESSAGES, {**STREAM, "max_tokens": 500}), (RESPONSES, {"input": "a"}),
    (RESPONSES, {"input": "a", "stream": True}),
]  # fmt: skip


def failure(answer, stream):
    """The message of a request that failed: (text, its id)."""
    status, headers, body = answer
    if not stream:
        assert status == 500, body
        return json.loads(body)["error"]["message"], headers["x-request-id"]
    assert status == 200
    for _, data in reversed(events_of(body.decode())):
        if data != "[DONE]":
            event = json.loads(data)
            event = event.get("response") or event
            return event["error"]["message"], headers["x-request-id"]
    raise AssertionError(body)


def fail(engine, request_id, message):
    """Have a request fail in the next step."""
    advance = engine._advance

    def failing(name, state):
        return engine._end(state, set(state["open"]), "error", message) if name == request_id else advance(name, state)

    engine._advance = failing


@pytest.mark.parametrize(("path", "body"), EACH, ids=[f"{p} {b.get('stream', False)}" for p, b in EACH])
def test_a_request_that_fails_in_the_engine_says_so_with_its_id_and_no_other_notices(path, body):
    books = Books()
    with wired(LONGER, door=books, step_s=0.002) as server:
        other = server.wire().send(post({**BODY, "max_tokens": 150}))
        until(lambda: server.service.exchanges and next(iter(server.service.exchanges.values())).has_begun)
        failing = server.wire().send(post({"max_tokens": 400, **body}, path))
        until(lambda: len(server.engine.requests) == 2)
        fail(server.engine, server.engine.requests[1].id, "the numbers are not finite")
        message, request_id = failure(failing.answer(), body.get("stream"))
        assert "the numbers are not finite" in message and request_id in message
        status, _, text = other.answer()
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 150
        all_is_given_back(server, books)
        assert sorted(s for _, s in books.lines) == ["error", "length"]


@pytest.mark.parametrize(("path", "body"), EACH, ids=[f"{p} {b.get('stream', False)}" for p, b in EACH])
def test_a_reader_that_breaks_costs_its_own_request_and_its_line_has_what_was_computed(path, body, monkeypatch, caplog):
    books = Books()
    target = TextReader if path == COMPLETIONS else ChatReader
    feed, seen = target.feed, []

    def breaking(self, event):
        seen.append(event)
        return feed(self, event) if len(seen) < 4 else broken()

    def broken(*_):
        raise RuntimeError("the secret of the day")

    with wired(LONGER, door=books, step_s=0.002) as server:
        monkeypatch.setattr(target, "feed", breaking)
        monkeypatch.setattr(target, "end", broken)
        monkeypatch.setattr(target, "done", broken)
        message, request_id = failure(server.ask(post({"max_tokens": 400, **body}, path)), body.get("stream"))
        assert request_id in message and "secret" not in message
        assert request_id in caplog.text, "the log has more under that id"
        until(lambda: server.engine.aborted)
        all_is_given_back(server, books)
        assert [s for _, s in books.lines] == ["error"]
        assert books.entries[0].usage.completion_tokens == 4
        monkeypatch.undo()
        assert server.ask(post({**BODY, "max_tokens": 5}))[0] == 200


def test_a_prompt_whose_numbers_are_not_finite_fails_alone():
    """By the real model, with a row of its embedding broken."""
    model = load_model("builtin:nano", numerics="trained")
    bad = TOKENIZER.encode(" falcon")[0]
    service = Service(MODEL, None, EngineOptions(cache_bytes=32 << 20), make_driver=lambda: driver(model, bad))
    good = {"prompt": [0, *TOKENIZER.encode("one two three")], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    with running(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        alone = client.post(COMPLETIONS, json=good).json()["choices"]
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda b=b: answers.append(client.post(COMPLETIONS, json=b)))
            for b in (good, {**good, "prompt": [0, 5, bad, 6]}, good, {**good, "prompt": [bad]}, good)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(a.status_code for a in answers) == [200, 200, 200, 500, 500]
        assert all(a.json()["choices"] == alone for a in answers if a.status_code == 200)
        for answer in answers:
            if answer.status_code == 500:
                assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 200
    assert service.gate.num_inside == 0


def driver(model, bad):
    model.network.embed.value[bad] = float("nan")
    return EngineThread(lambda: model.engine(EngineOptions(cache_bytes=32 << 20)))


BAD = [
    {"guided_regex": "(["}, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}}},
    {"n": 0}, {"temperature": "hot"}, {"messages": []}, {"messages": "x"}, {"max_tokens": -1}, {"stop": [""]},
    {"seed": "x"}, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, {"stop_token_ids": ["a"]},
]  # fmt: skip


def test_a_bad_request_never_hurts_another(nano):
    good = {**BODY, "max_tokens": 40, "thinking": {"type": "disabled"}, "temperature": 0, "ignore_eos": True}
    alone = nano.post(CHAT, json=good).json()["choices"]
    answers: list[httpx.Response] = []

    def ask(body):
        answers.append(nano.post(CHAT, json=body))

    threads = [threading.Thread(target=ask, args=(good,)) for _ in range(3)]
    threads += [threading.Thread(target=ask, args=({**good, **bad},)) for bad in BAD]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by_status = sorted(a.status_code for a in answers)
    assert by_status == [200] * 3 + [400] * len(BAD), [a.text for a in answers]
    assert all(a.json()["choices"] == alone for a in answers if a.status_code == 200)
    until(lambda: nano.service.gate.num_inside == 0)


def test_an_engine_that_is_gone_for_good_is_told_and_ends_the_process(monkeypatch):
    monkeypatch.setattr(run, "close_all", lambda: None)  # other tests have engines in this process
    service = Service(MODEL, None, None, make_driver=lambda: EngineThread(ScriptedEngine(LONGER)))
    server = run.Server(run.config_of(service, host="127.0.0.1", port=0), service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started and service.state == READY)
    service.driver.over = "it died four times"
    thread.join(LONG)
    assert not thread.is_alive()
    assert server.failure == "it died four times"


def test_health_tells_whether_it_is_ready_and_whether_it_will_ever_be():
    with wired(LONGER) as server:
        driver = server.service.driver

        def told(path):
            status, _, body = server.ask(head(f"GET {path} HTTP/1.1"))
            return status, json.loads(body)["status"]

        assert told("/health") == (200, "ready") and told("/health/live") == (200, "ready")
        driver.is_up = False
        assert told("/health") == (503, "restarting") and told("/health/live") == (200, "restarting")
        status, headers, body = server.ask(post())
        assert status == 503 and headers["retry-after"] and b"is started again" in body
        driver.over = "it died four times"
        assert told("/health") == (503, "failed") and told("/health/live") == (503, "failed")
        assert b"it died four times" in server.ask(post())[2]
        driver.is_up, driver.over = True, ""
        assert told("/health") == (200, "ready")
        assert server.ask(post())[0] == 200


ENDLESS = {**STREAM, "max_tokens": 100_000, "ignore_eos": True, "thinking": {"type": "disabled"}}


def test_an_engine_that_is_killed_under_load_costs_what_was_in_it_and_comes_back(tmp_path):
    with served(state=tmp_path) as server, server.client() as client:
        wires = [Wire(server.port).send(post(ENDLESS)) for _ in range(4)]
        whole = Wire(server.port).send(post({**ENDLESS, "stream": False}))
        for wire in wires:
            wire.socket.settimeout(LONG)
            wire.until(b"content")
        first = server.engine
        os.kill(first, signal.SIGKILL)
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health/live").status_code == 200
        seen = {client.get("/health").json()["status"]}
        refused = client.post(CHAT, json=BODY)
        if refused.status_code != 200:  # else it was back by then
            assert refused.status_code == 503 and "is started again" in refused.json()["error"]["message"]
        for wire in wires:
            text = b"".join(iter(lambda w=wire: w.until(b"\n\n"), b"data: [DONE]"))
            assert b"the engine process ended (signal 9)" in text
        status, headers, body = whole.answer()
        assert status == 500 and headers["x-request-id"] in json.loads(body)["error"]["message"]
        until(lambda: client.get("/health").status_code == 200, LONG)
        assert seen <= {"restarting", "ready"}
        again = client.post(CHAT, json={**BODY, "max_tokens": 4})
        assert again.status_code == 200
        assert server.engine not in (0, first)
        assert client.get("/load").json()["server_load"] == 0
        for wire in (*wires, whole):
            wire.close()


def test_a_server_that_is_killed_under_load_has_lost_nothing_it_promised_and_bills_nothing_twice(tmp_path):
    flags = ("--keys", "required")
    key = keys("create", "load", "--state", str(tmp_path)).strip().splitlines()[-1].split()[-1]
    answered: list[str] = []
    with served(*flags, state=tmp_path) as server, server.client(headers={"Authorization": f"Bearer {key}"}) as client:
        opened = client.post("/v1/sessions", json={**BODY, "thinking": {"type": "disabled"}}).json()
        told = client.post(f"/v1/sessions/{opened['id']}/generate", json={"messages": [], "max_tokens": 5})
        assert told.status_code == 200, told.text
        answered.append(told.headers["x-request-id"])
        saved = client.post(f"/v1/sessions/{opened['id']}/save", json={"name": "kept"})
        assert saved.status_code == 200, saved.text
        tokens = saved.json()["tokens"]
        stop = threading.Event()
        threads = [threading.Thread(target=keep_asking, args=(client, stop, answered)) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: len(answered) > 40, LONG)
        engines = children(server.pid)
        server.signal(signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join(LONG)
        server.process.wait(LONG)
        until(lambda: not any(map(is_alive, engines)))
    lines = ledger(tmp_path)
    ids = [line["request"] for line in lines]
    assert len(ids) == len(set(ids)), "billed twice"
    assert set(answered) <= set(ids), "answered and not written down"
    with served(*flags, state=tmp_path) as server, server.client(headers={"Authorization": f"Bearer {key}"}) as client:
        assert client.get("/v1/models").status_code == 200
        sessions = client.get("/v1/sessions").json()["data"]
        assert [(s["id"], s["tokens"]) for s in sessions] == [(opened["id"], tokens)]
        more = client.post(f"/v1/sessions/{opened['id']}/generate", json={**BODY, "max_tokens": 3})
        assert more.status_code == 200, more.text
        assert more.json()["usage"]["prompt_cache_hit_tokens"] > 0 or tokens < 128
        again = client.post(CHAT, json={**BODY, "max_tokens": 3})
        assert again.headers["x-request-id"] not in ids
    after = [line["request"] for line in ledger(tmp_path)]
    assert sorted(after) == sorted([*ids, more.headers["x-request-id"], again.headers["x-request-id"]])


def keep_asking(client, stop, answered):
    """Short requests one after the other; the ids of those whose answer came whole."""
    n = 0
    while not stop.is_set():
        n += 1
        body = {**BODY, "max_tokens": 1 + n % 7, "stream": n % 2 == 0, "ignore_eos": True}
        with contextlib.suppress(httpx.HTTPError):
            answer = client.post(CHAT, json=body)
            if answer.status_code == 200 and (not body["stream"] or answer.text.rstrip().endswith("[DONE]")):
                answered.append(answer.headers["x-request-id"])


def keys(*arguments):
    command = [sys.executable, "-m", "pyrosome", "keys", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=True).stdout


def ledger(state):
    return list(csv.DictReader(io.StringIO(keys("export", "--state", str(state)))))
