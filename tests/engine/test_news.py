"""What is told of prompts: how far they are, and how probable the model found their tokens, whatever the way there."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pyrosome.engine import news
from pyrosome.engine.loaded import load_model
from pyrosome.engine.request import Ended, News, Progress, PromptLogprobs, Request, TokenEvent
from pyrosome.errors import RequestError
from pyrosome.llm import LLM
from pyrosome.options import EngineOptions, SamplingParams
from tests.engine.engines import CONFIG, IDS, bytes_for, engine_of, is_empty, request, take, watched
from tests.networks import agreeing_network, network
from tests.networks import run as logits_of


def follow(engine, requests=(), most: int = 3000) -> list:
    """Every event until nothing is left to do; the requests join now."""
    for r in requests:
        engine.add(r)
    events = []
    for _ in range(most):
        if not engine.has_work:
            return events
        events += engine.step()
    raise AssertionError(f"{most} steps and no end")


def told(events, name: str) -> list[dict[int, float]]:
    """A request's log probabilities of its prompt, once it is seen that no position is missing or comes twice."""
    found: list[dict[int, float]] = []
    for e in events:
        if isinstance(e, PromptLogprobs) and e.request == name:
            assert e.logprobs and e.start == 1 + len(found), "in order, without a gap"
            found += e.logprobs
    assert_news_comes_first(events)
    return found


def assert_news_comes_first(events) -> None:
    begun = set()
    for e in events:
        if isinstance(e, News):
            assert e.request not in begun, "news of a prompt comes before the first token"
        else:
            begun.add(e.request)


def progress(events, name: str) -> list[tuple[int, int]]:
    assert_news_comes_first(events)
    return [(e.computed_tokens, e.prompt_tokens) for e in events if isinstance(e, Progress) and e.request == name]


def by_hand(logits_TV: torch.Tensor, ids, num_top: int) -> list[dict[int, float]]:
    """What is meant: of each row, in float32, the next id's log probability and the greatest, of equals the lowest."""
    found = []
    for row_V, token in zip(logits_TV[:-1].float(), ids[1:], strict=True):
        log = row_V.log_softmax(-1).tolist()
        best = sorted(range(len(log)), key=lambda t: (-log[t], t))[:num_top]
        found.append({t: log[t] for t in [token, *best]})
    return found


# How far it is


def test_each_step_but_the_last_of_a_prompt_tells_how_far_it_is():
    engine = engine_of(step_tokens=128)
    engine.add(request("a", 500, progress=True))
    seen = []
    while engine.has_work:
        events = engine.step()
        seen += progress(events, "a")
        assert not seen or seen[-1][0] == engine.stats.computed_tokens or engine.stats.output_tokens
    assert seen == [(128, 500), (256, 500), (384, 500)]


def test_what_was_reused_counts_as_computed_and_is_told_at_once():
    engine = engine_of(step_tokens=100)
    follow(engine, [request("first", 400)])
    again = dataclasses.replace(request("again", 0, progress=True), ids=(*IDS[:400], *IDS[1000:1150]))
    events = follow(engine, [again])
    assert progress(events, "again") == [(384, 550), (484, 550), (512, 550)]
    reuse = next(e.reuse for e in events if isinstance(e, TokenEvent))
    assert reuse.reused_tokens + reuse.replayed_tokens == 384
    assert follow(engine, [dataclasses.replace(again, id="known")])[0] == Progress("known", 512, 550)


def test_nothing_is_told_to_who_did_not_ask():
    engine = engine_of(step_tokens=100)
    events = follow(engine, [request("a", 500), request("b", 300, start=9, progress=True), request("c", 300, start=9)])
    assert {e.request for e in events if isinstance(e, News)} == {"b"}


def test_a_prompt_of_several_completions_is_told_of_once():
    events = follow(engine_of(step_tokens=128), [request("r", 300, n=4, temperature=1.0, seed=3, progress=True)])
    assert progress(events, "r") == [(128, 300), (256, 300)]
    assert sum(isinstance(e, Ended) for e in events) == 4


def test_a_session_s_progress_counts_what_it_holds():
    engine = engine_of(step_tokens=128)
    session = engine.call("session_open", ids=IDS[:300])
    follow(engine, [dataclasses.replace(request("one", 0, 4), session=session)])
    turn = request("two", 300, 4, 1000, session=session, progress=True)
    assert progress(follow(engine, [turn]), "two") == [(384, 604), (512, 604)]
    assert session in engine.sessions


