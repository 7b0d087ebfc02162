"""Whatever goes wrong with one request ends that one, with its id and a reason; the others say what they would have."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from pyrosome.cache import tiers
from pyrosome.engine.guide import Guide
from tests.engine.engines import CONFIG, Eager, bytes_for, drain, engine_of, is_empty, request, run, take
from tests.networks import agreeing_network, build_network, tokens

REQUESTS = [
    request("a", 3, 12),
    request("b", 300, 12, 7, temperature=1.0, seed=3),
    request("c", 130, 12, 40, logprobs=2),
    request("d", 64, 12, 9, n=2, temperature=0.8, seed=1),
]


@pytest.fixture(scope="module")
def expected():
    return answers(run(engine_of(), REQUESTS))


def answers(said, without=()):
    return {key: s.answer for key, s in said.items() if key[0] not in without}


def only_that_one_failed(said, name, message, expected):
    ends = [s.end for key, s in said.items() if key[0] == name]
    assert all(e.reason == "error" and f"request {name}: " in e.error and message in e.error for e in ends), ends
    assert answers(said, {name}) == {k: v for k, v in expected.items() if k[0] != name}


# The model


class Breaking:
    """A forward that fails whenever a span holds that id."""

    def __init__(self, engine, token, error, *, half_way=False):
        self.forward, self.token, self.error, self.half_way = engine.runner.forward, token, error, half_way
        self.pool, self.calls = engine.runner.pool, 0
        engine.runner.forward = self

    def __call__(self, spans, rows, **kwargs):
        if any(self.token in ids for _, ids in spans):
            self.calls += 1
            if self.half_way:  # after some layers have written
                layers = self.pool.layers
                self.pool.layers = lambda step: Failing(layers(step), self.error)
                try:
                    return self.forward(spans, rows, **kwargs)
                finally:
                    self.pool.layers = layers
            raise self.error
        return self.forward(spans, rows, **kwargs)


class Failing(list):
    """Layers of which the last cannot be had."""

    def __init__(self, layers, error):
        super().__init__(layers)
        self.error = error

    def __getitem__(self, index):
        if index in (len(self) - 1, -1):
            raise self.error
        return super().__getitem__(index)

    def __iter__(self):
        return (self[i] for i in range(len(self)))


BAD = 77  # an id in no other prompt: what is made of it is the fault


def without_bad(ids):
    return [78 if i == BAD else i for i in ids]


def prompts(*requests):
    """The same requests with `BAD` kept for whoever brings it."""
    return [with_ids(r, without_bad(r.ids)) for r in requests]


def with_ids(r, ids):
    return dataclasses.replace(r, ids=tuple(ids))


@pytest.mark.parametrize("step_tokens", [64, 2048])
@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("at", [0, 100, 259])
def test_a_step_that_fails_over_one_request_s_ids_ends_that_request_alone(at, half_way, step_tokens):
    others = prompts(*REQUESTS)
    expected = answers(run(engine_of(), others))
    assert all(BAD not in said[0] for said in expected.values()), "what is said is not taken for the fault"
    ids = without_bad(tokens(260, seed=4))
    engine = engine_of(step_tokens=step_tokens)
    broken = Breaking(engine, BAD, RuntimeError("no luck"), half_way=half_way)
    bad = with_ids(request("bad", 3), [*ids[:at], BAD, *ids[at + 1 :]])
    said = run(engine, [*others[:2], bad, *others[2:]])
    assert broken.calls and engine.stats.errors_by_type == {"EngineError": 1}
    only_that_one_failed(said, "bad", "RuntimeError: no luck", expected)
    assert is_empty(engine)


@pytest.mark.parametrize("at", [0, 5, 127, 128, 200, 259])
def test_values_that_are_no_numbers_end_their_request_and_reach_nobody_else(at):
    net = build_network(CONFIG)
    net.embed.value[BAD] = float("nan")
    others = prompts(*REQUESTS)
    expected = answers(run(engine_of(net), others))
    assert all(BAD not in said[0] for said in expected.values())
    ids = without_bad(tokens(260, seed=4))
    bad = [*ids[:at], BAD, *ids[at + 1 :]]
    engine = engine_of(net, cache_bytes=bytes_for(CONFIG, 1024, 8), step_tokens=100)
    said = run(engine, [*others[:2], with_ids(request("bad", 3), bad), *others[2:]])
    only_that_one_failed(said, "bad", "no numbers", expected)
    # Its pages are somebody else's now, and what it computed is nobody's prefix.
    again = run(engine, [*others, with_ids(request("whole", 3), ids)])
    whole = run(engine_of(net), [with_ids(request("whole", 3), ids)])
    assert answers(again) == {**expected, **answers(whole)}
    assert is_empty(engine)


def test_a_session_whose_turn_failed_is_as_it_was_before(expected):
    net = build_network(CONFIG)
    net.embed.value[BAD] = float("nan")
    ids = without_bad(tokens(200, seed=4))
    engine = engine_of(net)
    session = engine.call("session_open", ids=ids)
    first = run(engine, [with_ids(request("first", 0, session=session), [])])["first", 0]
    failed = run(engine, [with_ids(request("failed", 0, session=session), [5, BAD, 6])])["failed", 0]
    assert failed.end.reason == "error" and failed.end.output_tokens == 0 == len(failed.tokens)
    assert engine.call("session_ids", session=session) == [*ids, *first.tokens]
    after = run(engine, [with_ids(request("after", 0, session=session), [5, 6])])["after", 0]
    plain = run(engine_of(net), [with_ids(request("plain", 0), [*ids, *first.tokens, 5, 6])])["plain", 0]
    assert after.answer == plain.answer
    engine.call("session_close", session=session)
    assert is_empty(engine)


def test_all_completions_of_a_request_that_never_began_are_told():
    engine = engine_of()
    Breaking(engine, BAD, RuntimeError("no luck"))
    bad = with_ids(request("bad", 0, n=3), [BAD])
    said = run(engine, [bad])
    assert [said["bad", i].end.reason for i in range(3)] == ["error"] * 3
    assert sum(engine.stats.ended_by_reason.values()) == 3 and is_empty(engine)


def test_a_step_that_always_fails_ends_everybody_and_the_engine_goes_on(expected):
    engine = engine_of()
    forward = engine.runner.forward

    def fails(*args, **kwargs):
        raise MemoryError("no room for the workspace")

    engine.runner.forward = fails
    said = run(engine, REQUESTS)
    assert all(s.end.reason == "error" and "MemoryError: no room" in s.end.error for s in said.values())
    engine.runner.forward = forward
    assert answers(run(engine, REQUESTS)) == expected and is_empty(engine)


# Grammars


@pytest.mark.parametrize("method", ["prepare", "mask", "accept", "forced", "usable"])
def test_a_grammar_that_fails_in_the_middle_ends_its_request_alone(monkeypatch, method):
    net = agreeing_network()
    plain = [request("a", 30, 20), request("b", 140, 20, 5)]
    expected = answers(run(engine_of(net, drafter="mtp"), plain))
    monkeypatch.setattr("pyrosome.engine.drafting.Depth", Eager)
    engine = engine_of(net, drafter="mtp")
    real, calls, bad = getattr(Guide, method), [], request("bad", 40, 20, 11, temperature=0)
    guides = []

    def fails(self, *args):
        if guides and self is guides[0]:
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("the grammar is stuck")
        return real(self, *args)

    monkeypatch.setattr(Guide, method, fails)
    for r in (plain[0], bad, plain[1]):
        engine.add(r)
    guides += [c.guide for c in engine.completions if c.request.id == "bad"]
    said = drain(engine)
    assert len(calls) == 3
    only_that_one_failed(said, "bad", "the grammar is stuck", expected)
    assert is_empty(engine)


# The disk


@pytest.mark.parametrize("fault", ["full", "read-only", "gone", "unreadable", "damaged"])
def test_a_disk_that_fails_costs_time_and_no_answer(tmp_path, monkeypatch, fault):
    """Four long prompts take turns in a cache for two, so that each turn finds its history on disk, or does not."""
    folder = tmp_path / "tier"
    options = {"cache_bytes": bytes_for(CONFIG, 800, 2), "max_sequences": 2, "disk_path": str(folder)}
    turns = [request(f"{n}-{turn}", 500 + 130 * turn, 4, 700 * n) for turn in range(3) for n in range(4)]
    expected = {}
    for r in turns:
        expected |= answers(run(engine_of(), [r]))
    engine, said = engine_of(**options), {}
    for i, r in enumerate(turns):
        if i == 8:
            assert engine.stats.reused_tokens > 1000, "it works before"
            assert list(folder.iterdir()), "something was written before"
            _break_disk(fault, folder, monkeypatch)
        said |= run(engine, [r])
    assert answers(said) == expected
    if fault == "full":
        assert not engine.tree.tiers._can_write
    assert is_empty(engine)
    engine.close()


def _break_disk(fault: str, folder: Path, monkeypatch) -> None:
    def refuse(number):
        def fails(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        return fails

    if fault == "full":
        monkeypatch.setattr(tiers.tempfile, "mkstemp", refuse(errno.ENOSPC))
    elif fault == "read-only":
        monkeypatch.setattr(tiers.os, "replace", refuse(errno.EROFS))
    elif fault == "gone":
        shutil.rmtree(folder)
    elif fault == "unreadable":
        monkeypatch.setattr(Path, "read_bytes", refuse(errno.EIO))
    else:
        for file in folder.iterdir():
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 1
            file.write_bytes(raw)


# All at once


def test_faults_in_the_middle_of_a_crowd_leave_pages_as_they_were(expected):
    """Every few steps another step fails, by turns before it has begun and half-way."""
    engine = engine_of(step_tokens=100, max_sequences=3, self_check=1.0)
    forward, count = engine.runner.forward, [0]

    def fails(spans, rows, **kwargs):
        count[0] += 1
        if count[0] % 5 == 0:
            raise RuntimeError("before")
        out = forward(spans, rows, **kwargs)
        if count[0] % 7 == 0:
            for sequence, _ in spans:
                sequence.is_broken = True
            raise RuntimeError("after it had written")
        return out

    engine.runner.forward = fails
    said = {}
    for r in REQUESTS:
        engine.add(r)
    while engine.has_work:
        take(engine.step(), said)
    ends = [s.end for s in said.values()]
    assert all(e.reason == "length" or (e.reason == "error" and e.error) for e in ends)
    for key, s in said.items():
        if s.end.reason == "length":
            assert s.answer == expected[key]
    engine.runner.forward = forward
    assert answers(run(engine, REQUESTS)) == expected and engine.stats.self_check_failures == 0
    assert torch.is_tensor(engine.runner.pool.draft_hidden) and is_empty(engine)
