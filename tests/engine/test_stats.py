"""What an engine counts: by itself, and through an engine on a tiny network."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from itertools import pairwise

import pytest

from pyrosome.engine.request import Reuse
from pyrosome.engine.speculate import Depth
from pyrosome.engine.stats import STEP_BUCKETS, TOKEN_BUCKETS, LogLine, Stats
from pyrosome.testing.shapes import tiny
from tests.engine.engines import drain, engine_of, run, watched
from tests.engine.engines import request as asked
from tests.networks import agreeing_network, network


@pytest.mark.parametrize("number", range(len(STEP_BUCKETS) + 1))
def test_a_step_is_counted_in_the_first_bucket_that_holds_it(number):
    low = STEP_BUCKETS[number - 1] if number else 0.0
    high = STEP_BUCKETS[number] if number < len(STEP_BUCKETS) else 1000.0
    stats = Stats()
    for seconds in (low + 1e-9, (low + high) / 2, high):
        stats.step_done(seconds, 1)
    assert stats.steps_by_seconds == tuple(3 * (i == number) for i in range(len(STEP_BUCKETS) + 1))
    assert stats.steps == 3 and stats.step_seconds == pytest.approx(low + (low + high) / 2 + high)


@pytest.mark.parametrize("number", range(len(TOKEN_BUCKETS) + 1))
def test_a_steps_tokens_are_counted_in_the_first_bucket_that_holds_them(number):
    low = TOKEN_BUCKETS[number - 1] if number else 0
    high = TOKEN_BUCKETS[number] if number < len(TOKEN_BUCKETS) else 100_000
    stats = Stats()
    for num_tokens in (low + 1, high):
        stats.step_done(0.1, num_tokens)
    assert stats.steps_by_tokens == tuple(2 * (i == number) for i in range(len(TOKEN_BUCKETS) + 1))


def test_steps_are_added_up_apart_by_whether_they_read_a_prompt():
    stats = Stats()
    stats.step_computed(0.25, [(100, 1, 0), (50, 3, 2)])
    stats.step_computed(0.5, [(101, 1, 0), (0, 64, 0)])
    stats.step_computed(0.125, [(7, 2, 1)])
    assert stats.decode_sums == {"steps": 2, "seconds": 0.375, "spans": 3, "tokens": 6, "positions": 157}
    assert stats.prompt_sums == {"steps": 1, "seconds": 0.5, "spans": 2, "tokens": 65, "positions": 101}


def test_drafts_are_counted_by_their_position():
    stats = Stats()
    for num_drafts, num_accepted in ((0, 0), (2, 1), (0, 0), (4, 4), (1, 0), (3, 2)):
        stats.drafts_checked(num_drafts, num_accepted)
    assert (stats.drafted, stats.accepted) == ((4, 3, 2, 1), (3, 2, 1, 1))


def test_lookups_ends_and_faults_are_counted_by_kind():
    stats = Stats()
    for reuse in (Reuse(300, 256, 250, 6, "all"), Reuse(10, limit="evicted"), Reuse(5, limit="evicted")):
        stats.looked_up(reuse)
    for reason in ("stop", "length", "stop"):
        stats.ended(reason)
    stats.failed("EngineError")
    assert (stats.prompt_tokens, stats.reused_tokens) == (315, 250)
    assert stats.lookups_by_limit == {"all": 1, "evicted": 2}
    assert stats.ended_by_reason == {"stop": 2, "length": 1} and stats.errors_by_type == {"EngineError": 1}


def count_all(stats: Stats) -> None:
    stats.step_done(0.1, 7)
    stats.step_computed(0.1, [(5, 1, 0)])
    stats.step_computed(0.1, [(0, 6, 0)])
    stats.looked_up(Reuse(9, 8, 8, 0, "all"))
    stats.drafts_checked(3, 2)
    stats.ended("stop")
    stats.failed("EngineError")


def test_a_copy_stays_as_it_is():
    stats = Stats()
    count_all(stats)
    copy, plain = dataclasses.replace(stats), stats.as_dict()
    count_all(stats)
    assert copy.as_dict() == plain != stats.as_dict()


def test_all_of_it_is_plain_data():
    def is_plain(value) -> bool:
        if isinstance(value, dict):
            return all(type(k) in (int, str) and is_plain(v) for k, v in value.items())
        return all(map(is_plain, value)) if isinstance(value, tuple) else type(value) in (int, float)

    stats = engine_of().current_stats()
    count_all(stats)
    assert all(is_plain(v) for v in stats.as_dict().values())
    assert Stats(**stats.as_dict()) == stats


def test_the_log_line_tells_rates_since_the_last_one():
    now = [100.0]
    line, stats = LogLine(lambda: now[0]), Stats(num_pages={4: 30, 128: 10}, free_pages={4: 15, 128: 5})
    assert line.take(stats).endswith("cache 50% full; prompts -% reused; drafts -% accepted".replace("-%", "-"))
    now[0] = 104.0
    stats.running, stats.waiting, stats.computed_tokens, stats.output_tokens = 2, 1, 4000, 50
    stats.looked_up(Reuse(1000, 256, 250, 6, "all"))
    stats.drafts_checked(4, 1)
    first = line.take(stats)
    assert first == (
        "2 running, 1 waiting; 1000 tok/s computed, 12.5 tok/s output; cache 50% full; prompts 25% reused; "
        "drafts 25% accepted"
    )
    now[0] = 105.0
    stats.output_tokens += 3
    assert line.take(stats) == (
        "2 running, 1 waiting; 0 tok/s computed, 3.0 tok/s output; cache 50% full; prompts - reused; drafts - accepted"
    )


def test_two_log_lines_at_one_moment_divide_by_nothing():
    line = LogLine(lambda: 1.0)
    line.take(Stats())
    assert "0 tok/s computed" in line.take(Stats())


# Through an engine


def test_what_an_engine_counts_adds_up():
    engine = engine_of(max_sequences=3, step_tokens=100)
    steps = watched(engine)
    requests = [asked("a", 300, 8), asked("b", 20, 5, 700, n=3), asked("c", 70, 1, 900)]
    said = run(engine, requests)
    again = run(engine, [dataclasses.replace(requests[0], id="again", stable=None)])
    assert again["again", 0].answer == said["a", 0].answer
    engine.add(asked("gone", 200, 50, 1200))
    engine.step()
    engine.abort("gone")
    said |= again | drain(engine)
    stats = engine.current_stats()

    assert stats.requests == 5
    assert stats.ended_by_reason == dict(Counter(s.end.reason for s in said.values())) == {"length": 6, "abort": 1}
    assert (
        stats.output_tokens
        == sum(len(s.tokens) for s in said.values())
        == sum(s.end.output_tokens for s in said.values())
    )
    firsts = [s.end.reuse for (_, index), s in said.items() if index == 0]
    assert stats.prompt_tokens == sum(r.prompt_tokens for r in firsts) == 300 + 20 + 70 + 300 + 200
    assert stats.reused_tokens == sum(r.reused_tokens for r in firsts) == again["again", 0].end.reuse.reused_tokens > 0
    assert stats.replayed_tokens == sum(r.replayed_tokens for r in firsts)
    assert stats.lookups_by_limit == dict(Counter(r.limit for r in firsts))
    assert stats.computed_tokens == sum(count for spans in steps for _, count in spans)
    whole = {"a": 300, "b": 20, "c": 70, "again": 300 - firsts[3].matched_tokens}
    outputs = sum(len(s.tokens) - 1 for (name, _), s in said.items() if name in whole)
    assert stats.computed_tokens == sum(whole.values()) + outputs + 100, "100 of what was given up"
    assert stats.steps == len(steps) == sum(stats.steps_by_seconds) and stats.step_seconds > 0
    of_steps = [sum(count for _, count in spans) for spans in steps]
    assert stats.steps_by_tokens == tuple(
        sum(low < n <= high for n in of_steps) for low, high in pairwise((0, *TOKEN_BUCKETS, 1 << 60))
    )
    assert all(0 < r.waited_s < 60 for r in firsts)
    assert (stats.running, stats.waiting, stats.sessions) == (0, 0, 0)
    assert stats.num_slots == stats.free_slots and stats.errors_by_type == {}


def test_gauges_tell_what_runs_and_waits():
    engine = engine_of(max_sequences=2)
    for i in range(5):
        engine.add(asked(str(i), 40, 20, 50 * i))
    engine.call("session_open")
    engine.step()
    stats = engine.call("stats")
    assert (stats.running, stats.waiting, stats.sessions) == (2, 3, 1)
    assert stats.free_slots < stats.num_slots
    assert all(stats.free_pages[r] <= stats.num_pages[r] for r in stats.num_pages)
    before = stats.as_dict()
    drain(engine)
    assert stats.as_dict() == before and engine.call("stats").ended_by_reason == {"length": 5}


@pytest.mark.parametrize("kv_format", ["f32", "bf16", "fp8"])
@pytest.mark.parametrize(("drafts", "drafter"), [(0, "off"), (3, "mtp")])
def test_bytes_of_all_streams_add_up_to_the_plan_s(kv_format, drafts, drafter):
    config = tiny((0, 4, 128, 4))
    engine = engine_of(network(config), kv_format, drafter=drafter, max_drafts=drafts, max_sequences=3)
    pool, plan = engine.runner.pool, engine.runner.pool.plan
    nobodys = plan.table_bytes + plan.state_bytes + sum(plan.page_bytes.values())
    everything = {name: total for name, (_, total) in engine.current_stats().pool_bytes.items()}
    assert set(everything) == {"window_kv", "csa_kv", "index_k", "hca_kv", "tail", "draft"}
    assert sum(everything.values()) == plan.total_bytes - nobodys == pool.allocated_bytes - nobodys
    assert all(used == 0 for used, _ in engine.current_stats().pool_bytes.values())

    holdings = [pool.open() for _ in range(plan.num_slots - 1)]
    for holding in holdings:
        pool.prepare(holding, 0, 0)
    pages = [(r, pool.take(r)) for r, n in plan.num_pages.items() for _ in range(n - 1)]
    assert engine.current_stats().pool_bytes == {name: (total, total) for name, total in everything.items()}
    pool.drop(*next(p for p in pages if p[0] == 128))
    pool.release(holdings.pop())
    left = {name: total - used for name, (used, total) in engine.current_stats().pool_bytes.items()}
    assert left["hca_kv"] == plan.page_bytes[128] and left["csa_kv"] == left["index_k"] == 0
    assert left["window_kv"] + left["tail"] + left["draft"] == plan.state_bytes
    pool.drop(*next(p for p in pages if p[0] == 4))
    left = {name: total - used for name, (used, total) in engine.current_stats().pool_bytes.items()}
    assert left["csa_kv"] + left["index_k"] == plan.page_bytes[4] and min(left.values()) > 0


def test_what_nobody_runs_on_is_the_tree_s_page_by_page():
    engine = engine_of(max_sequences=3, step_tokens=100)
    run(engine, [asked("a", 700, 8), asked("b", 20, 5, 700, n=3), asked("c", 300, 1, 900)])
    stats = engine.current_stats()
    assert stats.free_slots == stats.num_slots and stats.tree_blocks == 5 + 2
    assert {r: n - stats.free_pages[r] for r, n in stats.num_pages.items()} == stats.tree_pages
    assert stats.tree_pages[4] == 3 + 1 and all(stats.pool_bytes[name][0] for name in ("csa_kv", "hca_kv", "index_k"))
    engine.add(asked("running", 300, 9, 1500))
    while engine.stats.output_tokens < 8 + 15 + 1 + 1:
        engine.step()
    stats = engine.current_stats()
    assert stats.num_pages[4] - stats.free_pages[4] == stats.tree_pages[4] + 1, "the one of its last, unfinished block"
    drain(engine)
    engine.tree.forget()
    assert engine.current_stats().tree_pages == {4: 0, 128: 0}


@pytest.fixture(scope="module", params=["mtp", "lookup"])
def drafted(request):
    """An engine after four requests with drafts, what it said, and its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Depth, "choose", lambda depth: depth.most)  # whatever a step takes
        engine = engine_of(agreeing_network(), drafter=request.param, max_drafts=4)
        steps = watched(engine)
        return engine.current_stats, run(engine, [asked(str(i), 30, 40, 3 * i) for i in range(4)]), steps