def test_a_prompt_set_aside_goes_on_where_it_was_and_after_a_first_token_nothing_is_told():
    engine = engine_of(step_tokens=128, max_sequences=1)
    engine.add(request("low", 400, 30, progress=True))
    events = engine.step() + engine.step()
    engine.add(request("high", 20, 3, 5, priority=1))
    events += follow(engine)
    assert [e.request for e in events if isinstance(e, Ended)] == ["high", "low"]
    assert progress(events, "low") == [(128, 400), (256, 400), (256, 400), (384, 400)]

    engine.add(request("lost", 400, 30, 700, progress=True))
    events = []
    while not any(isinstance(e, TokenEvent) for e in events):
        events += engine.step()
    (c,) = engine.completions
    engine.home.park(c.track)
    engine.tree.forget()  # its history too: the whole prompt is computed again
    steps = watched(engine)
    events += follow(engine)
    assert steps[0] == [(0, 128)] and len(progress(events, "lost")) == 3


def test_a_request_that_fails_or_is_aborted_is_told_of_no_more(monkeypatch):
    engine = engine_of(step_tokens=128)
    engine.add(request("gone", 900, progress=True, prompt_logprobs=0))
    events = engine.step() + engine.step()
    engine.abort("gone")
    events += follow(engine)
    assert progress(events, "gone") == [(128, 900), (256, 900)] and len(told(events, "gone")) == 256

    forward = engine.runner.forward

    def fails_at_300(spans, rows, **kwargs):
        if any(s.length >= 256 for s, _ in spans):
            raise RuntimeError("a broken step")
        return forward(spans, rows, **kwargs)

    monkeypatch.setattr(engine.runner, "forward", fails_at_300)
    events = follow(engine, [request("fails", 900, start=1000, progress=True, prompt_logprobs=0)])
    assert progress(events, "fails") == [(128, 900), (256, 900)] and len(told(events, "fails")) == 256
    assert events[-1].reason == "error" and is_empty(engine)


# How probable its tokens are


PROMPT = request("p", 400, 6, 3, prompt_logprobs=3)
OTHERS = [
    request("a", 150, 30, 40, temperature=1.0, seed=5, prompt_logprobs=0),
    request("b", 20, 40, 9, logprobs=2),
    request("c", 300, 10, 700, progress=True),
]


@pytest.fixture(scope="module")
def expected():
    """Of the tiny network's logits, computed at once."""
    return by_hand(logits_of(network(CONFIG), list(PROMPT.ids)), PROMPT.ids, 3)


@pytest.mark.parametrize("step_tokens", [2048, 400, 399, 129, 128, 64, 5, 1])
def test_a_prompt_computed_in_parts_of_any_size_is_told_of_to_the_bit(expected, step_tokens):
    events = follow(engine_of(step_tokens=step_tokens), [PROMPT])
    assert told(events, "p") == expected
    assert [next(iter(found)) for found in told(events, "p")] == list(PROMPT.ids[1:]), "its own comes first"


@pytest.mark.parametrize(("slots", "step_tokens", "drafter"), [(4, 2048, "off"), (4, 50, "mtp"), (2, 128, "lookup")])
def test_a_prompt_computed_in_company_is_told_of_to_the_bit(expected, slots, step_tokens, drafter):
    engine = engine_of(max_sequences=slots, step_tokens=step_tokens, drafter=drafter)
    events = follow(engine, [OTHERS[1]])[:0]
    engine.add(OTHERS[1])
    for _ in range(3):
        events += engine.step()
    events += follow(engine, [OTHERS[0], PROMPT, OTHERS[2]])
    assert told(events, "p") == expected
    first = by_hand(logits_of(network(CONFIG), list(OTHERS[0].ids)), OTHERS[0].ids, 0)
    assert told(events, "a") == first and all(len(found) == 1 for found in first)
    assert told(events, "b") == told(events, "c") == []
    assert is_empty(engine)


