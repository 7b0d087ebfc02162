"""Drafts change how many steps an answer takes, and not one bit of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pyrosome.engine.drafting import Drafter
from pyrosome.engine.speculate import Depth, StepCost
from pyrosome.options import Constraint
from tests.engine.engines import Eager, drain, engine_of, is_empty, request, run, take
from tests.networks import agreeing_network

NET = {name: lambda name=name: agreeing_network((0, 4, 128), name) for name in ("exact", "trained")}
REQUESTS = [
    request("a", 1, 60),
    request("b", 126, 60, 3),
    request("c", 300, 40, 9, temperature=1.0, seed=5),
    request("d", 70, 60, 20, logprobs=2),
    request("e", 4, 60, 40, temperature=0.8, seed=1, top_k=20, frequency_penalty=0.5),
    request("f", 127, 60, 1, temperature=1.0, top_p=0.9, seed=4, repetition_penalty=1.1),
]


def answers(said):
    return {key: s.answer for key, s in said.items()}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """How long steps take decides nothing here."""
    monkeypatch.setattr("pyrosome.engine.drafting.Depth", Eager)


@pytest.fixture(scope="module")
def plain():
    return {name: answers(run(engine_of(net()), REQUESTS)) for name, net in NET.items()}


@pytest.mark.parametrize("numerics", NET)
@pytest.mark.parametrize("most", range(1, 9))
def test_the_head_s_drafts_leave_tokens_and_probabilities_as_they_are(plain, numerics, most):
    engine = engine_of(NET[numerics](), drafter="mtp", max_drafts=most)
    said = run(engine, REQUESTS)
    assert answers(said) == plain[numerics]
    accepted, drafted = engine.stats.accepted, engine.stats.drafted
    assert len(accepted) == most and accepted[0] > 50 and accepted[0] / drafted[0] > 0.3
    assert all(a >= b for a, b in pairwise(accepted))
    if most > 1:
        assert accepted[1] > 20, "the head's own streams lead on to a deeper draft"
    assert engine.stats.steps < max(r.params.max_tokens for r in REQUESTS)
    assert is_empty(engine)


@pytest.mark.parametrize("numerics", NET)
def test_small_steps_parks_and_hits_beside_drafts(plain, numerics):
    engine = engine_of(NET[numerics](), drafter="mtp", max_drafts=4, step_tokens=24, max_sequences=3)
    assert answers(run(engine, REQUESTS)) == plain[numerics]
    again = run(engine, REQUESTS)
    assert answers(again) == plain[numerics]
    assert again["c", 0].end.reuse.reused_tokens == 256 and sum(engine.stats.accepted) > 0


@pytest.mark.parametrize("numerics", NET)
def test_what_was_said_before_is_drafted_again(plain, numerics):
    requests = [request("r", 1, 120), *REQUESTS]
    net = NET[numerics]()
    engine = engine_of(net, drafter="lookup", max_drafts=8)
    assert answers(run(engine, requests)) == answers(run(engine_of(net), requests))
    assert engine.stats.accepted[0] > 10


class Oracle(Drafter):
    """Knows the answers, and is wrong at every so manieth token."""

    def __init__(self, right: dict[tuple[str, int], list[int]], most: int, wrong_every: int) -> None:
        self.right, self.most, self.wrong_every, self.cost = right, most, wrong_every, StepCost()

    def depth(self) -> Depth:
        return Eager(self.most, self.cost)

    def propose(self, served, forward) -> None:
        for c, _ in served:
            if c.track.sequence is not None and c.is_decoding:
                at = c.output_tokens
                c.drafts = self.right[c.request.id, c.index][at : at + self.most]
                for i in range(len(c.drafts)):
                    if (at + i) % self.wrong_every == 0:
                        c.drafts[i] = (c.drafts[i] + 1) % 160


@pytest.mark.parametrize("most", range(1, 9))
@pytest.mark.parametrize("wrong_every", [2, 3, 7, 1000])
def test_any_number_of_drafts_any_number_of_them_accepted(plain, most, wrong_every):
    engine = engine_of(NET["exact"](), max_drafts=most)
    engine.drafter = Oracle({key: answer[0] for key, answer in plain["exact"].items()}, most, wrong_every)
    assert answers(run(engine, REQUESTS)) == plain["exact"]
    assert sum(engine.stats.accepted) > 0
    if wrong_every == 1000:
        assert engine.stats.steps <= 60 // (most + 1) + 4
    assert is_empty(engine)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_end_that_was_drafted_ends_where_it_would_have(plain, at):
    answer = plain["exact"]["b", 0][0]
    stop = answer[at]
    r = request("b", 126, 60, 3, stop_token_ids=[stop])
    engine = engine_of(NET["exact"](), max_drafts=8)
    engine.drafter = Oracle({("b", 0): answer}, 8, 1000)
    (said,) = run(engine, [r]).values()
    assert said.tokens == answer[: answer.index(stop) + 1] and said.end.reason == "stop"
    assert is_empty(engine)


def test_drafts_never_pass_the_context_s_end_or_the_tokens_asked_for(plain):
    answer = plain["exact"]["a", 0][0]
    for room, max_tokens in ((5, 60), (59, 7)):
        engine = engine_of(NET["exact"](), max_drafts=8, max_context=1 + room)
        engine.drafter = Oracle({("a", 0): answer}, 8, 1000)
        (said,) = run(engine, [request("a", 1, max_tokens)]).values()
        assert said.tokens == answer[: min(room + 1, max_tokens)] and said.end.reason == "length"


def test_a_drafter_that_fails_costs_nothing_but_its_drafts(plain, caplog):
    engine = engine_of(NET["exact"](), drafter="mtp")
    propose, calls = engine.drafter.propose, []

    def fails(served, forward):
        calls.append(None)
        if len(calls) % 2:
            raise RuntimeError("no luck")
        propose(served, forward)

    engine.drafter.propose = fails
    assert answers(run(engine, REQUESTS)) == plain["exact"]
    assert engine.stats.errors_by_type["drafter"] == (len(calls) + 1) // 2
    assert "goes on without drafts" in caplog.text and is_empty(engine)


def test_a_head_that_failed_half_way_drafts_again(plain, monkeypatch):
    engine = engine_of(NET["exact"](), drafter="mtp")
    stage, calls = type(engine.runner.model.draft_stage), []
    streams = stage.streams

    def fails(self, *args):
        calls.append(None)
        if len(calls) == 5:
            raise RuntimeError("no luck")
        return streams(self, *args)

    monkeypatch.setattr(stage, "streams", fails)
    assert answers(run(engine, REQUESTS)) == plain["exact"]
    assert engine.stats.accepted[0] > 20


def test_completions_of_one_prompt_draft_each_for_itself(plain):
    r = request("r", 200, 30, n=3, temperature=1.0, seed=9)
    expected = answers(run(engine_of(NET["exact"]()), [r]))
    engine = engine_of(NET["exact"](), drafter="mtp", max_drafts=4)
    assert answers(run(engine, [r])) == expected and sum(engine.stats.accepted) > 0


def test_hits_after_a_turn_with_drafts_find_true_rows(plain):
    """Rows of refused drafts stood in pages that the prefix tree now shares: nobody reads them."""
    engine = engine_of(NET["exact"](), max_drafts=8)
    engine.drafter = Oracle({key: answer[0] for key, answer in plain["exact"].items()}, 8, 3)
    said = run(engine, REQUESTS)
    turns = [request(r.id + "2", 0, 20) for r in REQUESTS]
    for r, turn in zip(REQUESTS, turns, strict=True):
        ids = (*r.ids, *said[r.id, 0].tokens, 7, 8, 9)
        object.__setattr__(turn, "ids", ids)
    engine.drafter = engine_of(NET["exact"]()).drafter
    hit = run(engine, turns)
    assert answers(hit) == answers(run(engine_of(NET["exact"]()), turns))
    assert sum(s.end.reuse.reused_tokens for s in hit.values()) > 500


def test_lengths_and_rings_are_whole_after_every_step(plain):
    """Between steps a sequence's length is that of its ids but the last."""
    engine = engine_of(NET["exact"](), max_drafts=5)
    engine.drafter = Oracle({key: answer[0] for key, answer in plain["exact"].items()}, 5, 4)
    for r in REQUESTS:
        engine.add(r)
    said = {}
    while engine.has_work:
        take(engine.step(), said)
        for c in engine.completions:
            if c.is_decoding:
                assert c.num_pending == 1
    assert drain(engine) == {} and torch.is_inference_mode_enabled() is False


def test_a_constraint_kind_that_is_unknown_is_refused_before_anything_runs():
    engine = engine_of()
    from pyrosome.errors import RequestError

    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        engine.add(request("r", 3, constraint=Constraint("poem", "")))
    assert not engine.has_work
