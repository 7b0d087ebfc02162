"""Generation: requests that share steps give what each gives alone, end where they should, and free what they held."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch

from pyrosome.engine import generate as generate_module
from pyrosome.engine.generate import Request, generate
from pyrosome.engine.runner import Runner
from pyrosome.errors import ContextTooLong, EngineError, RequestError
from pyrosome.options import SamplingParams
from pyrosome.testing.shapes import tiny
from tests.networks import network, tokens

CONFIG = tiny((0, 4, 128))
IDS = tokens(300)
NEVER = 10**9  # an end-of-sequence id that no model emits
CONTEXT = 260


def runner_of(slots: int = 1, context: int = CONTEXT) -> Runner:
    runner = Runner(network(CONFIG), "f32", slots, context)
    runner.pool.poison()
    return runner


def watched(runner: Runner) -> list[list[tuple[int, int]]]:
    """Fills as the runner steps: per step, (length before, tokens) of each span."""
    steps, step = [], runner.step

    def watch(spans, **kwargs):
        steps.append([(s.length, len(ids)) for s, ids in spans])
        return step(spans, **kwargs)

    runner.step = watch
    return steps


def alone(request: Request, eos_id: int = NEVER):
    return list(generate(runner_of(), [request], eos_id=eos_id))


def by_request(events) -> dict[int, list]:
    found = defaultdict(list)
    for e in events:
        found[e.request].append(e)
    return found


def assert_same_events(ours, theirs) -> None:
    assert [(e.token, e.finish_reason, e.is_end_token) for e in ours] == [
        (e.token, e.finish_reason, e.is_end_token) for e in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def is_empty(runner: Runner) -> bool:
    pool = runner.pool
    return pool.num_free_slots == pool.plan.num_slots - 1 and all(
        pool.num_free_pages(r) == n - 1 for r, n in pool.plan.num_pages.items()
    )


def greedy(length: int, max_tokens: int, start: int = 0, **params) -> Request:
    return Request(IDS[start : start + length], SamplingParams(temperature=0, max_tokens=max_tokens, **params))


MIXED = [
    greedy(1, 20),
    Request(IDS[3:150], SamplingParams(max_tokens=12, seed=5)),
    Request(IDS[9:12], SamplingParams(max_tokens=30, seed=5, temperature=0.7, top_p=0.9, logprobs=3)),
    greedy(70, 5, 20, logprobs=0),
    Request(IDS[40:44], SamplingParams(max_tokens=25, seed=1, top_k=20, frequency_penalty=0.5, presence_penalty=0.5)),
    greedy(127, 9, 1, repetition_penalty=1.3),
    Request(IDS[:128], SamplingParams(max_tokens=8, seed=2**64 - 1, min_p=0.02)),
    greedy(33, 1, 5),
]


@pytest.fixture(scope="module")
def expected():
    return [alone(r) for r in MIXED]


@pytest.mark.parametrize(("slots", "step_tokens"), [(8, 2048), (3, 2048), (3, 16), (2, 5), (1, 1), (8, 64)])
def test_requests_that_share_steps_give_what_each_gives_alone(expected, slots, step_tokens):
    runner = runner_of(slots)
    steps = watched(runner)
    events = list(generate(runner, MIXED, eos_id=NEVER, step_tokens=step_tokens))
    found = by_request(events)
    for number, theirs in enumerate(expected):
        assert_same_events(found[number], theirs)
    assert max(sum(n for _, n in spans) for spans in steps) <= step_tokens
    most = max(len(spans) for spans in steps)
    assert most <= slots and (most > 1) == (slots > 1)
    assert is_empty(runner)


def test_steps_are_really_shared():
    runner = runner_of(4)
    steps = watched(runner)
    list(generate(runner, [greedy(5, 10, i) for i in range(4)], eos_id=NEVER))
    assert [len(spans) for spans in steps] == [4] * 10


def test_every_token_is_computed_once():
    runner = runner_of(3)
    steps = watched(runner)
    list(generate(runner, MIXED, eos_id=NEVER, step_tokens=50))
    total = sum(len(r.ids) + r.params.max_tokens - 1 for r in MIXED)  # the last token sampled is never fed back
    assert sum(n for spans in steps for _, n in spans) == total


def test_a_long_prompt_makes_nobody_wait():
    """Two that generate get a token every step while a third, first in line, reads in what is left of the budget."""
    runner = runner_of(3)
    steps = watched(runner)
    requests = [greedy(200, 2, 11), greedy(3, 40), greedy(4, 40, 7)]
    events = list(generate(runner, requests, eos_id=NEVER, step_tokens=12))
    first = next(i for i, e in enumerate(events) if e.request == 0)
    assert [e.request for e in events[:first]] == [1, 2] * (first // 2) and first > 30
    for spans in steps:
        assert [n for _, n in spans] == sorted(n for _, n in spans), "single tokens come first"
    parts = [n for spans in steps for start, n in spans if n > 4]
    assert parts[0] == 5 and set(parts[1:-1]) == {10} and sum(parts) == 200


@pytest.mark.parametrize("step_tokens", [1, 2, 7, 64, 149, 150, 151])
def test_a_prompt_is_cut_by_the_budget(step_tokens):
    request, runner = greedy(150, 6), runner_of()
    steps = watched(runner)
    assert_same_events(list(generate(runner, [request], eos_id=NEVER, step_tokens=step_tokens)), alone(request))
    full, rest = divmod(150, step_tokens)
    assert [n for spans in steps for _, n in spans] == [step_tokens] * full + [rest] * (rest > 0) + [1] * 5


@pytest.mark.parametrize("step_tokens", [0, -1])
def test_a_budget_of_nothing_is_refused(monkeypatch, step_tokens):
    turns, schedule = [], generate_module._schedule

    def watch(*args):
        turns.append(None)
        assert len(turns) < 1000, "generate turns without a step"
        return schedule(*args)

    monkeypatch.setattr(generate_module, "_schedule", watch)
    with pytest.raises(RequestError):
        list(generate(runner_of(), [greedy(3, 3)], eos_id=NEVER, step_tokens=step_tokens))


# Ends.


@pytest.fixture(scope="module")
def free():
    """What the model says when nothing stops it: tokens, each seen for the first time at its index."""
    said = [e.token for e in alone(Request(IDS[:20], SamplingParams(max_tokens=40, seed=3)))]
    at = [i for i in range(2, 39) if said[i] not in said[:i]]
    assert at
    return said, at[0]


def sampled(**params) -> Request:
    return Request(IDS[:20], SamplingParams(**{"max_tokens": 40, "seed": 3, **params}))


def ends(request, eos_id: int = NEVER):
    events = alone(request, eos_id)
    assert all(e.finish_reason is None and not e.is_end_token for e in events[:-1])
    return [e.token for e in events], events[-1].finish_reason, events[-1].is_end_token


def test_max_tokens(free):
    said, _ = free
    for n in (1, 2, 39, 40):
        assert ends(sampled(max_tokens=n)) == (said[:n], "length", False)


def test_a_stop_id_ends_with_itself(free):
    said, at = free
    assert ends(sampled(stop_token_ids=[NEVER, said[at]])) == (said[: at + 1], "stop", True)


def test_the_end_of_sequence_ends_with_itself_unless_it_is_ignored(free):
    said, at = free
    assert ends(sampled(), eos_id=said[at]) == (said[: at + 1], "stop", True)
    assert ends(sampled(ignore_eos=True), eos_id=said[at]) == (said, "length", False)
    both = sampled(ignore_eos=True, stop_token_ids=[said[at]])
    assert ends(both, eos_id=said[at]) == (said[: at + 1], "stop", True)


def test_a_stop_as_the_last_token_allowed_is_a_stop(free):
    said, at = free
    assert ends(sampled(max_tokens=at + 1, stop_token_ids=[said[at]])) == (said[: at + 1], "stop", True)


def test_a_stop_id_in_the_prompt_stops_nothing(free):
    said, _ = free
    prompt = [i for i in IDS[:20] if i not in said]
    assert ends(sampled(stop_token_ids=prompt)) == (said, "length", False)


@pytest.mark.parametrize("room", [0, 1, 7])
def test_the_context_s_end(free, room):
    said, _ = free
    runner = runner_of(context=20 + room)
    events = list(generate(runner, [sampled()], eos_id=NEVER))
    assert [e.token for e in events] == said[: room + 1]  # the last one needs no place: it is never read
    assert events[-1].finish_reason == "length" and is_empty(runner)


def test_a_prompt_longer_than_the_pool_is_refused_and_everything_is_freed():
    for step_tokens in (2048, 8):
        runner = runner_of(2, context=30)
        with pytest.raises(ContextTooLong):
            list(generate(runner, [greedy(5, 3), greedy(31, 3)], eos_id=NEVER, step_tokens=step_tokens))
        assert is_empty(runner)


def test_nothing_to_do_ends_at_once():
    runner = runner_of()
    steps = watched(runner)
    assert list(generate(runner, [], eos_id=NEVER)) == [] and steps == []


# Stopping from outside.


def test_a_request_stopped_by_the_caller_ends_before_the_next_step(expected):
    runner, stopped, events = runner_of(3), set(), []
    steps = watched(runner)
    for event in generate(runner, MIXED, eos_id=NEVER, step_tokens=64, stopped=stopped):
        events.append(event)
        if event.request == 2 and len([e for e in events if e.request == 2]) == 4:
            stopped.add(2)
    found = by_request(events)
    assert_same_events(found.pop(2), expected[2][:4])
    for number, ours in found.items():
        assert_same_events(ours, expected[number])
    assert is_empty(runner) and len(found) == len(MIXED) - 1
    fed = sum(n for spans in steps for _, n in spans)
    assert fed == sum(len(r.ids) + (4 if i == 2 else r.params.max_tokens) - 1 for i, r in enumerate(MIXED))


def test_a_request_stopped_while_it_waits_never_starts():
    runner = runner_of(1)
    steps = watched(runner)
    requests = [greedy(5, 3), greedy(60, 3), greedy(6, 2)]
    events = list(generate(runner, requests, eos_id=NEVER, stopped={1}))
    assert {e.request for e in events} == {0, 2}
    assert max(n for spans in steps for _, n in spans) == 6


def test_all_stopped_is_the_end():
    runner = runner_of(2)
    steps = watched(runner)
    assert list(generate(runner, MIXED, eos_id=NEVER, stopped=range(len(MIXED)))) == []
    assert steps == [] and is_empty(runner)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_frees_slots_and_pages(taken):
    runner = runner_of(3)
    events = generate(runner, MIXED, eos_id=NEVER, step_tokens=40)
    for _ in range(taken):
        next(events)
    assert is_empty(runner) == (taken == 0)
    events.close()
    assert is_empty(runner)
    assert_same_events(list(generate(runner, MIXED[:1], eos_id=NEVER)), alone(MIXED[0]))


def test_waiting_requests_start_in_order_as_slots_come_free():
    runner = runner_of(2)
    events = list(generate(runner, [greedy(3 + i, 4 + i, i) for i in range(6)], eos_id=NEVER))
    started = list(dict.fromkeys(e.request for e in events))
    assert started == [0, 1, 2, 3, 4, 5]
    alive: set[int] = set()
    for e in events:
        alive.add(e.request)
        assert len(alive) <= 2
        if e.finish_reason:
            alive.remove(e.request)


# Faults.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3])
def test_logits_that_are_no_numbers_are_our_fault_and_free_everything(monkeypatch, expected, value, at):
    """One request's fault ends the run: nothing is held, and what was given before it was right."""
    runner = runner_of(3)
    model, calls = runner.model, []
    logits = type(model).logits

    def spoilt(self, streams):
        calls.append(None)
        rows = logits(self, streams)
        if len(calls) == at + 1:
            rows[0] = value
        return rows

    events = []
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "logits", spoilt)
        with pytest.raises(EngineError, match=r"logits at position \d+ hold (nan|inf)"):
            events.extend(generate(runner, [MIXED[0], MIXED[2], MIXED[4]], eos_id=NEVER))
    assert is_empty(runner) and len(events) == 3 * at
    for number, ours in by_request(events).items():
        assert_same_events(ours, expected[2 * number][: len(ours)])
    assert_same_events(list(generate(runner, MIXED[:1], eos_id=NEVER)), expected[0])