@pytest.mark.parametrize("num_top", [0, 1, 100])
@pytest.mark.parametrize("length", [1, 2, 3, 129])
def test_every_position_but_the_first_has_its_own_and_the_top_ones(num_top, length):
    r = request("r", length, 2, prompt_logprobs=num_top)
    found = told(follow(engine_of(), [r]), "r")
    meant = by_hand(logits_of(network(CONFIG), list(r.ids)), r.ids, num_top)
    assert [list(each.items()) for each in found] == [list(each.items()) for each in meant], "in this order too"
    assert len(found) == length - 1
    for token, each in zip(r.ids[1:], found, strict=True):
        top = sorted(each.values(), reverse=True)[:num_top]
        assert len(each) == num_top + (each[token] not in top) and sum(map(math.exp, each.values())) < 1 + 1e-5


def test_what_is_said_is_the_same_whether_it_was_asked_for_or_not():
    plain = dataclasses.replace(PROMPT, params=dataclasses.replace(PROMPT.params, prompt_logprobs=None))
    answers = [take(follow(engine_of(drafter="mtp"), [r]), {})["p", 0].answer for r in (PROMPT, plain)]
    assert answers[0] == answers[1]


def test_a_prompt_of_several_completions_is_told_of_once_and_they_share_it(expected):
    engine = engine_of(max_sequences=2, step_tokens=128)
    params = dataclasses.replace(PROMPT.params, n=3, temperature=1.0, seed=1)
    events = follow(engine, [dataclasses.replace(PROMPT, params=params)])
    assert told(events, "p") == expected and engine.stats.computed_tokens == 400 + 3 * 5
    assert sum(isinstance(e, Ended) for e in events) == 3 and is_empty(engine)