def test_drafts_add_up_to_what_was_computed_and_said(drafted):
    stats, said, steps = drafted[0](), *drafted[1:]
    assert stats.accepted[0] > 0
    assert all(a <= d for a, d in zip(stats.accepted, stats.drafted, strict=True))
    assert stats.computed_tokens == sum(count for spans in steps for _, count in spans)
    # Each decoding span is the last token and its drafts, and gives the accepted ones and one more.
    outputs = sum(len(s.tokens) for s in said.values())
    spans = sum(s.end.timeline.num_steps for s in said.values())
    assert spans <= outputs <= spans + sum(stats.accepted)
    assert stats.computed_tokens == 4 * 30 + (spans - 4) + sum(stats.drafted)


def test_drafts_of_all_requests_add_up_to_those_of_the_engine(drafted):
    stats, said = drafted[0](), drafted[1]
    for name in ("drafted", "accepted"):
        total = getattr(stats, name)
        each = [getattr(s.end.timeline, name) for s in said.values()]
        assert all(len(counts) >= len(total) for counts in each)
        assert tuple(map(sum, zip(*each, strict=True)))[: len(total)] == total, name


def test_faults_are_counted_by_whose_they_are(monkeypatch):
    engine = engine_of(drafter="mtp", max_drafts=2)
    forward = engine.runner.forward

    def broken(*args, **kwargs):
        raise RuntimeError("a broken step")

    engine.runner.forward = broken
    engine.add(asked("a", 10))
    (end,) = drain(engine).values()
    assert end.end.error_type == "EngineError"
    engine.runner.forward = forward
    monkeypatch.setattr(type(engine.drafter), "propose", broken)
    run(engine, [asked("b", 10, 3)])
    stats = engine.current_stats()
    assert stats.errors_by_type["EngineError"] == 1 and stats.errors_by_type["drafter"] >= 1
    assert stats.ended_by_reason == {"error": 1, "length": 1}


@pytest.mark.parametrize("every", [0, 1, 4])
def test_a_line_is_logged_every_so_many_steps(caplog, every):
    with caplog.at_level(logging.INFO, "pyrosome.engine.engine"):
        engine = engine_of(log_every=every)
        run(engine, [asked("a", 20, 9), asked("b", 30, 5, 100)])
    lines = [r.getMessage() for r in caplog.records if "tok/s computed" in r.getMessage()]
    assert engine.stats.steps == 9 and len(lines) == (9 // every if every else 0)
    assert all(r.levelno == logging.INFO for r in caplog.records)
    if every == 4:
        assert lines[0].startswith("2 running, 0 waiting; ") and lines[1].startswith("1 running, 0 waiting; ")
