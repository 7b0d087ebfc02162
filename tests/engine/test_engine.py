"""Many requests at once: each gets what it gets alone, ends where it should, and frees what it held."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch

from pyrosome.errors import ContextTooLong, DoesNotFit, RequestError
from pyrosome.options import EngineOptions
from tests.engine.engines import CONFIG, IDS, drain, engine_of, is_empty, request, run, take, watched
from tests.networks import network

MIXED = [
    request("a", 1, 20),
    request("b", 147, 12, 3, temperature=1.0, seed=5),
    request("c", 3, 30, 9, seed=5, temperature=0.7, top_p=0.9, logprobs=3),
    request("d", 70, 5, 20, logprobs=0),
    request("e", 4, 25, 40, temperature=1.0, seed=1, top_k=20, frequency_penalty=0.5, presence_penalty=0.5),
    request("f", 127, 9, 1, repetition_penalty=1.3),
    request("g", 128, 8, temperature=1.0, seed=2**64 - 1, min_p=0.02),
    request("h", 33, 1, 5),
    request("i", 300, 4, 7),
]


def alone(r):
    return run(engine_of(), [r])


@pytest.fixture(scope="module")
def expected():
    return {key: said.answer for r in MIXED for key, said in alone(r).items()}


def answers(said):
    return {key: s.answer for key, s in said.items()}


@pytest.mark.parametrize(("slots", "step_tokens"), [(9, 2048), (3, 2048), (3, 16), (2, 5), (1, 1), (8, 64)])
def test_requests_that_share_steps_give_what_each_gives_alone(expected, slots, step_tokens):
    engine = engine_of(max_sequences=slots, step_tokens=step_tokens)
    steps = watched(engine)
    assert answers(run(engine, MIXED)) == expected
    assert max(sum(n for _, n in spans) for spans in steps) <= step_tokens
    most = max(len(spans) for spans in steps)
    assert most <= slots and (most > 1) == (slots > 1)
    assert is_empty(engine)


def test_steps_are_really_shared():
    engine = engine_of()
    steps = watched(engine)
    run(engine, [request(str(i), 5, 10, i) for i in range(4)])
    assert [len(spans) for spans in steps] == [4] * 10


def test_every_token_is_computed_once():
    engine = engine_of(max_sequences=3, step_tokens=50)
    steps = watched(engine)
    said = run(engine, MIXED)
    reused = sum(s.end.reuse.reused_tokens for s in said.values())
    total = sum(len(r.ids) + r.params.max_tokens - 1 for r in MIXED)  # the last token sampled is never fed back
    assert sum(n for spans in steps for _, n in spans) == total - reused == engine.stats.computed_tokens


def test_a_long_prompt_makes_nobody_wait():
    """Two that generate get a token every step while a third, first in line, reads in what is left of the budget."""
    engine = engine_of(step_tokens=12)
    steps = watched(engine)
    for r in (request("long", 200, 2, 11), request("x", 3, 40), request("y", 4, 40, 7)):
        engine.add(r)
    before = []
    while "long" not in (said := [e.request for e in engine.step()]):
        before.append(said)
    assert len(before) > 15 and before[2:] == [["x", "y"]] * (len(before) - 2)
    assert all(sum(n for _, n in spans) <= 12 for spans in steps)
    drain(engine)


def test_short_prompts_are_not_behind_a_long_one():
    engine = engine_of(step_tokens=64)
    said, ended = {}, []
    for r in (request("long", 1500, 1), request("short", 40, 1, 7)):
        engine.add(r)
    while engine.has_work:
        ended += [e.request for e in engine.step() if hasattr(e, "reason")]
        said.update()
    assert ended == ["short", "long"]


def test_a_budget_smaller_than_the_requests_starves_nobody():
    requests = [request(str(i), 1, 12, i) for i in range(3)]
    engine, order = engine_of(step_tokens=2), []
    for r in requests:
        engine.add(r)
    while engine.has_work:
        order += [(e.request, hasattr(e, "reason")) for e in engine.step()]
    first_end = next(i for i, (_, ended) in enumerate(order) if ended)
    assert first_end >= 30, "all three end together"


def test_a_lower_priority_waits_and_does_not_starve():
    """One slot: the later request of a higher priority sets the earlier aside, which goes on after it unharmed."""
    low, high = request("low", 150, 30), request("high", 20, 10, 5, priority=1)
    engine, said, order = engine_of(max_sequences=1), {}, []
    engine.add(low)
    for _ in range(5):
        take(engine.step(), said)
    engine.add(high)
    while engine.has_work:
        events = engine.step()
        order += [e.request for e in events if hasattr(e, "reason")]
        take(events, said)
    assert order == ["high", "low"]
    assert answers(said) == answers(alone(low) | alone(high))
    assert said["low", 0].end.timeline.num_parks == 1


def test_the_first_steps_of_a_low_priority_come_though_high_ones_never_end(monkeypatch):
    monkeypatch.setattr("pyrosome.engine.track.AGING_STEPS", 4)
    engine, served = engine_of(max_sequences=1), set()
    engine.add(request("low", 5, 2))
    for i in range(30):
        engine.add(request(f"high{i}", 5, 3, i, priority=3))
        served |= {e.request for e in engine.step()}
    assert "low" in served


def test_completions_of_one_prompt_share_it():
    r = request("r", 300, 6, n=4, temperature=1.0, seed=3)
    engine = engine_of()
    said = run(engine, [r])
    assert len({tuple(s.tokens) for s in said.values()}) == 4 and len(said) == 4
    assert engine.stats.computed_tokens == 300 + 4 * 5
    few = run(engine_of(max_sequences=2, drafter="mtp"), [r])
    assert answers(few) == answers(said)
    first = run(engine_of(), [request("r", 300, 6, temperature=1.0, seed=3)])
    assert first["r", 0].tokens == said["r", 0].tokens, "the first is what one alone would be"


# Ends.


@pytest.fixture(scope="module")
def free():
    """What the model says when nothing stops it: tokens, each seen for the first time at its index."""
    said = sampled()["r", 0].tokens
    at = [i for i in range(2, 39) if said[i] not in said[:i]]
    assert at
    return said, at[0]


def sampled(engine=None, **params):
    return run(engine or engine_of(), [request("r", 20, **{"max_tokens": 40, "temperature": 1.0, "seed": 3, **params})])


def ends(engine=None, **params):
    said = sampled(engine, **params)["r", 0]
    return said.tokens, said.end.reason


def test_max_tokens(free):
    said, _ = free
    for n in (1, 2, 39, 40):
        assert ends(max_tokens=n) == (said[:n], "length")


def test_a_stop_id_ends_with_itself(free):
    said, at = free
    assert ends(stop_token_ids=[159, said[at]] if 159 not in said[:at] else [said[at]]) == (said[: at + 1], "stop")
    assert ends(max_tokens=at + 1, stop_token_ids=[said[at]]) == (said[: at + 1], "stop"), "also as the last one"


def test_the_end_of_sequence_ends_with_itself_unless_it_is_ignored(free):
    said, at = free

    def with_eos():
        net = copy.copy(network(CONFIG))
        net.config = dataclasses.replace(CONFIG, eos_token_id=said[at])
        return engine_of(net)

    assert ends(with_eos(), ignore_eos=False) == (said[: at + 1], "stop")
    assert ends(with_eos()) == (said, "length")


@pytest.mark.parametrize("room", [0, 1, 7])
def test_the_context_s_end(free, room):
    said, _ = free
    engine = engine_of(max_context=20 + room)
    assert ends(engine) == (said[: room + 1], "length")  # the last one needs no place: it is never read
    assert is_empty(engine)


def test_an_impossible_request_is_refused_at_once_with_numbers():
    engine = engine_of(max_context=256)
    with pytest.raises(ContextTooLong, match="257 tokens were asked for and the context holds 256"):
        engine.add(request("r", 257))
    with pytest.raises(RequestError, match="empty prompt"):
        engine.add(request("r", 0))
    engine.add(request("r", 256, 1))
    with pytest.raises(RequestError, match="'r' is in use"):
        engine.add(request("r", 1))
    assert len(drain(engine)) == 1 and is_empty(engine)


def test_a_cache_that_holds_not_one_block_is_refused():
    with pytest.raises(DoesNotFit, match="cache_bytes"):
        engine_of(cache_bytes=1000)


def test_repetition_ends_a_request_that_asked_for_the_guard():
    (said,) = run(engine_of(), [request("r", 20, 400, max_repeats=3)]).values()
    tokens = said.tokens
    if said.end.reason == "repetition":
        assert any(tokens[-n:] == tokens[-2 * n : -n] == tokens[-3 * n : -2 * n] for n in range(1, 65))
    else:
        assert said.end.reason == "length" and len(tokens) == 400


# Cancelling.


def test_a_request_that_is_aborted_ends_before_the_next_step(expected):
    engine = engine_of(max_sequences=3, step_tokens=64)
    said = {}
    for r in MIXED:
        engine.add(r)
    while engine.has_work:
        take(engine.step(), said)
        if ("c", 0) in said and len(said["c", 0].tokens) == 4:
            engine.abort("c")
    cut = said.pop(("c", 0))
    assert cut.end.reason == "abort" and cut.tokens == expected["c", 0][0][: len(cut.tokens)] and len(cut.tokens) >= 4
    assert answers(said) == {k: v for k, v in expected.items() if k != ("c", 0)}
    assert is_empty(engine)


def test_a_request_aborted_while_it_waits_never_starts():
    engine = engine_of(max_sequences=1)
    steps = watched(engine)
    for r in (request("a", 5, 3), request("b", 60, 3), request("c", 6, 2)):
        engine.add(r)
    engine.abort("b")
    engine.abort("nobody")
    said = drain(engine)
    assert said["b", 0].end.reason == "abort" and not said["b", 0].tokens
    assert max(n for spans in steps for _, n in spans) == 6
    assert engine.stats.ended_by_reason == {"abort": 1, "length": 2}


def test_a_prompt_aborted_half_way_is_not_computed_again():
    """A client that gives up and comes back finds the part of its prompt that was done."""
    engine = engine_of(step_tokens=128)
    engine.add(request("first", 1000))
    for _ in range(5):
        engine.step()
    engine.abort("first")
    drain(engine)
    (said,) = run(engine, [request("again", 1000)]).values()
    assert said.end.reuse.reused_tokens == 640
    assert said.answer == run(engine_of(), [request("again", 1000)])["again", 0].answer


@pytest.mark.parametrize("steps", range(12))
def test_abort_at_every_point_of_a_request_s_life(steps):
    engine = engine_of(step_tokens=64, drafter="mtp", max_sequences=2)
    engine.add(request("other", 40, 6))
    engine.add(request("r", 260, 6, 3, n=2, temperature=1.0))
    said = {}
    for _ in range(steps):
        take(engine.step(), said)
    engine.abort("r")
    while engine.has_work:
        take(engine.step(), said)
    assert said["other", 0].end.reason == "length" and all(s.end for s in said.values())
    assert is_empty(engine)


def test_waiting_requests_start_in_order_as_slots_come_free():
    engine = engine_of(max_sequences=2)
    for i in range(6):
        engine.add(request(str(i), 3 + i, 4 + i, i))
    started, alive = [], set()
    while engine.has_work:
        for e in engine.step():
            if e.request not in started:
                started.append(e.request)
            alive.add(e.request)
            assert len(alive) <= 2
            if hasattr(e, "reason"):
                alive.remove(e.request)
    assert started == [str(i) for i in range(6)]


# Seeds and probabilities.


def test_one_seed_gives_the_same_tokens_wherever_it_runs_and_another_gives_others():
    requests = [request(str(i), 9, 12, temperature=1.0, seed=s) for i, s in enumerate((1, 2, 1))]
    said = run(engine_of(), requests)
    assert said["0", 0].tokens == said["2", 0].tokens != said["1", 0].tokens


def test_without_a_seed_every_request_draws_its_own_and_seeding_python_repeats_it():
    runs = []
    for _ in range(2):
        random.seed(4)
        runs.append(answers(run(engine_of(), [request(str(i), 9, 12, temperature=1.0) for i in range(3)])))
    assert runs[0] == runs[1] and len({tuple(tokens) for tokens, *_ in runs[0].values()}) == 3


def test_logprobs_are_those_of_the_whole_sequence():
    r = request("r", 30, 10, logprobs=100)
    for engine in (engine_of(), engine_of(drafter="lookup")):
        (said,) = run(engine, [r]).values()
        runner = engine_of().runner
        rows = runner.step([(runner.open(), [*r.ids, *said.tokens])], every_row=True)[0].log_softmax(-1)
        for i, (token, logprobs) in enumerate(zip(said.tokens, said.logprobs, strict=True)):
            row = rows[29 + i]
            assert token == int(row.argmax()) and len(logprobs) == 100
            assert logprobs == pytest.approx({t: float(row[t]) for t in logprobs}, abs=1e-5)
            assert torch.tensor(sorted(logprobs.values())).exp().sum() <= 1 + 1e-5


def test_a_checkpoint_without_the_head_asked_for_says_what_it_has():
    from pyrosome.engine.engine import Engine
    from pyrosome.model.build import Network
    from pyrosome.model.numerics import numerics_named

    bare = Network(CONFIG, numerics_named("exact"), drafts=False)
    bare.embed = network(CONFIG).embed
    with pytest.raises(RequestError, match=r"'mtp' was asked for and this checkpoint has no draft head.*lookup"):
        Engine(bare, "f32", EngineOptions(drafter="mtp"))
    assert len(IDS) == 3000