def test_no_position_is_passed_over_for_what_is_known_and_what_it_computed_is_known_to_others(expected):
    engine = engine_of(step_tokens=128)
    follow(engine, [dataclasses.replace(PROMPT, id="first")])
    engine.add(PROMPT)
    computed = engine.stats.computed_tokens
    events = follow(engine)
    assert told(events, "p") == expected and engine.stats.computed_tokens - computed == 400 + 5
    (reuse,) = [e.reuse for e in events if isinstance(e, Ended)]
    assert (reuse.prompt_tokens, reuse.matched_tokens, reuse.reused_tokens, reuse.limit) == (400, 0, 0, "not wanted")
    assert "log probabilities" in reuse.reason and engine.stats.lookups_by_limit == {"not wanted": 2}

    engine.tree.forget()
    follow(engine, [dataclasses.replace(PROMPT, id="publishes")])
    plain = dataclasses.replace(PROMPT, id="plain", params=SamplingParams(max_tokens=1))
    assert follow(engine, [plain])[0].reuse.reused_tokens == 384


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_prompt_set_aside_misses_no_position_and_tells_none_twice(expected, steps):
    engine = engine_of(step_tokens=100, max_sequences=1)
    engine.add(PROMPT)
    events = []
    for _ in range(steps):
        events += engine.step()
    engine.add(request("high", 20, 3, 5, priority=1))
    events += follow(engine)
    assert [e.request for e in events if isinstance(e, Ended)] == ["high", "p"] and events[-1].timeline.num_parks == 1
    assert told(events, "p") == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_prompt_whose_history_had_to_leave_tells_each_position_once(expected, steps, is_known):
    """It is computed again; not from beyond what it had told, though another's prompt makes more of it known."""
    engine = engine_of(step_tokens=100)
    engine.add(PROMPT)
    events = []
    for _ in range(steps):
        events += engine.step()
    (c,) = engine.completions
    length = c.length
    engine.home.drop(c.track)  # as where a step broke half-way
    engine.tree.forget()
    engine.completions.clear()
    if is_known:
        follow(engine, [dataclasses.replace(PROMPT, id="other", params=SamplingParams(max_tokens=1))])
    engine.completions.append(c)
    watch = watched(engine)
    events += follow(engine)
    assert told(events, "p") == expected
    begin = watch[0][0][0]
    assert begin == (min(length, 399) // 128 * 128 if is_known else 0)


def test_memory_so_short_that_prompts_are_set_aside_leaves_all_of_them_told_of():
    engine = engine_of(cache_bytes=bytes_for(CONFIG, 700, 3), max_sequences=3, step_tokens=64)
    requests = [request(f"{i}", 300, 60, 300 * i, prompt_logprobs=1, priority=i) for i in range(5)]
    events = []
    for r in requests:
        engine.add(r)
        for _ in range(3):
            events += engine.step()
    events += follow(engine)
    assert sum(e.timeline.num_parks for e in events if isinstance(e, Ended)) > 0
    for r in requests:
        assert told(events, r.id) == by_hand(logits_of(network(CONFIG), list(r.ids)), r.ids, 1)
    assert is_empty(engine)


def test_a_shared_step_that_breaks_is_run_again_one_by_one_and_nothing_is_told_twice(expected):
    engine = engine_of(step_tokens=256)
    forward, broken = engine.runner.forward, []

    def breaks(spans, rows, **kwargs):
        if len(spans) > 1 and any(s.length for s, _ in spans):
            broken.append(1)
            if len(broken) == 1:
                spans[0][0].is_broken = True
            raise RuntimeError("a broken step")
        return forward(spans, rows, **kwargs)

    engine.runner.forward = breaks
    events = follow(engine, [PROMPT, OTHERS[0]])
    assert len(broken) > 1 and told(events, "p") == expected and len(told(events, "a")) == 149


def test_rows_of_logits_are_taken_some_at_a_time(monkeypatch):
    net = agreeing_network()
    r = request("r", 1000, 2, prompt_logprobs=2)
    most, logits = [], net.logits

    def counted(streams):
        most.append(len(streams))
        return logits(streams)

    monkeypatch.setattr(net, "logits", counted, raising=False)
    whole = told(follow(engine_of(net), [r]), "r")
    assert max(most) == news.HEAD_ROWS == 256 and sum(most) >= 999
    monkeypatch.setattr(news, "HEAD_ROWS", 7)
    most.clear()
    assert told(follow(engine_of(net), [r]), "r") == whole and max(most) == 7


def test_logits_that_are_no_numbers_end_their_request_alone(expected):
    engine = engine_of(step_tokens=256)
    logits = engine.runner.logits

    def spoilt(forward, first, last):
        rows = logits(forward, first, last).clone()
        if len(rows) == 150 - 129:  # the second part of the shorter prompt
            rows[2] = float("nan")
        return rows

    engine.runner.logits = spoilt
    events = follow(engine, [PROMPT, OTHERS[0]])
    (end,) = [e for e in events if isinstance(e, Ended) and e.request == "a"]
    assert (end.reason, end.error_type) == ("error", "EngineError") and "position 131 hold nan" in end.error
    assert told(events, "p") == expected and len(told(events, "a")) == 128 and is_empty(engine)


def test_in_a_session_it_is_refused_and_the_session_is_as_it_was():
    engine = engine_of()
    session = engine.call("session_open", ids=IDS[:50])
    with pytest.raises(RequestError, match=r"prompt_logprobs was asked for in a session.*send its ids as a prompt"):
        engine.add(request("r", 5, session=session, prompt_logprobs=0))
    assert engine.call("session_list")[session] == {"tokens": 50, "is_busy": False, "is_present": False}
    assert not engine.has_work


# The built-in model


@pytest.fixture(scope="module", params=["exact", "trained"])
def nano(request):
    return load_model("builtin:nano", numerics=request.param)


def test_the_built_in_model_s_prompts_are_told_of_as_its_logits_say(nano):
    ids = tuple(t % 250 for t in IDS[:300])
    r = Request("r", ids, SamplingParams(max_tokens=2, prompt_logprobs=5))
    whole = by_hand(nano.logits(ids), ids, 5)
    for step_tokens in (2048, 77):
        engine = nano.engine(EngineOptions(cache_bytes=8 << 20, step_tokens=step_tokens))
        other = Request("other", ids[7:150], SamplingParams(max_tokens=9))
        assert told(follow(engine, [other, r]), "r") == whole


def test_outputs_of_text_have_the_prompt_s_log_probabilities_where_they_were_asked_for():
    with LLM("builtin:nano", numerics="exact", cache_bytes=8 << 20) as llm:
        ids = llm.encode("Once upon a time")
        plain, *others = llm.generate(
            [ids, ids],
            [SamplingParams(max_tokens=3, seed=1), SamplingParams(max_tokens=3, seed=1, n=2, prompt_logprobs=2)],
        )
        assert plain.prompt_logprobs is None and plain.token_ids == others[0].token_ids
        assert [o.prompt_logprobs for o in others] == [by_hand(llm.model.logits(ids), ids, 2)] * 2
        with llm.session("Once upon") as session, pytest.raises(RequestError, match="in a session"):
            session.generate(SamplingParams(prompt_logprobs=0))
