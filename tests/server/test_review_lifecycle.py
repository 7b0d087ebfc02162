"""What a request holds is given back and written down, also where what it is written with fails."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from pyrosome.errors import EngineError
from pyrosome.server.caller import OpenDoor
from pyrosome.server.gate import Gate
from pyrosome.server.openai_chat import ChatShape
from pyrosome.server.replay import Replay
from tests.server.books import Ticket
from tests.server.scripted import events_of, saying, scripted, until

SAID = "what a client said"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "thinking": {"type": "disabled"}}


class Books(OpenDoor):
    """Writes down what was settled, unless it is told to fail.

    Attributes:
        lines: (status, output tokens, whether a first token came).
        fails: settling raises.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, bool]] = []
        self.fails = False

    async def enter(self, caller, request, prompt_tokens, max_tokens):
        return Ticket(self.settle)

    async def settle(self, entry):
        await asyncio.sleep(0)
        if self.fails:
            raise EngineError("the disk is full")
        self.lines.append((entry.status, entry.usage.completion_tokens, entry.first_token_ms is not None))


@pytest.fixture
def server():
    with scripted(saying("hello")) as (client, engine, service):
        service.door = Books()
        yield client, engine, service


def all_is_given_back(service) -> None:
    until(lambda: service.gate.num_inside == 0 and not service.exchanges)


@pytest.mark.parametrize("stream", [True, False])
def test_tokens_said_before_a_client_s_own_deadline_are_not_for_nothing(server, stream):
    client, engine, service = server
    engine.script, engine.step_s = saying("and so on " * 5000), 0.002
    reply = client.post(CHAT, json={**BODY, "stream": stream}, headers={"x-request-deadline": "0.5"})
    assert "the 0.5 s this request may take are over" in reply.text
    all_is_given_back(service)
    (line,) = service.door.lines
    assert line[0] == "abort" and line[1] > 0 and line[2]  # an "error" would cost nothing


def test_a_request_of_several_prompts_gives_all_places_back_where_no_line_can_be_written(server):
    client, engine, service = server
    engine.script, service.door.fails = saying("one two three"), True
    reply = client.post(TEXT, json={"prompt": ["a", "b", "c"], "max_tokens": 3})
    assert reply.status_code == 500
    all_is_given_back(service)
    service.door.fails = False
    assert client.post(TEXT, json={"prompt": ["a", "b", "c"], "max_tokens": 3}).status_code == 200


def test_an_answer_whose_beginning_cannot_be_written_ends_with_an_error(server, monkeypatch):
    client, _, service = server

    def broken(self):
        raise KeyError("x")

    monkeypatch.setattr(ChatShape, "begin", broken)
    reply = client.post(CHAT, json={**BODY, "stream": True})
    assert [data for _, data in events_of(reply.text)][-1] == "[DONE]" and "an error of the server" in reply.text
    all_is_given_back(service)
    until(lambda: service.door.lines)  # it is written behind the answer
    assert [status for status, _, _ in service.door.lines] == ["error"]


def test_what_was_refused_at_once_says_nothing_of_how_long_a_place_is_taken(server):
    client, _, service = server
    for _ in range(3):
        assert client.post(CHAT, json=BODY).status_code == 200
    engine_refuses = {**BODY, "guided_regex": "a"}
    client.post(CHAT, json=engine_refuses)
    gate, taken = service.gate, 4
    until(lambda: len(gate._took) == taken)  # a place is given back behind the answer
    for _ in range(10):
        assert client.post(CHAT, json=BODY, headers={"x-request-deadline": "0.000001"}).status_code == 504
    all_is_given_back(service)
    assert len(gate._took) == taken


def test_a_place_that_was_not_used_shortens_no_estimate():
    gate = Gate(1, 8)
    gate.enter()
    gate.leave(10.0)
    gate.enter()
    gate.leave(None)
    gate.enter()
    gate.enter()
    assert gate.wait_s() == 10.0


def test_a_turn_that_is_long_remembered_holds_the_next_request_up_and_does_not_fail_it(server, monkeypatch):
    client, _, _ = server
    going_on = threading.Event()
    learn = Replay._learn

    def slow(self, *arguments):
        going_on.wait(30)
        return learn(self, *arguments)

    monkeypatch.setattr(Replay, "_learn", slow)
    monkeypatch.setattr("pyrosome.server.replay.LONGEST_LEARN_S", 0.05)
    try:
        for _ in range(3):
            reply = client.post(CHAT, json=BODY)
            assert reply.status_code == 200, reply.text
    finally:
        going_on.set()


def test_short_turns_are_bounded_in_number(server):
    _, _, service = server
    replay = Replay(service.chat, max_turns=3)
    prompt = service.chat.conversation([{"role": "user", "content": "x"}], "off")
    for n in range(8):
        ids = [i for c in f"turn {n}" for i in service.chat.tokenizer.encode(c)]
        parser = service.chat.parser(prompt)
        parser.feed([*ids, service.card.end_token])
        replay.learn(f"salt {n}", prompt, ids, parser.close())
    until(lambda: not replay._learning)
    assert len(replay._turns) == len(replay._salt_of) == len(replay._salts) == 3
    replay.close()


@pytest.mark.parametrize("where", ["request", "reader", "memory"])
def test_what_a_client_sent_is_in_no_log_whatever_fails(server, monkeypatch, caplog, where):
    client, _, service = server

    def broken(*_, **__):
        raise KeyError(SAID)

    target = {
        "request": "pyrosome.server.routes.chat_request",
        "reader": "pyrosome.answer.ChatReader.done",
        "memory": "pyrosome.server.replay.Replay._learn",
    }
    monkeypatch.setattr(target[where], broken)
    with caplog.at_level(logging.DEBUG):
        reply = client.post(CHAT, json=BODY)
        all_is_given_back(service)
        until(lambda: "KeyError" in caplog.text)
    assert reply.status_code == (200 if where == "memory" else 500)
    assert SAID not in caplog.text and SAID not in reply.text
    assert "broken" in caplog.text  # but where it was is
