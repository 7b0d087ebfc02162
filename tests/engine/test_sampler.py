"""Many choices at once are the choices one by one, whatever happens to some of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyrosome.engine import sampler
from pyrosome.engine.sampler import LEAST_REPEATED, LONGEST_PASSAGE, Choice, Row, SamplerState, choose_all, draw_drafts
from pyrosome.errors import EngineError
from pyrosome.ops.sample import sample
from pyrosome.options import SamplingParams

INF, NAN = float("inf"), float("nan")
GREEDY = SamplingParams(temperature=0)


def logits_of(size, seed=0, levels=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-levels, levels + 1, (size,), generator=g).float() if levels else torch.randn(size, generator=g)
    )


def row(logits, params=GREEDY, mask=None, position=9, seed=3, output=()):
    state = SamplerState(params, [1, 2, 2], seed)
    for token in output:
        state.accept(token)
    return Row(logits, state, mask, position)


def alone(r):
    s = r.state
    return Choice(*sample(r.logits_V, s.params, s.prompt_counts, s.output_counts, s.seed, r.position, r.mask_V))


def same(a, b):
    return type(a) is type(b) and (str(a) == str(b) if isinstance(a, Exception) else a == b)


def mixed(size=50):
    """Rows of every kind, good and bad."""
    bad = [logits_of(size) for _ in range(4)]
    bad[0][3], bad[1][:], bad[2][0], bad[3][size - 1] = NAN, -INF, INF, NAN
    mask = torch.arange(size) % 3 == 0
    return [
        *(row(logits_of(size, seed, levels=2), position=seed) for seed in range(12)),
        *(row(b, position=100 + i) for i, b in enumerate(bad)),
        *(row(b, SamplingParams(seed=1), position=200 + i) for i, b in enumerate(bad)),
        row(logits_of(size), SamplingParams(temperature=0, logprobs=2)),
        row(logits_of(size), mask=mask),
        row(logits_of(size), mask=torch.zeros(size, dtype=torch.bool), position=300),
        row(logits_of(size), mask=mask[:-1], position=301),
        row(
            logits_of(size), SamplingParams(temperature=0, presence_penalty=2.0), output=[int(logits_of(size).argmax())]
        ),
        row(logits_of(size), SamplingParams(temperature=0, repetition_penalty=2.0)),
        *(row(logits_of(size, seed), SamplingParams(top_p=0.9, logprobs=1), seed=seed) for seed in range(6)),
        *(row(logits_of(size, seed, levels=1)) for seed in range(6)),
    ]


def test_many_rows_at_once_are_the_rows_one_by_one():
    found, singles = choose_all(mixed()), [choose_all([r])[0] for r in mixed()]
    assert all(same(a, b) for a, b in zip(found, singles, strict=True))
    assert sum(isinstance(f, Exception) for f in found) == 4 + 4 + 2
    back = choose_all(mixed()[::-1])[::-1]
    assert all(same(a, b) for a, b in zip(found, back, strict=True))


def test_what_is_chosen_is_the_definition_s_choice():
    for r, found in zip(mixed(), choose_all(mixed()), strict=True):
        if isinstance(found, Exception):
            with pytest.raises(type(found)) as raised:
                alone(r)
            assert str(raised.value) == str(found)
        else:
            assert found == alone(r)


@pytest.mark.parametrize("size", [1, 7, 160, 1023, 129_280])
def test_of_equal_logits_the_lowest_id_is_chosen_in_every_row(size):
    logits = [logits_of(size, seed, levels=1) for seed in range(5)] + [torch.zeros(size), torch.full((size,), -0.0)]
    logits.append(torch.tensor([-0.0, 0.0] * size)[:size])
    expected = [(v == v.max()).nonzero()[0].item() for v in logits]
    assert [c.token for c in choose_all([row(v) for v in logits])] == expected


def test_plain_greedy_rows_are_decided_together(monkeypatch):
    asked = []
    monkeypatch.setattr(sampler, "sample", lambda *args: asked.append(args) or sample(*args))
    rows = [row(logits_of(20, s)) for s in range(5)] + [row(logits_of(20), SamplingParams(temperature=0, logprobs=0))]
    assert len(choose_all(rows)) == 6 and len(asked) == 1


def test_an_error_names_its_own_position():
    found = choose_all(
        [row(torch.full((9,), NAN), position=41), row(logits_of(9)), row(torch.full((9,), INF), position=7)]
    )
    assert isinstance(found[0], EngineError) and "position 41 hold nan" in str(found[0])
    assert isinstance(found[2], EngineError) and "position 7 hold inf" in str(found[2])
    assert isinstance(found[1], Choice)


def test_rows_that_do_not_go_together_are_chosen_one_by_one():
    rows = [row(logits_of(9)), row(logits_of(12)), row("no tensor"), row(logits_of(9).double()), row(torch.empty(0))]
    found = choose_all(rows)
    assert [isinstance(f, Exception) for f in found] == [False, False, True, False, True]
    assert found[0] == alone(rows[0]) and found[1] == alone(rows[1]) and found[3] == alone(rows[3])


def test_a_fault_of_any_kind_is_its_row_s_value(monkeypatch):
    def fails(*args):
        if args[4] == 13:
            raise ZeroDivisionError("no luck")
        return sample(*args)

    monkeypatch.setattr(sampler, "sample", fails)
    found = choose_all([row(logits_of(9), SamplingParams(), seed=s) for s in (12, 13, 14)])
    assert [type(f) for f in found] == [Choice, ZeroDivisionError, Choice]


def test_no_rows_no_choices():
    assert choose_all([]) == []


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(temperature=0, logprobs=1),
        SamplingParams(frequency_penalty=1.0, repetition_penalty=1.3),
        SamplingParams(temperature=0, presence_penalty=2.0),
    ],
)
def test_a_drafter_that_has_the_target_s_logits_draws_the_target_s_token(params):
    for position in range(30):
        r = row(logits_of(200, position), params, position=position, output=[4, 5, 5])
        assert draw_drafts(r.logits_V[None], [r.state], [position]) == [choose_all([r])[0].token]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"temperature": 0}], ids=str)
def test_a_drafter_s_logits_may_be_anything(value, filters):
    """Its token is then any: the others of the step are drawn, and the target's choice is what counts."""
    logits = torch.stack([torch.full((9,), value), logits_of(9, 1)])
    states = [SamplerState(SamplingParams(**filters), [], 5) for _ in logits]
    odd, usual = draw_drafts(logits, states, [7, 7])
    assert odd in range(9) and [usual] == draw_drafts(logits[1:], states[1:], [7])


