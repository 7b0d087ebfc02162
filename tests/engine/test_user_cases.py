"""What has gone wrong for users of other engines: prefixes, drafts, lengths, cancellation, by the ids of the cases.

`HELD` names the tests elsewhere that hold a case; the others are below.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from pyrosome.engine.drafting import Drafter
from pyrosome.engine.request import Ended, TokenEvent
from pyrosome.engine.speculate import Depth, StepCost
from pyrosome.engine.worker import Waiting
from tests.engine.engines import CONFIG, IDS, Eager, bytes_for, engine_of, is_empty, request, run, take, watched
from tests.networks import agreeing_network

HELD = {
    "SPEC-01": "tests.engine.test_drafts:test_the_head_s_drafts_leave_tokens_and_probabilities_as_they_are",
    "SPEC-02": "tests.invariance.test_routes:test_rejected_drafts_are_a_length_set_back",
    "SPEC-07": "tests.engine.test_engine:test_a_checkpoint_without_the_head_asked_for_says_what_it_has",
    "LONG-02": "tests.invariance.test_routes:test_token_by_token_and_every_length",
    "LONG-05": "tests.invariance.test_routes:test_later_tokens_never_change_earlier_logits",
    "LONG-11": "tests.engine.test_process_real:test_killed_at_any_moment_it_is_started_again_and_says_the_same",
    "LONG-14": "tests.invariance.test_routes:test_padding_changes_nothing",
    "SRV-01": "tests.engine.test_engine:test_a_prompt_aborted_half_way_is_not_computed_again",
    "SRV-02": "tests.engine.test_engine:test_a_request_aborted_while_it_waits_never_starts",
    "SRV-05": "tests.engine.test_stats:test_gauges_tell_what_runs_and_waits",
    "SRV-07": "tests.engine.test_faults:test_values_that_are_no_numbers_end_their_request_and_reach_nobody_else",
}
# Of a server, a planner, or a draft head that is not there yet: the issue that builds it takes them.
ELSEWHERE = {"SPEC-05", "LONG-01", "LONG-09", "LONG-10", "SRV-04", "SRV-06"}


def test_every_case_of_the_engine_has_its_test():
    lines = (Path(__file__).parent.parent / "data" / "user_cases.jsonl").read_text(encoding="utf-8").splitlines()
    cases = {c["id"] for c in map(json.loads, lines) if re.match(r"(CACHE|SPEC|LONG|SRV)-", c["id"])}
    here = {m[1].replace("_", "-") for n in globals() if (m := re.match(r"test_([A-Z]+_\d+)_", n))}
    assert cases == here | set(HELD) | ELSEWHERE
    assert not here & (set(HELD) | ELSEWHERE)
    for where in HELD.values():
        module, _, name = where.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), where


# Prefixes


def test_CACHE_02_a_hit_of_any_length_answers_as_no_hit_does():
    engine = engine_of()
    run(engine, [request("first", 500)])
    for shared in (128, 129, 130, 131, 255, 256, 257, 383, 385, 386, 387, 499):
        r = dataclasses.replace(request(f"{shared}", 0), ids=(*IDS[:shared], *IDS[1000:1040]))
        said = run(engine, [r])[r.id, 0]
        assert said.answer == run(engine_of(), [r])[r.id, 0].answer
        assert said.end.reuse.matched_tokens == shared // 128 * 128


def test_CACHE_03_a_block_that_went_bad_is_found_dropped_and_computed_anew():
    engine = engine_of(self_check=1.0)
    run(engine, [request("first", 300)])
    for plane in (p for planes in engine.runner.pool.planes.values() for p in planes):
        plane[64:] = 1  # every page, past the one that is nobody's
    said = run(engine, [request("again", 300), request("other", 200, start=700)])
    for r in (request("again", 300), request("other", 200, start=700)):
        assert said[r.id, 0].answer == run(engine_of(), [r])[r.id, 0].answer
    assert engine.stats.self_check_failures == 1
    third = run(engine, [request("third", 300)])["third", 0]
    assert third.answer == said["again", 0].answer and third.end.reuse.reused_tokens
    assert engine.stats.self_check_failures == 1


def test_CACHE_04_a_prompt_of_a_thousand_tokens_is_found_again():
    engine = engine_of()
    first, again = (run(engine, [request(name, 1000)])[name, 0] for name in ("first", "again"))
    assert again.answer == first.answer and again.end.reuse.reused_tokens >= 768
    assert first.end.reuse.limit == "no common prefix" and "token 0" in first.end.reuse.reason


def test_CACHE_06_an_agent_s_turns_reuse_what_they_share_whatever_else_runs():
    """With drafts, host memory and other requests in between, as a long session has them."""
    net = agreeing_network()
    engine = engine_of(net, drafter="mtp", cache_bytes=bytes_for(net.config, 1500, 4), max_sequences=4,
                       host_bytes=1 << 24)  # fmt: skip
    ids, shared = IDS[:700], 0
    for turn in range(6):
        r = dataclasses.replace(request(f"turn {turn}", 0, 20), ids=tuple(ids))
        said = run(engine, [r, request(f"other {turn}", 200, 5, 1500 + 200 * turn)])[r.id, 0]
        if turn:
            assert said.end.reuse.reused_tokens >= 0.9 * (shared - 128)
        shared = len(ids) + len(said.tokens)
        ids = [*ids, *said.tokens, *IDS[2000 + 60 * turn : 2060 + 60 * turn]]


def test_CACHE_07_a_prompt_whose_end_the_next_turn_leaves_out_has_its_state_where_they_part():
    """A chat that thinks renders the last turn anew without its thoughts: `stable` says how far it will be the same."""
    engine = engine_of()
    before = request("first", 450, 40, stable=390)
    run(engine, [before])
    then = dataclasses.replace(request("second", 0), ids=(*IDS[:390], *IDS[1000:1100]))
    said = run(engine, [then])["second", 0]
    assert said.end.reuse.reused_tokens == 384 and said.end.reuse.replayed_tokens == 0
    assert said.answer == run(engine_of(), [then])["second", 0].answer


def test_CACHE_08_entries_cut_short_by_a_crash_are_removed_and_computed_once(tmp_path):
    options = {"disk_path": str(tmp_path), "host_bytes": 1 << 20}
    first = engine_of(**options)
    expected = run(first, [request("r", 700)])["r", 0].answer
    first.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 5
    for file in files[::2]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    second = engine_of(**options)
    steps = watched(second)
    said = run(second, [request("r", 700)])["r", 0]
    assert said.answer == expected and sum(n for spans in steps for _, n in spans) <= 700 + 8
    assert run(second, [request("again", 700)])["again", 0].end.reuse.reused_tokens == 640


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 257, 383, 384, 385])
def test_CACHE_09_a_prompt_that_is_known_whole_computes_its_last_token(length):
    engine = engine_of()
    first, again = (run(engine, [request(name, length)])[name, 0] for name in ("first", "again"))
    assert again.answer == first.answer
    found = again.end.reuse
    assert found.matched_tokens == found.reused_tokens + found.replayed_tokens == (length - 1) // 128 * 128


def test_CACHE_10_what_ends_for_a_request_that_is_gone_is_ignored():
    """A client leaves while its history is in host memory, or on its way; its request is aborted twice."""
    engine = engine_of(cache_bytes=bytes_for(CONFIG, 800, 2), max_sequences=2, host_bytes=1 << 24)
    waiting, heard = Waiting(), []
    for i in range(6):
        r = request(f"{i}", 500, 6, 300 * i)
        engine.add(r)
        waiting.add(r, heard.extend)
    for at in range(40):
        events = engine.step()
        gone = str(at % 6)
        engine.abort(gone)
        waiting.deliver(events)
        assert waiting.deliver([TokenEvent("nobody", 0, 1, {}), Ended("nobody", 0, "stop")]) == []
        assert waiting.deliver(events) == [], "told twice"
    assert not engine.has_work and sum(isinstance(e, Ended) for e in heard) == 6
    assert is_empty(engine)


# Drafts


class Says(Drafter):
    """Drafts one id, over and over."""

    def __init__(self, token):
        self.token, self.cost, self.max_drafts = token, StepCost(), 3

    def depth(self) -> Depth:
        return Eager(3, self.cost)

    def propose(self, served, forward) -> None:
        for c, _ in served:
            if c.track.sequence is not None and c.is_decoding:
                c.drafts = [self.token] * 3


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_SPEC_04_an_end_is_never_accepted_within_reasoning_because_it_was_drafted(temperature):
    end, think_end = CONFIG.eos_token_id, 9
    for r in (
        request("thinks", 40, 40, temperature=temperature, seed=3, ignore_eos=False, think_end=think_end,
                max_thinking_tokens=12),
        request("must speak", 40, 40, temperature=temperature, seed=3, ignore_eos=False, never_empty=True),
        request("must say much", 40, 40, temperature=temperature, seed=3, ignore_eos=False, min_tokens=30),
    ):  # fmt: skip
        plain = run(engine_of(), [r])[r.id, 0]
        for token in (end, think_end):
            engine = engine_of()
            engine.drafter = Says(token)
            said = run(engine, [r])[r.id, 0]
            assert said.answer == plain.answer
        if r.id == "thinks":
            assert end not in said.tokens[: said.tokens.index(think_end) + 1]
        assert len(said.tokens) > max(1, r.params.min_tokens - 1)


# Company


def test_LONG_12_identical_prompts_at_once_say_the_same():
    alone = run(engine_of(), [request("0", 77, 10)])["0", 0].answer
    for n in (2, 5, 16):
        said = run(engine_of(max_sequences=n), [request(str(i), 77, 10) for i in range(n)])
        assert [s.answer for s in said.values()] == [alone] * n


def test_SRV_03_to_cancel_who_waits_touches_nobody_who_runs():
    expected = run(engine_of(), [request("a", 20, 12)])["a", 0].answer
    engine, said = engine_of(max_sequences=1), {}
    engine.add(request("a", 20, 12))
    engine.add(request("b", 30, 12))
    for _ in range(4):
        take(engine.step(), said)
    engine.abort("b")
    while engine.has_work:
        take(engine.step(), said)
    assert said["a", 0].answer == expected and said["b", 0].end.reason == "abort" and not said["b", 0].tokens
    assert is_empty(engine)
