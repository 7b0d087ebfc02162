"""The log has one line for each request, and never what was said in it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re

import httpx2 as httpx
import pytest

from pyrosome.engine.worker import EngineThread
from pyrosome.server.app import make_app
from pyrosome.server.caller import ANYBODY, OpenDoor
from pyrosome.server.service import Service
from tests.server.scrape import BODY, PATH
from tests.server.scripted import MODEL, ScriptedEngine, running, saying, scripted, until

LOGGER = "pyrosome.server.requests"


@pytest.fixture
def lines(caplog):
    """The lines that were written so far, as text."""
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: [record.getMessage() for record in caplog.records if record.name == LOGGER]


def fields(line: str) -> dict[str, str]:
    return dict(re.findall(r" ([a-z]+)=(\S+)", line))


class Named(OpenDoor):
    """Knows everybody by the key they present."""

    async def caller(self, presented):
        return dataclasses.replace(ANYBODY, key="pk_7", account="acct 3") if presented else ANYBODY


def test_a_request_has_one_line_with_what_it_asked_took_and_cost(lines):
    with scripted(saying("let me see</think>it is 51")) as (client, engine, _):
        answer = client.post(PATH, json={**BODY, "max_tokens": 9})
        usage = answer.json()["usage"]
    (line,) = lines()
    assert line.startswith(f"{answer.headers['x-request-id']} POST {PATH} status=200 ")
    told = fields(line)
    assert list(told) == [
        "status", "end", "mode", "prompt", "cached", "output", "first", "account", "key", "total"
    ]  # fmt: skip
    assert (told["end"], told["mode"]) == ("length", "high")
    assert int(told["prompt"]) == usage["prompt_tokens"] == len(engine.requests[0].ids)
    assert int(told["cached"]) == usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert int(told["output"]) == usage["completion_tokens"] == 9
    assert (told["account"], told["key"]) == ("-", "-")
    first, total = (float(told[name].removesuffix("ms")) for name in ("first", "total"))
    assert 0 <= first <= total + 1


def test_the_line_of_a_stream_comes_once_and_at_its_end(lines):
    with scripted(saying("</think>" + "some words " * 5), step_s=0.002) as (client, _, service):
        with client.stream("POST", PATH, json={**BODY, "stream": True}) as reply:
            answer = reply.iter_lines()
            next(answer)
            until(lambda: any(e.has_begun for e in service.exchanges.values()))
            assert lines() == []
            list(answer)
        until(lines)
    (line,) = lines()
    assert fields(line)["end"] == "stop"


def test_the_account_and_the_keys_public_id_are_told(lines):
    service = Service(MODEL, make_driver=lambda: EngineThread(ScriptedEngine(saying("a</think>b"))), door=Named())
    with running(service) as url, httpx.Client(base_url=url) as client:
        client.post(PATH, json=BODY, headers={"Authorization": "Bearer anything"})
    told = fields(lines()[0])
    assert (told["account"], told["key"]) == (r"acct\x203", "pk_7")


def test_a_client_that_left_and_a_request_that_failed_have_their_lines(lines):
    with scripted(saying("</think>" + "more " * 2000), step_s=0.002) as (client, engine, service):
        with client.stream("POST", PATH, json={**BODY, "stream": True, "max_tokens": 5000}) as reply:
            answer = reply.iter_lines()
            next(answer)
            until(lambda: any(e.has_begun for e in service.exchanges.values()))
        until(lambda: lines() and not engine.has_work)
        engine.fail = "it broke"
        assert client.post(PATH, json=BODY).status_code == 500
        until(lambda: len(lines()) == 2)
    left, failed = map(fields, lines())
    assert (left["status"], left["end"]) == ("200", "abort") and int(left["output"]) > 0
    assert (failed["status"], failed["end"], failed["first"]) == ("500", "error", "-")


def test_what_was_refused_and_what_generates_nothing_has_a_line_too(lines):
    with scripted(saying("a</think>b")) as (client, _, _):
        client.post(PATH, json={"messages": "none"})
        client.get("/v1/models")
        client.get("/nowhere")
    told = [re.sub(r"^\S+ | total=\d+ms$", "", line) for line in lines()]
    assert told == [f"POST {PATH} status=400", "GET /v1/models status=200", "GET /nowhere status=404"]


def test_probes_are_written_at_debug_alone_unless_they_fail(lines, caplog):
    with scripted(saying("a</think>b")) as (client, _, _):
        for path in ("/health", "/health/live", "/ping", "/metrics"):
            client.get(path)
    assert lines() == []
    caplog.set_level(logging.DEBUG, LOGGER)
    with scripted(saying("a</think>b")) as (client, _, _):
        client.get("/health")
    assert [record.levelname for record in caplog.records if record.name == LOGGER] == ["DEBUG"]
    caplog.set_level(logging.INFO, LOGGER)

    async def look() -> None:
        transport = httpx.ASGITransport(make_app(Service(MODEL, make_driver=lambda: EngineThread(ScriptedEngine([])))))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.get("/health")  # nobody has begun to load

    asyncio.run(look())
    assert [fields(line)["status"] for line in lines()][1:] == ["503"]


def test_nothing_that_was_said_is_in_any_line_at_any_level(caplog):
    """Body, prompt, answer, query and key, each with a mark of its own."""
    for name in ("httpx2", "httpcore2"):  # of the client, which says what it sends
        caplog.set_level(logging.WARNING, name)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "pyrosome")  # a command that ran before in this process may have set it
    marks = ["Zprompt", "Zsystem", "Zanswer", "Zthought", "Zquery", "Zkey", "Zuser", "Zmodel", "Ztool", "Zmeta", "Zbad"]
    body = {
        "messages": [{"role": "system", "content": "Zsystem"}, {"role": "user", "content": "Zprompt"}],
        "user": "Zuser", "model": "Zmodel", "metadata": {"x": "Zmeta"},
        "tools": [{"type": "function", "function": {"name": "Ztool", "parameters": {"type": "object"}}}],
    }  # fmt: skip
    keys = {"Authorization": "Bearer pyr-Zkey-0123456789abcdef"}
    with scripted(saying("Zthought</think>Zanswer")) as (client, engine, _):
        for stream in (False, True):
            answer = client.post(f"{PATH}?q=Zquery", json={**body, "stream": stream}, headers=keys)
            assert answer.status_code == 200
        client.post(f"{PATH}?q=Zquery", json={"messages": "Zbad"}, headers=keys)
        client.post(f"{PATH}?q=Zquery", content=b'{"Zbad', headers={**keys, "content-type": "application/json"})
        for kind in ("pyr", "pyi", "sk"):
            client.get(f"/v1/{kind}-Zkey-0123456789abcdef?q=Zquery")
        engine.fail = "it broke"
        client.post(PATH, json=body, headers=keys)
    written = [record.getMessage() + str(record.exc_text or "") for record in caplog.records]
    assert len([r for r in caplog.records if r.name == LOGGER]) == 8
    assert [(mark, line) for mark in marks for line in written if mark in line] == []


def test_a_path_cannot_write_lines_of_its_own_and_is_not_told_without_end(lines):
    with scripted(saying("a</think>b")) as (client, _, _):
        client.get("/v1/x%0Aforged%20status=200%1b[31m")
        client.get("/v1/" + "y" * 400)
    for line in lines():
        assert line.isprintable()
        assert fields(line)["status"] in ("400", "404") and len(line) < 250
    assert "yyy... status=" in lines()[1]
    assert len(lines()) == 2


def test_many_prompts_in_one_request_have_one_line_with_their_sums(lines):
    with scripted(saying("words that follow")) as (client, engine, _):
        answer = client.post("/v1/completions", json={"prompt": ["one", "two", "three"], "max_tokens": 4})
        assert answer.status_code == 200
    (line,) = lines()
    told = fields(line)
    assert int(told["output"]) == 12 and told["mode"] == "text"
    assert int(told["prompt"]) == sum(len(r.ids) for r in engine.requests)