def test_a_step_that_fails_frees_everything(monkeypatch):
    runner = runner_of(2)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    events = generate(runner, [greedy(3, 9), greedy(5, 9)], eos_id=NEVER)
    next(events)
    monkeypatch.setattr(runner, "step", fail)
    next(events)
    with pytest.raises(RuntimeError):
        next(events)
    assert is_empty(runner)


# Seeds.


def test_one_seed_gives_the_same_tokens_wherever_it_runs_and_another_gives_others():
    requests = [Request(IDS[:9], SamplingParams(max_tokens=12, seed=s)) for s in (1, 2, 1)]
    found = by_request(generate(runner_of(3), requests, eos_id=NEVER))
    one, two, again = ([e.token for e in found[i]] for i in range(3))
    assert one == again != two


def test_without_a_seed_every_request_draws_its_own():
    requests = [Request(IDS[:9], SamplingParams(max_tokens=12))] * 3
    found = by_request(generate(runner_of(3), requests, eos_id=NEVER))
    assert len({tuple(e.token for e in found[i]) for i in range(3)}) == 3


def test_seeding_python_repeats_a_run_without_seeds():
    runs = []
    for _ in range(2):
        random.seed(4)
        requests = [Request(IDS[:9], SamplingParams(max_tokens=8))] * 2
        runs.append([(e.request, e.token) for e in generate(runner_of(2), requests, eos_id=NEVER)])
    assert runs[0] == runs[1]


def test_logprobs_are_those_of_the_whole_sequence():
    request = greedy(30, 10, logprobs=100)
    events = alone(request)
    ids = request.ids + [e.token for e in events]
    runner = runner_of()
    rows = runner.step([(runner.open(), ids)], every_row=True)[0].log_softmax(-1)
    for i, e in enumerate(events):
        row = rows[29 + i]
        assert e.token == int(row.argmax()) and len(e.logprobs) == 100
        assert e.logprobs == pytest.approx({t: float(row[t]) for t in e.logprobs}, abs=1e-4)
        assert torch.tensor(sorted(e.logprobs.values())).exp().sum() <= 1 + 1e-5


def test_a_budget_smaller_than_the_requests_starves_nobody():
    requests = [greedy(1, 12, i) for i in range(3)]
    events = list(generate(runner_of(3), requests, eos_id=NEVER, step_tokens=2))
    found = by_request(events)
    for number, request in enumerate(requests):
        assert_same_events(found[number], alone(request))
    ends = [i for i, e in enumerate(events) if e.finish_reason]
    assert ends[0] >= 30, "all three end together"
