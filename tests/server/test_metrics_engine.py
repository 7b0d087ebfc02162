"""What Prometheus is told of the engine: its pools, its counters over restarts, and what a long step leaves known."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time

import httpx2 as httpx
import pytest

from pyrosome.engine.aio import EngineProcess
from pyrosome.engine.stats import STEP_BUCKETS, TOKEN_BUCKETS, Stats
from pyrosome.engine.worker import EngineThread
from pyrosome.errors import EngineError
from pyrosome.server.app import make_app
from pyrosome.server.engine_numbers import COUNTERS, Totals
from pyrosome.server.metrics_names import PREFIX, VLLM
from pyrosome.server.service import Service
from tests.server.scrape import BODY, PATH, Counting, Scrape, scrape
from tests.server.scripted import MODEL, running, saying, until

# The engine's own numbers


def test_srv_05_no_pool_is_shown_empty_while_something_is_cached(nano):
    prompt = {"messages": [{"role": "user", "content": "one two three four " * 60}], "max_tokens": 4, "stream": True}
    with nano.stream("POST", PATH, json=prompt) as reply:
        lines = reply.iter_lines()
        next(lines)
        until(lambda: any(e.has_begun for e in nano.service.exchanges.values()) or not nano.service.exchanges)
        list(lines)
    told = scrape(nano)
    for pool in ("csa", "hca", "index"):
        assert 0 < told("pool_used_bytes", pool=pool) < told("pool_total_bytes", pool=pool), pool
    for pool in ("window", "state", "draft"):
        assert told("pool_total_bytes", pool=pool) > 0, pool
    assert told("prefix_blocks") > 0 and told("snapshot_bytes") > 0
    assert 0 < told("kv_cache_usage_perc") < 1

    nano.post(PATH, json={**prompt, "stream": False})
    again = scrape(nano)
    assert again("prefix_cache_hits_total") - told("prefix_cache_hits_total") >= 128
    assert again("prefix_cache_queries_total") > told("prefix_cache_queries_total")
    assert again("lookups_total", limit="all") > told("lookups_total", limit="all")
    assert again("generation_tokens_total") >= told("generation_tokens_total") + 4
    assert again("iteration_tokens_total_count") == again("step_seconds_count") > told("step_seconds_count")
    assert again("iteration_tokens_total_sum") == again("computed_tokens_total")


def test_window_and_state_are_in_use_while_a_request_runs(nano):
    asked = {**BODY, "stream": True, "max_tokens": 400, "ignore_eos": True}
    with nano.stream("POST", PATH, json=asked) as reply:
        lines = reply.iter_lines()
        for _ in range(8):
            next(lines)
        told = scrape(nano)
    assert told("num_requests_running") == 1
    for pool in ("window", "state"):
        assert told("pool_used_bytes", pool=pool) > 0, pool
    until(lambda: not nano.service.exchanges)


def test_drafts_are_told_by_position_and_steps_by_seconds_and_tokens():
    engine = Counting(saying("a</think>b"))
    with running(Service(MODEL, make_driver=lambda: EngineThread(engine))) as url, httpx.Client(base_url=url) as client:
        client.post(PATH, json=BODY)
        told = scrape(client)
    steps = engine.stats.steps
    assert told("spec_decode_num_drafts_total") == steps
    assert told("spec_decode_num_draft_tokens_total") == 2 * steps
    assert told("spec_decode_num_accepted_tokens_total") == steps
    assert [told("spec_decode_num_draft_tokens_per_pos_total", position=p) for p in "01"] == [steps, steps]
    assert [told("spec_decode_num_accepted_tokens_per_pos_total", position=p) for p in "01"] == [steps, 0]
    assert told("step_seconds_bucket", le="0.02") == 0
    assert told("step_seconds_bucket", le="0.05") == told("step_seconds_bucket", le="+Inf") == steps
    assert told("iteration_tokens_total_bucket", le="1.0") == 0
    assert told("iteration_tokens_total_bucket", le="8.0") == told("iteration_tokens_total_count") == steps
    assert told("kv_cache_usage_perc") == pytest.approx(45 / 400)
    assert told("lookups_total", limit="no snapshot") == 1 and told("lookups_total", limit="all") == 0
    assert told("replayed_tokens_total") == 1
    for bounds, name in ((STEP_BUCKETS, "step_seconds"), (TOKEN_BUCKETS, "iteration_tokens_total")):
        buckets = [le for (sample, labels) in told.samples if sample == f"{PREFIX}{name}_bucket" for _, le in labels]
        assert list(map(float, buckets)) == [*bounds, float("inf")]


def test_a_scrape_during_a_long_step_tells_what_is_known_and_its_age():
    engine = Counting(saying("a</think>b"))
    with running(Service(MODEL, make_driver=lambda: EngineThread(engine))) as url, httpx.Client(base_url=url) as client:
        before = scrape(client)
        assert before("engine_up") == 1 and before("engine_stats_age_seconds") < 5
        engine.hold.set()
        worker = threading.Thread(target=client.post, args=(PATH,), kwargs={"json": BODY})
        worker.start()
        until(lambda: engine.has_work)
        began = time.monotonic()
        with httpx.Client(base_url=url) as other:
            seen = [scrape(client), scrape(other)]
        num_asked = engine.num_asked
        took = time.monotonic() - began
        engine.hold.clear()
        worker.join()
        until(lambda: engine.num_asked > num_asked)
        assert engine.num_asked == num_asked + 1, "however many scrapes wait, the engine is asked once"
        until(lambda: scrape(client)("engine_stats_age_seconds") < 0.9)
    assert took < 10, "two scrapes, each of which gave up after a second"
    for told in seen:
        assert told("engine_stats_age_seconds") > 0.9
        assert told("requests_inside") == 1, "the server's own numbers are new"
        assert told("pool_used_bytes", pool="csa") == 30


def test_metrics_are_there_before_the_model_is_and_after_it_failed():
    def fail():
        raise EngineError("the weights are gone")

    service = Service(MODEL, make_driver=fail)

    async def look() -> None:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert (await client.post(PATH, json=BODY)).status_code == 503
            told = Scrape((await client.get("/metrics")).text)
            assert (told("ready"), told("engine_up"), told("refusals_total", status="503")) == (0, 0, 1)
            assert told.get("engine_stats_age_seconds") is None, "nothing was told yet"
            assert (await client.get("/ping")).status_code == 503
            with pytest.raises(EngineError):
                await service.start()
            told = Scrape((await client.get("/metrics")).text)
            assert (told("ready"), told("engine_up")) == (0, 0)

    asyncio.run(look())


# Restarts


def test_counters_of_one_process_after_another_add_up_and_gauges_do_not():
    totals = Totals()
    seen: list[Stats] = []
    for process, stats in (
        (0, Stats(prompt_tokens=5, drafted=(2, 1), lookups_by_limit={"all": 1}, running=3, step_seconds=0.5)),
        (0, Stats(prompt_tokens=9, drafted=(3, 1), lookups_by_limit={"all": 2}, running=2, step_seconds=0.75)),
        (1, Stats(prompt_tokens=1, drafted=(1, 1, 1), lookups_by_limit={"evicted": 1}, running=1, step_seconds=0.25)),
        (3, Stats(prompt_tokens=20, running=0)),
        (3, Stats(prompt_tokens=21, running=0)),
    ):
        totals.take(stats, process)
        seen.append(totals.now)
    assert [s.prompt_tokens for s in seen] == [5, 9, 10, 30, 31]
    assert [s.running for s in seen] == [3, 2, 1, 0, 0]
    assert [s.drafted for s in seen] == [(2, 1), (3, 1), (4, 2, 1), (4, 2, 1), (4, 2, 1)]
    assert seen[-1].lookups_by_limit == {"all": 2, "evicted": 1}
    assert seen[-1].step_seconds == pytest.approx(1.0)


def test_every_number_of_the_engine_is_either_a_counter_or_of_now():
    of_now = {
        "running", "waiting", "sessions", "free_slots", "num_slots", "free_pages", "num_pages", "pool_bytes",
        "tree_pages", "tree_blocks", "snapshot_bytes", "host_bytes", "disk_bytes",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(Stats)} == of_now | set(COUNTERS)


def test_counters_never_go_back_when_the_engines_process_is_killed():
    arguments = {"text": "a</think>b"}
    service = Service(MODEL, make_driver=lambda: EngineProcess("tests.server.scrape:counting_engine", arguments))
    with running(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(3):
            assert client.post(PATH, json=BODY).status_code == 200
        before = scrape(client)
        assert before("process_resident_memory_bytes", process="engine") > 1 << 20
        assert before("process_resident_memory_bytes", process="server") > 1 << 20

        driver = service.driver
        os.kill(driver.pid, signal.SIGKILL)
        until(lambda: driver.num_restarts == 1)
        until(lambda: scrape(client)("engine_stats_age_seconds") < 0.5 and scrape(client)("engine_up") == 1)
        middle = scrape(client)
        assert client.post(PATH, json=BODY).status_code == 200
        after = scrape(client)
    assert (before("engine_restarts_total"), middle("engine_restarts_total")) == (0, 1)
    counted = [
        key for key in before.samples
        if key[0].endswith(("_total", "_count", "_sum", "_bucket")) and not key[0].startswith(VLLM)
    ]  # fmt: skip
    for earlier, later in ((before, middle), (middle, after)):
        assert [key for key in counted if later.samples[key] < earlier.samples[key]] == []
    assert before("prompt_tokens_total") == middle("prompt_tokens_total") == 27
    assert after("prompt_tokens_total") == 36
    assert after("step_seconds_count") > middle("step_seconds_count") == before("step_seconds_count")
