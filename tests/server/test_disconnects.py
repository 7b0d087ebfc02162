"""Clients that leave, and requests whose time is over: the work stops, and what they held is given back once."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest

from pyrosome.engine.loaded import open_engine
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.caller import Entry, OpenDoor
from pyrosome.server.service import Service
from tests.server.books import Ticket
from tests.server.scripted import MODEL, events_of, running, saying, until
from tests.server.wires import BODY, CHAT, Wire, Wired, post, wired

STREAM = {**BODY, "stream": True}
ENDLESS = saying("</think>" + "and so on " * 5000)
HI = saying("</think>hi")
MESSAGES = "/v1/messages"
CLAUDE = {"max_tokens": 50, **STREAM}
RESPONSES = "/v1/responses"
INPUT = {"input": "? falcon", "stream": True}


class Books(OpenDoor):
    """Writes down who came in and what was settled.

    Attributes:
        slow_s: how long it takes to come in, and to settle.
    """

    def __init__(self, slow_s: float = 0.0) -> None:
        self.slow_s = slow_s
        self.entered: list[str] = []
        self.begun: list[str] = []
        self.lines: list[tuple[str, str]] = []
        self.entries: list[Entry] = []

    async def enter(self, caller, request, prompt_tokens, max_tokens):
        await asyncio.sleep(self.slow_s)
        self.entered.append(request)
        return Ticket(self.settle)

    async def settle(self, entry):
        self.begun.append(entry.request)
        await asyncio.sleep(self.slow_s)
        self.lines.append((entry.request, entry.status))
        self.entries.append(entry)


def all_is_given_back(server: Wired, books: Books) -> None:
    """Nothing is held any more, and every request that came in has one line."""
    until(lambda: server.service.gate.num_inside == 0 and not server.service.exchanges)
    until(lambda: len(books.lines) == len(books.entered))
    until(lambda: not server.engine.has_work)
    assert sorted(r for r, _ in books.lines) == sorted(books.entered) == sorted(set(books.begun))
    assert len(books.begun) == len(books.lines)


WHEN = {
    "queued": {"prompt_steps": 10**6, "step_s": 0.002},
    "in its prompt": {"prompt_steps": 10**6, "step_s": 0.002},
    "between tokens": {"step_s": 0.002},
}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("when", WHEN)
def test_srv_01_a_client_that_leaves_ends_its_work_and_nobody_elses(when, stream):
    books = Books()
    options = EngineOptions(max_sequences=1)
    with wired(ENDLESS, door=books, engine_options=options, **WHEN[when]) as server:
        others = server.wire().send(post(STREAM))
        until(lambda: len(server.engine.requests) == 1)
        wire = server.wire().send(post({**BODY, "stream": stream, "max_tokens": 4000}))
        until(lambda: len(server.engine.requests) == 2)
        left = server.engine.requests[1].id
        if when == "between tokens":
            until(lambda: server.service.exchanges[left].has_begun)
        steps = server.engine.steps
        wire.close()
        until(lambda: server.engine.aborted)
        assert server.engine.aborted == [left]
        assert server.engine.steps - steps < 400, "within a step and the time a connection's end takes"
        until(lambda: len(server.service.exchanges) == 1)
        assert books.lines == [(left, "abort")]
        assert others.until(b"\r\n").startswith(b"HTTP/1.1 200")
        others.close()
        all_is_given_back(server, books)


def test_srv_02_clients_that_leave_the_queue_are_never_computed():
    """By the real engine, which has a queue."""
    engine = {"cache_bytes": 32 << 20, "max_sequences": 1}
    service = Service(
        MODEL, None, EngineOptions(**engine), make_driver=lambda: EngineThread(lambda: open_engine(MODEL, **engine))
    )
    with running(service) as url:
        port = int(url.rpartition(":")[2])
        long = {**BODY, "max_tokens": 600, "ignore_eos": True, "thinking": {"type": "disabled"}}
        with Wire(port) as first:
            first.send(post({**long, "stream": True}))
            until(lambda: service.exchanges and all(e.has_begun for e in list(service.exchanges.values())))
            wires = [Wire(port).send(post(long)) for _ in range(10)]
            until(lambda: len(service.exchanges) == 11 and stats(service).waiting == 10)
            for wire in wires:
                wire.close()
            until(lambda: stats(service).waiting == 0)
            seen = stats(service)
            assert seen.ended_by_reason == {"abort": 10}
            assert sum(seen.lookups_by_limit.values()) == 1, "none of them was let into the cache"
        until(lambda: not service.exchanges and service.gate.num_inside == 0)


def stats(service):
    return service.driver.call("stats")


def test_a_client_that_has_left_before_its_prompt_was_rendered_is_not_taken(monkeypatch):
    books = Books()
    with wired(HI, door=books) as server:
        render, may_go_on = server.service.chat.render, threading.Event()

        def slowly(*arguments):
            may_go_on.wait(20)
            return render(*arguments)

        monkeypatch.setattr(server.service.chat, "render", slowly)
        wire = server.wire().send(post())
        until(lambda: server.connections and server.connections[0].state == "busy")
        wire.close()
        until(lambda: not server.connections)
        may_go_on.set()
        assert server.ask(post())[0] == 200
        assert len(books.entered) == len(server.engine.requests) == 1


def test_srv_03_who_is_cancelled_is_told_by_its_id_and_the_others_tokens_stay_as_they_are():
    with wired(ENDLESS, step_s=0.001) as server:
        one, two = (server.wire().send(post({**BODY, "max_tokens": 300})) for _ in range(2))
        until(lambda: len(server.engine.requests) == 2)
        two.close()
        until(lambda: server.engine.aborted)
        body = json.loads(one.answer()[2])
        alone = json.loads(server.ask(post({**BODY, "max_tokens": 300}))[2])
    assert body["choices"] == alone["choices"] and body["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize("slow_s", [0.0, 0.1])
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.15])
def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind(after_s, slow_s):
    """Its body read, its prompt rendered, let in, taken, answered, settled."""
    books = Books(slow_s)
    with wired(HI, door=books, step_s=0.005) as server:
        for stream in (True, False):
            for _ in range(4):
                wire = server.wire().send(post({**BODY, "stream": stream}))
                time.sleep(after_s)
                wire.close()
        server.ask(post())
        all_is_given_back(server, books)


def test_a_client_that_leaves_while_its_line_is_written_does_not_cut_it_off():
    books = Books(0.2)
    with wired(HI, door=books) as server:
        wire = server.wire().send(post(STREAM))
        until(lambda: books.begun)
        wire.close()
        all_is_given_back(server, books)
        assert [s for _, s in books.lines] == ["stop"]


def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing():
    books = Books()
    with wired(HI, door=books) as server:
        server.wire().send(post()[:-5]).close()
        assert server.ask(post())[0] == 200
        until(lambda: len(books.lines) == 1)
        assert len(server.engine.requests) == 1


def test_at_the_end_who_reads_nothing_is_not_waited_for():
    books = Books()
    with wired(ENDLESS, door=books, options=ServerOptions(drain_s=0)) as server:
        wire = server.wire(receive_bytes=4096).send(post({**STREAM, "max_tokens": 10_000}))
        until(lambda: server.connections and server.connections[0].flow and server.connections[0].flow.write_paused)
        ending = asyncio.run_coroutine_threadsafe(server.service.drain(), server.connections[0].loop)
        all_is_given_back(server, books)
        ending.result(30)
        assert wire.is_closed()


PROTOCOLS = [(CHAT, STREAM), (MESSAGES, CLAUDE), (RESPONSES, INPUT)]


def said_in(event):
    """What an event of any of the protocols adds to the answer."""
    if "choices" in event:
        return event["choices"][0]["delta"].get("content")
    delta = event.get("delta")
    return delta.get("text") if isinstance(delta, dict) else delta


@pytest.mark.parametrize(("path", "body"), PROTOCOLS)
def test_srv_04_a_long_prompt_tells_how_far_it_is_by_events_of_the_protocol(path, body):
    with wired(HI, options=ServerOptions(keep_alive_s=0.05), prompt_steps=40, step_s=0.01) as server:
        status, _, text = server.ask(post(body, path))
    assert status == 200
    events = events_of(text.decode())
    said = next(i for i, (_, data) in enumerate(events) if said_in(json.loads(data)))
    assert said > 4, "something that is no comment comes while the prompt is computed"


def test_a_whole_answer_that_takes_long_begins_with_blank_lines():
    with wired(HI, options=ServerOptions(keep_alive_s=0.05), prompt_steps=40, step_s=0.01) as server:
        status, _, text = server.ask(post())
    assert status == 200 and text.startswith(b"\n\n")
    assert json.loads(text)["choices"][0]["message"]["content"] == "hi"


@pytest.mark.parametrize("ours", [True, False], ids=["the server's", "the client's"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_request_ends_when_its_time_is_over(ours, stream):
    books = Books()
    options = ServerOptions(deadline_s=0.3 if ours else 0)
    asked = post({**BODY, "stream": stream}, CHAT, *(() if ours else ("X-Request-Deadline: 0.3",)))
    with wired(ENDLESS, door=books, options=options, step_s=0.01) as server:
        status, _, text = server.ask(asked)
        all_is_given_back(server, books)
        assert server.engine.aborted and books.lines[0][1] == "abort"  # what was said is paid for
    if stream:
        assert status == 200
        last = events_of(text.decode())[-2:]
        assert json.loads(last[0][1])["error"]["code"] == "timeout" and last[1][1] == "[DONE]"
    else:
        assert status == 504
    assert b"the 0.3 s this request may take are over" in text


def test_time_that_passes_before_the_engine_takes_it_counts():
    books = Books()
    with wired(HI, door=books) as server:
        server.engine.hold.set()
        first = server.wire().send(post())
        until(lambda: len(server.service.exchanges) == 1)
        status, _, text = server.ask(post(BODY, CHAT, "X-Request-Deadline: 0.2"))
        assert status == 504 and b"it had not begun" in text
        server.engine.hold.clear()
        assert first.answer()[0] == 200
        all_is_given_back(server, books)


def test_srv_04_who_cannot_be_in_time_is_told_at_once():
    books = Books()
    with wired(HI, door=books) as server:
        pace = server.service.pace
        status, headers, _ = server.ask(post(BODY, CHAT, "X-Request-Deadline: 60"))
        assert status == 200 and "x-pyrosome-first-token-estimate-ms" not in headers, "nothing was measured yet"
        pace._rates.clear()
        pace._reused.clear()
        pace.computed(100, 0, 100.0)
        began = time.monotonic()
        status, _, text = server.ask(post(BODY, CHAT, "X-Request-Deadline: 2"))
        assert status == 504 and b"are not computed yet" in text
        assert time.monotonic() - began < 2
        status, headers, _ = server.ask(post(BODY, CHAT, "X-Request-Deadline: 60"))
        assert status == 200 and 2000 < int(headers["x-pyrosome-first-token-estimate-ms"]) < 60_000
        assert len(books.lines) == 2, "who was not let in has no line"


def test_srv_04_what_is_cached_does_not_count(nano):
    """By the real engine, which knows its prefixes."""
    pace = nano.service.pace
    asked = {**BODY, "max_tokens": 1, "messages": [{"role": "user", "content": "falcon 37 ; " * 200}]}
    other = {**asked, "messages": [{"role": "user", "content": "other " * 800}]}
    first = nano.post(CHAT, json=asked).json()["usage"]["prompt_tokens"]
    pace._rates.clear()
    pace.computed(1000, 0, 1000.0)
    in_time = {"X-Request-Deadline": str(first // 2)}
    assert nano.post(CHAT, json=other, headers=in_time).status_code == 504
    again = nano.post(CHAT, json=asked, headers=in_time)
    assert again.status_code == 200
    assert again.json()["usage"]["prompt_cache_hit_tokens"] > first // 2
    pace._rates.clear()


def test_srv_04_who_could_be_in_time_alone_is_told_to_come_again():
    with wired(HI, prompt_steps=10**6, step_s=0.002) as server:
        others = [server.wire().send(post(STREAM)) for _ in range(3)]
        until(lambda: len(server.engine.requests) == 3)
        server.service.pace.computed(10, 0, 10.0)
        tokens = len(server.engine.requests[0].ids)
        status, headers, text = server.ask(post(BODY, CHAT, f"X-Request-Deadline: {tokens * 2}"))
        assert status == 429 and b"others are before it" in text
        assert int(headers["retry-after"]) >= 1
        for wire in others:
            wire.close()


def test_the_queue_is_full_and_says_when_to_come():
    options, places = ServerOptions(max_queue=2), EngineOptions(max_sequences=1)
    with wired(HI, options=options, engine_options=places) as server:
        server.engine.hold.set()
        waiting = [server.wire().send(post()) for _ in range(3)]
        until(lambda: server.service.gate.num_inside == 3)
        answers: list[tuple[int, dict[str, str], bytes]] = []
        threads = [threading.Thread(target=lambda: answers.append(server.ask(post()))) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {a[0] for a in answers} == {429}
        assert all(int(a[1]["retry-after"]) >= 1 for a in answers)
        server.engine.hold.clear()
        assert [wire.answer()[0] for wire in waiting] == [200] * 3
        assert server.ask(post())[0] == 200