def test_tokens_are_counted_where_a_penalty_asks_for_them():
    for params, prompt, output in (
        (SamplingParams(), {}, {}),
        (SamplingParams(repetition_penalty=1.1), {1: 1, 2: 2}, {7: 2, 8: 1}),
        (SamplingParams(presence_penalty=1.0), {}, {7: 2, 8: 1}),
        (SamplingParams(frequency_penalty=1.0), {}, {7: 2, 8: 1}),
    ):
        state = row(None, params, output=[7, 8, 7]).state
        assert state.prompt_counts == prompt and state.output_counts == output


def test_completions_of_one_request_draw_each_for_itself():
    states = [SamplerState(SamplingParams(), [], 5, index) for index in range(8)]
    assert states[0].seed == 5 and len({s.seed for s in states}) == 8
    drawn = [tuple(choose_all([Row(torch.zeros(1000), s, None, p)])[0].token for p in range(4)) for s in states]
    assert len(set(drawn)) == 8


def repeats(output, times):
    """Whether the output ends in a passage so many times over, by looking."""
    for length in range(1, LONGEST_PASSAGE + 1):
        total = max(times * length, LEAST_REPEATED)
        if len(output) >= total and all(output[-i] == output[-i - length] for i in range(1, total - length + 1)):
            return True
    return False


def guarded(output, times):
    state, found = SamplerState(SamplingParams(max_repeats=times), [], 0), []
    for token in output:
        state.accept(token)
        found.append(state.is_repeating)
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 6)), min_size=1, max_size=6),
    st.integers(2, 5),
)
@example([([0], 40)], 2)
@example([([0, 1, 2, 1, 0], 4), ([0], 20)], 3)
def test_a_repetition_is_noticed_when_it_is_there(passages, times):
    output = [token for passage, n in passages for token in passage * n]
    assert guarded(output, times) == [repeats(output[: i + 1], times) for i in range(len(output))]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("times", [2, 3, 5])
def test_passages_up_to_64_tokens_are_noticed_at_once(length, times):
    output = list(range(1000, 1020)) + list(range(length)) * (times + 20)
    found = guarded(output, times)
    if length > LONGEST_PASSAGE:
        assert not any(found)
    else:
        assert found.index(True) + 1 == 20 + max(times * length, LEAST_REPEATED)


def test_without_the_guard_nothing_is_kept():
    state = SamplerState(SamplingParams(), [], 0)
    for _ in range(100):
        state.accept(1)
    assert not state.is_repeating and not state._tail and state.output_counts == Counter()


@pytest.mark.parametrize("N", [1, 2, 3])
def test_what_a_kernel_is_given_begins_at_sixteen_bytes(monkeypatch, N):
    """Or it would be compiled anew in the middle of a request."""
    given = []
    monkeypatch.setattr(sampler, "choose_tokens", lambda *args: (given.extend(args), torch.zeros(N))[1])
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.75, min_p=0.25)
    sampler._tokens(torch.zeros(N, 8), [SamplerState(params, [], 3)] * N, range(7, 7 + N))
    assert [x.storage_offset() % 2 for x in given] == [0] * 7
    assert [x.tolist() for x in given[1:5]] == [[0.5] * N, [3] * N, [0.75] * N, [0.25] * N]
    assert (given[6] == torch.arange(7, 7 + N)).all() and len(given[5]) == N
