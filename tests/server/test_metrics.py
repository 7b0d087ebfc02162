"""What Prometheus is told of requests and answers: names, numbers that follow what happens, and bounds on labels."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

import pyrosome.chat
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.app import make_app
from pyrosome.server.caller import ANYBODY, METRICS, OpenDoor
from pyrosome.server.metrics_names import EMPTY, LABELS, OTHER, PREFIX, VLLM, bounded, kind_of
from pyrosome.server.metrics_names import METRICS as TABLE
from pyrosome.server.problems import Problem
from pyrosome.server.service import Service
from tests.server.scrape import BODY, PATH, Scrape, metrics_of, scrape
from tests.server.scripted import MODEL, ScriptedEngine, running, saying, scripted, until

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
OPEN, CLOSE = "<｜DSML｜", "</｜DSML｜"
CALL = f'{OPEN}tool_calls>\n{OPEN}invoke name="look">\n{CLOSE}invoke>\n{CLOSE}tool_calls>'


# The text itself


def test_the_text_is_valid_and_holds_every_metric_with_its_kind_and_meaning():
    with scripted(saying("a</think>b")) as (client, _, _):
        client.post(PATH, json=BODY)
        answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    told = Scrape(answer.text)
    for metric in TABLE:
        prefixes = (PREFIX, VLLM) if metric.is_vllm else (PREFIX,)
        for prefix in prefixes:
            kind = "gauge" if metric.kind == "info" else metric.kind
            name = prefix + (metric.name.removesuffix("_total") if kind == "counter" else metric.name)
            family = told.families.pop(name)
            assert (family.type, family.documentation) == (kind, metric.meaning), name
            for sample in family.samples:
                assert sample.labels["model_name"] == MODEL and sample.labels["engine"] == "0"
                own = set(sample.labels) - {"model_name", "engine", "le"}
                assert metric.kind == "info" or own == set(metric.labels), name
    assert not told.families, "and nothing else"


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=1.0.0, text/plain; version=0.0.4; q=0.5",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.4,*/*;q=0.1",
        "application/openmetrics-text",
    ],
)
def test_open_metrics_is_told_to_whoever_accepts_it_with_the_same_names_and_values(accept):
    with scripted(saying("a</think>b")) as (client, _, _):
        client.post(PATH, json=BODY)
        answer = client.get("/metrics", headers={"Accept": accept})
        plain = client.get("/metrics", headers={"Accept": "text/plain, application/openmetrics-text"})
    assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.endswith("# EOF\n")
    families = {f.name: f for f in openmetrics_parser.text_string_to_metric_families(answer.text)}
    assert families["pyrosome:requests"].type == "counter" and families["pyrosome:cache_config"].type == "info"
    assert families["vllm:iteration_tokens_total"].type == "histogram"
    assert [f.name for f in families.values() if f.type == "unknown"] == []
    told = {(s.name, frozenset(s.labels.items())) for f in families.values() for s in f.samples}
    assert told == {
        (s.name, frozenset(s.labels.items())) for f in text_string_to_metric_families(plain.text) for s in f.samples
    }


def test_what_vllm_has_too_is_told_under_its_prefix_with_the_same_values():
    with scripted(saying("a</think>b")) as (client, _, _):
        client.post(PATH, json=BODY)
        text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    ours = {line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)}
    theirs = {line.removeprefix(VLLM) for line in lines if line.startswith(VLLM)}
    assert theirs <= ours
    assert {"request_success_total", "time_to_first_token_seconds_count", "cache_config_info"} <= {
        re.split(r"[{ ]", line)[0] for line in theirs
    }


def test_every_name_that_vllm_has_for_this_is_there():
    """The list of design notes, as scrapers ask for them."""
    names = """num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total generation_tokens_total
        prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total request_success_total
        spec_decode_num_drafts_total spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
        time_to_first_token_seconds_bucket inter_token_latency_seconds_sum request_time_per_output_token_seconds_count
        e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket request_prefill_time_seconds_bucket
        request_decode_time_seconds_bucket request_inference_time_seconds_bucket request_prompt_tokens_bucket
        request_generation_tokens_bucket request_params_max_tokens_bucket iteration_tokens_total_bucket
        cache_config_info"""
    with scripted(saying("a</think>b")) as (client, _, _):
        text = client.get("/metrics").text
    for name in names.split():
        assert re.search(rf'^{VLLM}{name}{{.*engine="0".*model_name="{MODEL}".*}} [0-9.e+-]+$', text, re.MULTILINE), (
            name
        )


def test_two_servers_in_one_process_count_apart():
    with scripted(saying("a</think>b")) as (one, _, _), scripted(saying("a</think>b")) as (other, _, _):
        one.post(PATH, json=BODY)
        assert scrape(one)("requests_total", protocol="chat_completions", mode="high", end="stop") == 1
        assert scrape(other).get("requests_total", protocol="chat_completions", mode="high", end="stop") is None


# Requests


def test_a_request_is_counted_by_protocol_mode_and_end_with_its_tokens_and_times():
    with scripted(saying("let me see</think>it is 51")) as (client, engine, _):
        client.post(PATH, json={**BODY, "max_tokens": 100})
        usage = client.post(PATH, json={**BODY, "thinking": {"type": "disabled"}, "max_tokens": 4}).json()["usage"]
        told = scrape(client)
    assert told("requests_total", protocol="chat_completions", mode="high", end="stop") == 1
    assert told("requests_total", protocol="chat_completions", mode="off", end="length") == 1
    assert told("request_success_total", finished_reason="stop") == 1
    assert told("request_success_total", finished_reason="length") == 1
    for name in (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds",
        "request_time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens",
        "request_params_max_tokens",
    ):  # fmt: skip
        assert told(f"{name}_count") == told(f"{name}_bucket", le="+Inf") == 2, name
    assert told("request_params_max_tokens_sum") == 104
    assert told("request_params_max_tokens_bucket", le="5.0") == 1
    assert told("request_prompt_tokens_sum") == sum(len(r.ids) for r in engine.requests)
    assert usage["completion_tokens"] == 4
    spoken = sum(len(script) for r in engine.requests[:1] for script in engine.script(r)) - 1
    assert told("request_generation_tokens_sum") == spoken + 4
    assert told("reasoning_tokens_total") > 0
    whole = told("request_prefill_time_seconds_sum") + told("request_decode_time_seconds_sum")
    decodes = [told("request_time_per_output_token_seconds_sum"), told("request_decode_time_seconds_sum")]
    assert decodes[1] / (spoken - 1) < decodes[0] < decodes[1] / 3
    assert told("request_inference_time_seconds_sum") == pytest.approx(whole)
    assert told("e2e_request_latency_seconds_sum") == pytest.approx(
        told("time_to_first_token_seconds_sum") + told("request_decode_time_seconds_sum")
    )


def test_the_time_a_request_waited_in_the_engine_is_told_apart_from_its_prompts():
    class Waiting(ScriptedEngine):
        def _advance(self, name: str, state: dict[str, Any]) -> list[Any]:
            events = super()._advance(name, state)
            return [
                dataclasses.replace(e, reuse=dataclasses.replace(e.reuse, waited_s=0.02))
                if getattr(e, "reuse", None)
                else e
                for e in events
            ]

    engine = Waiting(saying("a</think>b"), step_s=0.03)
    with running(Service(MODEL, make_driver=lambda: EngineThread(engine))) as url, httpx.Client(base_url=url) as client:
        client.post(PATH, json=BODY)
        told = scrape(client)
    assert told("request_queue_time_seconds_sum") == pytest.approx(0.02)
    assert told("request_prefill_time_seconds_sum") == pytest.approx(told("time_to_first_token_seconds_sum") - 0.02)


def test_every_token_but_a_completions_first_has_waited_for_the_one_before_it():
    text = "</think>" + "seven words and then some more of them"
    with scripted(saying(text), step_s=0.002) as (client, engine, _):
        client.post(PATH, json={**BODY, "n": 2})
        told = scrape(client)
        num_tokens = len(engine.script(engine.requests[0])[0])
    assert told("inter_token_latency_seconds_count") == 2 * (num_tokens - 1)
    assert told("inter_token_latency_seconds_sum") == pytest.approx(
        2 * told("request_decode_time_seconds_sum"), rel=0.5
    )


def test_tokens_that_come_together_share_the_time_they_let_wait():
    service = Service(MODEL, make_driver=lambda: EngineThread(ScriptedEngine(saying("a"))))
    make_app(service)
    metrics = metrics_of(service)
    metrics.waited(4, 0.2)
    told = Scrape(generate_latest(metrics).decode())
    assert told("inter_token_latency_seconds_count") == told("inter_token_latency_seconds_bucket", le="0.05") == 4
    assert told("inter_token_latency_seconds_bucket", le="0.025") == 0
    assert told("inter_token_latency_seconds_sum") == pytest.approx(0.2)


def ends(client: httpx.Client, end: str) -> float | None:
    """How many requests have ended so: it is counted behind the last of the answer."""
    return scrape(client).get("requests_total", protocol="chat_completions", mode="high", end=end)


def has_begun(service: Service) -> bool:
    """Whether a token of a request has come."""
    return any(e.outcome.first_token is not None for e in service.exchanges.values())


class Full(ScriptedEngine):
    """Has no room for anybody while it `is_full`."""

    is_full = False

    def _advance(self, name: str, state: dict[str, Any]) -> list[Any]:
        return [] if self.is_full and name not in self._aborting else super()._advance(name, state)


def test_srv_02_a_client_that_leaves_is_counted_by_how_far_its_request_was():
    engine = Full(saying("</think>" + "more and " * 2000), step_s=0.002, prompt_steps=3)
    service = Service(MODEL, make_driver=lambda: EngineThread(engine))
    with running(service) as url, httpx.Client(base_url=url) as client:

        def leave_once(is_time: Callable[[], object]) -> None:
            with client.stream("POST", PATH, json={**BODY, "stream": True, "max_tokens": 5000}) as reply:
                lines = reply.iter_lines()
                next(lines)
                until(is_time)
            until(lambda: not service.exchanges and not engine.has_work)

        engine.is_full = True
        leave_once(lambda: engine.steps > 5)
        engine.is_full = False
        leave_once(lambda: has_begun(service))
        engine.prompt_steps = 10_000
        leave_once(lambda: any(e.outcome.progress for e in service.exchanges.values()))
        until(lambda: ends(client, "abort") == 3)
        told = scrape(client)
    for phase in ("queue", "prompt", "output"):
        assert told("cancelled_total", phase=phase, by="client") == 1, phase
        assert told("cancelled_total", phase=phase, by="server") == 0, phase
    assert told("request_success_total", finished_reason="abort") == 3
    assert told("e2e_request_latency_seconds_count") == 0, "what was cut off has no time of its own"
    assert told("time_to_first_token_seconds_count") == 1


class Loop:
    """A watcher that keeps the event loop it was called in."""

    def taken(self, exchange):
        self.loop = asyncio.get_running_loop()

    def waited(self, num_tokens, seconds):
        pass

    def ended(self, outcome):
        pass

    def refused(self, path, problem):
        pass


def test_a_request_that_a_closing_server_ends_is_not_counted_as_its_clients_doing():
    options, loop = ServerOptions(drain_s=0), Loop()
    with scripted(saying("</think>" + "more " * 3000), step_s=0.002, options=options) as (client, _, service):
        service.watchers.append(loop)
        with client.stream("POST", PATH, json={**BODY, "stream": True, "max_tokens": 5000}) as reply:
            lines = reply.iter_lines()
            until(lambda: next(lines) and has_begun(service))
            asyncio.run_coroutine_threadsafe(service.drain(), loop.loop).result(20)
            assert "shutting down" in "".join(lines)
        until(lambda: ends(client, "abort") == 1)
        told = scrape(client)
    assert told("cancelled_total", phase="output", by="server") == 1
    assert told("cancelled_total", phase="output", by="client") == 0
    assert told("ready") == 0


def test_errors_are_counted_by_their_status_also_within_a_stream():
    with scripted(saying("a</think>b")) as (client, engine, _):
        assert client.post(PATH, json={"messages": "none"}).status_code == 400
        assert client.get("/v1/nothing-here").status_code == 404
        assert client.get(PATH).status_code == 405
        engine.fail = "it broke"
        assert "it broke" in client.post(PATH, json={**BODY, "stream": True}).text
        until(lambda: ends(client, "error") == 1)
        told = scrape(client)
    for status in ("400", "404", "405", "500"):
        assert told("refusals_total", status=status) == 1, status
    assert told("request_success_total", finished_reason="error") == 1


def test_a_full_queue_shows_its_length_and_what_it_refused():
    options, engine_options = ServerOptions(max_queue=1), EngineOptions(max_sequences=1)
    with scripted(saying("a</think>b"), options=options, engine_options=engine_options) as (client, engine, service):
        engine.hold.set()
        threads = [threading.Thread(target=client.post, args=(PATH,), kwargs={"json": BODY}) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: service.gate.num_inside == 2)
        assert client.post(PATH, json=BODY).status_code == 429
        told = scrape(client)
        load = client.get("/load").json()
        engine.hold.clear()
        for thread in threads:
            thread.join()
        until(lambda: service.gate.num_inside == 0)
        after = scrape(client)
    assert (told("requests_inside"), told("queue_length"), told("queue_limit")) == (2, 1, 1)
    assert told("gate_refusals_total") == told("refusals_total", status="429") == 1
    assert load == {"server_load": 2, "places": 1, "queue": 1}
    assert (after("requests_inside"), after("queue_length")) == (0, 0)


# Answers


def test_a_leak_is_markup_in_the_content_of_an_answer_that_may_call():
    quoted = f"</think>one writes {OPEN}invoke and {CLOSE}invoke>"
    with scripted(saying(quoted)) as (client, engine, _):
        answer = client.post(PATH, json={**BODY, "tools": TOOLS}).json()["choices"][0]["message"]
        assert answer["content"].count("DSML") == 2, "TOOL-05: prose stays as it is"
        told = scrape(client)
        assert told("dsml_leaks_total") == 2
        assert told("malformed_total", kind="spelled_in_text") == 1

        client.post(PATH, json=BODY)
        assert scrape(client)("dsml_leaks_total") == 2, "TOOL-06: without tools it is text like any other"

        engine.script = saying(f"let me call {OPEN}invoke</think>nothing")
        client.post(PATH, json={**BODY, "tools": TOOLS})
        assert scrape(client)("dsml_leaks_total") == 2, "thoughts are no content"

        engine.script = saying(f"</think>{CALL}")
        choice = client.post(PATH, json={**BODY, "tools": TOOLS}).json()["choices"][0]
        told = scrape(client)
    assert choice["finish_reason"] == "tool_calls"
    assert told("dsml_leaks_total") == 2 and told("tool_calls_total") == 1
    assert told("requests_total", protocol="chat_completions", mode="high", end="tool_calls") == 1
    assert told("request_success_total", finished_reason="stop") == 4


def test_what_is_malformed_is_counted_by_kind_and_an_empty_answer_by_itself():
    with scripted(saying(f"</think>{CALL}and more")) as (client, engine, _):
        ask = {**BODY, "tools": TOOLS}
        client.post(PATH, json=ask)
        engine.script = saying("thought of nothing</think>")
        client.post(PATH, json=ask)
        engine.script = saying("</think>" + CALL.replace('"look"', '"jump"'))
        client.post(PATH, json=ask)
        told = scrape(client)
    assert told("empty_answers_total") == 1
    assert told("malformed_total", kind="undeclared_tool") == 1
    assert told.get("malformed_total", kind=OTHER) is None


def notes_in_the_source() -> Iterator[str]:
    """Every note that a parser of answers may make, its placeholders filled in."""
    for path in Path(pyrosome.chat.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not re.search(r"notes\.append|_note", ast.unparse(node.func)):
                continue
            value = node.args[0]
            if isinstance(value, ast.Name):
                value = constants.get(value.id, value)
            if isinstance(value, ast.Constant):
                yield value.value
            elif isinstance(value, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "'any\nname'" for part in value.values)


def test_every_note_a_parser_makes_has_a_kind_and_every_kind_a_note():
    notes = list(notes_in_the_source())
    assert EMPTY in notes
    kinds = {note: kind_of(note) for note in notes if note != EMPTY}
    assert OTHER not in kinds.values(), kinds
    assert set(kinds.values()) == set(LABELS["kind"])
    assert kind_of("something new") == OTHER


# Labels


def test_labels_hold_no_clients_text_and_their_values_are_those_of_the_table(monkeypatch):
    with scripted(saying("a</think>b")) as (client, _, service):
        for name in ("x" * 50, 'quote"\\\n', "another"):
            client.post(PATH, json={**BODY, "model": name, "user": name, "cache_salt": name})
            client.get(f"/{name.strip()}")
            client.get("/v1/models", headers={"Authorization": f"Bearer {name.strip()}"})
        metrics = metrics_of(service)
        metrics.refused("/", Problem(418, "a teapot"))
        odd = Stats(lookups_by_limit={"whatever": 2, "all": 1}, errors_by_type={"Surprise": 1, "EngineError": 1},
                    pool_bytes={"new_kv": (1, 2)}, drafted=(1,))  # fmt: skip
        monkeypatch.setattr(type(metrics.engine), "stats", odd)
        told = scrape(client)
    assert told("refusals_total", status=OTHER) == 1
    assert told("lookups_total", limit=OTHER) == 2 and told("engine_faults_total", type=OTHER) == 1
    assert told("pool_used_bytes", pool=OTHER) == 1
    for (name, labels), _ in told.samples.items():
        for label, value in labels:
            if label in ("le", "position"):
                assert float(value) >= 0
            elif not name.endswith("_info"):
                assert value in (*LABELS[label], OTHER), (name, label, value)
    assert len(told.samples) < 2000


def test_a_value_the_table_has_not_is_other():
    assert bounded("mode", "high") == "high"
    assert bounded("mode", "a client's own") == OTHER
    assert bounded("status", 429) == "429"


# Who may see it, and the routes beside it


class Guarded(OpenDoor):
    """Lets everybody do everything, but one key alone see metrics."""

    async def caller(self, presented):
        scopes = ANYBODY.scopes if presented == "seer" else ANYBODY.scopes - {METRICS}
        return dataclasses.replace(ANYBODY, key=presented, scopes=scopes)


def test_metrics_load_and_server_info_need_their_scope():
    service = Service(MODEL, make_driver=lambda: EngineThread(ScriptedEngine(saying("a"))), door=Guarded())
    with running(service) as url, httpx.Client(base_url=url) as client:
        for path in ("/metrics", "/load", "/server_info"):
            assert client.get(path, headers={"Authorization": "Bearer blind"}).status_code == 403, path
            assert client.get(path, headers={"Authorization": "Bearer seer"}).status_code == 200, path
        assert client.get("/version").status_code == client.get("/ping").status_code == 200


def test_server_info_tells_no_secrets():
    options = ServerOptions(
        database_url="postgresql://me:hunter2@db/keys", tls_certificate="/hidden/cert", tls_key="/hidden/key",
        state_path="/hidden/state",
    )  # fmt: skip
    engine = ScriptedEngine(saying("a"))
    service = Service(MODEL, options, EngineOptions(disk_path="/hidden/disk"), make_driver=lambda: EngineThread(engine))

    async def look() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="https://127.0.0.1") as client:
            await service.start()
            answers = [await client.get(path) for path in ("/server_info", "/version")]
            await service.close()
            return answers

    info, version = asyncio.run(look())
    told = info.json()
    assert "hunter2" not in info.text and "hidden" not in info.text and "postgresql" not in info.text
    assert told["model"]["name"] == MODEL and told["server"]["max_queue"] == 256
    assert told["engine"]["max_context"] == 1 << 20
    assert version.json() == {"version": told["version"]}
