"""Drafts without an engine: what they may not change, how deep they go, and where they are found."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrosome.engine.sampler import Row, SamplerState, choose_all, draw_drafts
from pyrosome.engine.speculate import Depth, PromptLookup, StepCost, resolve_drafter
from pyrosome.errors import RequestError
from pyrosome.options import SamplingParams

# What drafts may not change

VOCABULARY = 24
NETWORK = 2.5 * torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0))
HEAD = NETWORK + 0.7 * torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(1))


def place(ids):
    """The last two ids and the length decide what comes next."""
    return (7 * ids[-1] + 3 * ids[-2] + len(ids) // 4) % 64


def generate(params, propose, num=80, ends=(), seed=11):
    """(ids, choices, counts, steps, accepted) of a loop that verifies what `propose(ids, state)` gives."""
    ids, choices, num_steps, num_accepted = [3, 4, 5], [], 0, 0
    state = SamplerState(params, ids, seed)
    while len(choices) < num and not (choices and choices[-1].token in ends):
        drafts = propose(list(ids), state)[: num - len(choices) - 1]

        for draft in [*drafts, None]:  # as engine.decoding does: row after row, while drafts agree
            (choice,) = choose_all([Row(NETWORK[place(ids)], state, None, len(ids))])
            state.accept(choice.token)
            ids.append(choice.token)
            choices.append(choice)
            if choice.token != draft or choice.token in ends:
                break
            num_accepted += 1
        num_steps += 1
    return ids, choices, state.output_counts, num_steps, num_accepted


def head(depth):
    """Drafts of a head that is nearly right, so deep; or, without a number, now so and now otherwise."""

    def draft(ids, state):
        out = []
        for _ in range(depth if depth is not None else (5 * len(ids)) % 7):
            out += draw_drafts(HEAD[place(ids + out)][None], [state], [len(ids) + len(out)])
        return out

    return draft


PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "greedy with penalties": SamplingParams(temperature=0, frequency_penalty=0.4, repetition_penalty=1.3, logprobs=2),
    "plain": SamplingParams(),
    "filters": SamplingParams(temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, logprobs=1),
    "penalties": SamplingParams(temperature=1.3, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("depth", [1, 2, 3, 8, None])
def test_drafts_change_the_number_of_steps_and_nothing_else(params, depth):
    plain = generate(params, lambda ids, state: [])
    drafted = generate(params, head(depth))
    assert drafted[:3] == plain[:3]
    assert plain[3] == 80 and drafted[3] == 80 - drafted[4] and drafted[4] > 20


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_drafts_that_are_always_wrong_or_always_right(params):
    plain = generate(params, lambda ids, state: [])
    right = generate(params, lambda ids, state: plain[0][len(ids) : len(ids) + 4])
    wrong = generate(params, lambda ids, state: [(plain[0][len(ids)] + 1) % VOCABULARY] * 4)
    assert right[:3] == wrong[:3] == plain[:3]
    assert right[3:] == (16, 64) and wrong[3:] == (80, 0)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("at", [0, 1, 13])
def test_an_end_token_that_was_drafted_ends_there(params, at):
    plain = generate(params, lambda ids, state: [])
    end = plain[1][at].token
    expected = [c.token for c in plain[1]]
    expected = expected[: expected.index(end) + 1]
    for draft in (lambda ids, state: plain[0][len(ids) : len(ids) + 6], head(4), lambda ids, state: []):
        found = generate(params, draft, ends=(end,))
        assert [c.token for c in found[1]] == expected


# How deep


class World:
    """Steps whose time is fixed + per_token x tokens, and drafts that are accepted by chance."""

    def __init__(self, fixed=1.0, per_token=0.1, per_draft=0.0, sequences=1, most=8, seed=0, noise=0.1):
        self.fixed, self.per_token, self.per_draft, self.noise = fixed, per_token, per_draft, noise
        self.cost, self.random = StepCost(), random.Random(seed)
        self.depths = [Depth(most, self.cost) for _ in range(sequences)]

    def rate(self, chances, k):
        """Tokens per second where every sequence drafts k."""
        n = len(self.depths)
        expected = 1 + sum(math.prod(chances[: i + 1]) for i in range(k))
        return n * expected / (self.fixed + self.per_token * n * (1 + k) + self.per_draft * n * k)

    def run(self, chances, steps):
        """(depths chosen per step, tokens per second)."""
        chosen, tokens, seconds, ks = [], 0, 0.0, [d.choose() for d in self.depths]
        for _ in range(steps):
            for depth, k in zip(self.depths, ks, strict=True):
                accepted = 0
                while accepted < k and self.random.random() < chances[accepted]:
                    accepted += 1
                if k:
                    depth.observe(k, accepted)
                tokens += 1 + accepted
            took = self.fixed + self.per_token * (len(ks) + sum(ks))
            self.cost.observe(len(ks) + sum(ks), took * math.exp(self.random.gauss(0, self.noise)), len(ks))
            self.cost.observe_drafting(sum(ks), self.per_draft * sum(ks))
            seconds += took + self.per_draft * sum(ks)
            ks = [d.choose() for d in self.depths]
            chosen.append(ks)
        return chosen, tokens / seconds


WORLDS = {
    "tokens are cheap": ({"per_token": 0.02}, [0.9] * 8),
    "tokens are dear": ({"per_token": 0.3}, [0.8] * 8),
    "tokens cost what a step does": ({"fixed": 0.0, "per_token": 1.0}, [0.6] * 8),
    "the second draft is worse": ({"per_token": 0.1}, [0.9, 0.2, *[0.9] * 6]),
    "hardly any stays": ({"per_token": 0.02}, [0.3] * 8),
    "drafting is dear": ({"per_token": 0.05, "per_draft": 0.2}, [0.7] * 8),
    "a full step": ({"per_token": 0.05, "sequences": 16}, [0.8] * 8),
    "a full step with little to gain": ({"per_token": 0.5, "sequences": 16}, [0.6] * 8),
    "none stays": ({"per_token": 0.05}, [0.0] * 8),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("world", "chances"), WORLDS.values(), ids=WORLDS)
def test_depth_comes_close_to_the_best_there_is(world, chances, seed):
    w = World(**world, seed=seed)
    w.run(chances, 100)
    _, found = w.run(chances, 600 if len(w.depths) == 1 else 200)
    best = max(w.rate(chances, k) for k in range(9))
    # The luck of a few hundred steps is part of what is measured.
    assert found > 0.92 * best


def test_depth_is_the_best_one_where_chances_and_costs_are_known():
    for per_token, sequences in ((0.02, 1), (0.1, 1), (0.3, 1), (0.1, 8), (0.3, 8)):
        for chances in ([0.9] * 6, [0.7] * 6, [0.5] * 6, [0.9, 0.5, 0.9, 0.1, 0.9, 0.9], [0.1] * 6):
            w = World(per_token=per_token, sequences=sequences, most=6)
            for tokens in (1, 2, 3, 5, 9) * 200:
                w.cost.observe(tokens * sequences, w.fixed + per_token * tokens * sequences, sequences)
            depth = Depth(6, w.cost)
            depth._accepted, depth._tried = [100 * c for c in chances], [100.0] * 6
            assert depth.choose() == max(range(7), key=lambda k: w.rate(chances, k)), (per_token, sequences, chances)


def test_nothing_is_drafted_where_nothing_is_accepted_and_again_when_it_is():
    w = World(per_token=0.1, most=4)
    chosen, _ = w.run([0.9] * 4, 200)
    assert [4] in chosen and all(k > 1 for (k,) in chosen[100:])
    chosen, _ = w.run([0.0] * 4, 1500)
    probes = [i for i, (k,) in enumerate(chosen) if k and i > 200]
    assert all(k < 2 for (k,) in chosen[200:]) and 1 <= len(probes) <= 8
    gaps = [b - a for a, b in itertools.pairwise(probes)]
    assert gaps == sorted(gaps) and gaps[-1] <= 512
    chosen, _ = w.run([0.9] * 4, 1500)
    assert all(k > 1 for (k,) in chosen[-200:])


def test_one_more_draft_is_tried_now_and_then_or_it_would_never_be_known_to_be_good():
    w = World(per_token=0.1, most=4)
    w.run([0.9, 0.0, 0.9, 0.9], 300)
    chosen, _ = w.run([0.9] * 4, 1500)
    assert all(k == 4 for (k,) in chosen[-200:])


def test_probing_goes_by_counts_alone():
    def schedule():
        depth, out = Depth(3, StepCost()), []
        for _ in range(300):
            out.append(depth.choose())
            if out[-1]:
                depth.observe(out[-1], 0)
        return out

    first = schedule()
    assert first == schedule()
    assert first[-100:].count(0) > 90 and sum(first) < 40


def test_drafts_that_were_not_there_to_be_tried_do_not_count():
    """A lookup may find nothing: the next attempt is no further off for it."""
    depth = Depth(2, StepCost())
    while depth.choose():
        depth.observe(2, 0)
    waits = []
    for _ in range(4):
        waits.append(1)
        while not depth.choose():
            waits[-1] += 1
    assert len(set(waits[1:])) == 1


def wait_for_probe(depth):
    """Steps until one draft more is tried than seems worth it."""
    best, steps = depth._best(), 1
    while depth.choose() == best:
        steps += 1
    return steps


def test_luck_is_followed_up_soon():
    depth = Depth(3, StepCost())
    while depth._best():
        depth.observe(3, 0)
    waits = []
    for accepted in (0, 0, 0, 0, 1, 0):
        waits.append(wait_for_probe(depth))
        depth.observe(1, accepted)
    assert waits == [16, 32, 64, 128, 256, 8]


def test_a_draft_refused_earlier_tells_nothing_of_the_one_that_was_to_be_tried():
    depth = Depth(3, StepCost())
    for accepted in [2, 1] * 60:
        depth.observe(3 if accepted == 2 else 2, accepted)
    assert depth._best() == 2
    waits = []
    for _ in range(3):
        waits.append(wait_for_probe(depth))
        depth.observe(3, 0)
        for _ in range(20):
            depth.observe(2, 2)
    assert waits == [16, 16, 16]


def test_drafts_and_what_stayed_are_counted_by_place():
    depth = Depth(4, StepCost())
    for drafts, accepted in ((3, 3), (3, 1), (1, 0), (4, 2)):
        depth.observe(drafts, accepted)
    assert depth.drafted == (4, 3, 3, 1) and depth.accepted == (3, 2, 1, 0)


def test_without_drafts_allowed_none_are_chosen():
    depth = Depth(0, StepCost())
    assert [depth.choose() for _ in range(100)] == [0] * 100 and depth.drafted == ()


def test_a_sequence_s_luck_is_its_own():
    cost = StepCost()
    lucky, other = Depth(3, cost), Depth(3, cost)
    before = other._best()
    for _ in range(100):
        lucky.observe(3, 0)
    assert lucky._best() == 0 and other._best() == before > 0


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_cost_of_a_step_is_found(noise):
    cost, chance = StepCost(), random.Random(0)
    for i in range(500):
        tokens = 1 + i % 4
        cost.observe(tokens, (2.0 + 0.5 * tokens) * math.exp(chance.gauss(0, noise)))
    for k in range(9):
        assert cost.seconds(k) == pytest.approx(2.5 + 0.5 * k, rel=0.03 if not noise else 0.12)


def test_the_cost_of_a_draft_is_added_for_each_sequence():
    cost = StepCost()
    for tokens in (4, 8, 12) * 200:
        cost.observe(tokens, 1.0 + 0.1 * tokens, num_sequences=4)
    before = [cost.seconds(k) for k in range(4)]
    for _ in range(300):
        cost.observe_drafting(8, 0.4)
    cost.observe_drafting(0, 0.0)
    assert [cost.seconds(k) - b for k, b in enumerate(before)] == pytest.approx([0.2 * k for k in range(4)])


def test_what_a_token_costs_is_not_forgotten_while_steps_have_one_size():
    cost = StepCost()
    for i in range(200):
        cost.observe(1 + i % 4, 2.0 + 0.5 * (1 + i % 4))
    for _ in range(5000):
        cost.observe(4, 4.0)
    assert cost.seconds(3) == pytest.approx(4.0) and cost.seconds(0) == pytest.approx(2.5, rel=0.05)


def test_steps_that_become_slower_do_not_look_like_drafts_that_became_dearer():
    cost = StepCost()
    for i in range(200):
        cost.observe(1 + i % 2, 1.0 + 0.1 * (1 + i % 2))
    for i in range(3000):
        cost.observe(1 + i % 2, (1 + i / 1000) * (1.0 + 0.1 * (1 + i % 2)))
    assert cost.seconds(1) / cost.seconds(0) == pytest.approx(1.2 / 1.1, rel=0.02)


def test_a_step_that_was_held_up_hardly_counts():
    cost = StepCost()
    for i in range(300):
        cost.observe(1 + i % 3, 1.0 + 0.1 * (i % 3))
    before = cost.seconds(3) / cost.seconds(0)
    cost.observe(3, 1000.0)
    assert cost.seconds(3) / cost.seconds(0) < 1.15 * before


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1.0, 1e6])
@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 2000), (3, 1), (2, 2, 9)])
def test_more_drafts_never_seem_to_take_less_and_a_step_always_takes_something(seconds, sizes):
    cost = StepCost()
    for i in range(100):
        for n in sizes:
            cost.observe(n, seconds * (1 + (i * 7 + n) % 5))
            found = [cost.seconds(k) for k in range(9)]
            assert found == sorted(found) and found[0] > 0
            assert all(took <= (1 + k) * found[0] * (1 + 1e-9) for k, took in enumerate(found)), (
                "none is a step's worth"
            )
            assert 0 <= Depth(8, cost).choose() <= 8


def test_a_step_never_seems_to_have_less_than_no_fixed_part():
    cost = StepCost()
    for i in range(300):
        cost.observe(1 + i % 2, (1.0, 10.0)[i % 2])
    assert all(cost.seconds(k) <= (1 + k) * cost.seconds(0) * (1 + 1e-9) for k in range(9))


# What was said before


def lookup(ids, count):
    """By looking everywhere."""
    for n in range(8, 2, -1):
        for at in range(len(ids) - 1, n - 1, -1):
            if ids[at - n : at] == ids[-n:] and len(ids) >= n:
                source = list(ids)
                for i in range(count):
                    source.append(source[at + i])
                return source[len(ids) :]
    return []


def parts(symbols):
    return st.lists(st.integers(0, symbols - 1), max_size=40)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([1, 2, 3, 8]))
def test_what_is_proposed_followed_the_longest_match_the_last_time(data, symbols):
    found, ids = PromptLookup(), []
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.integers(0, 3)) == 0:
            length = data.draw(st.integers(0, len(ids)))
            found.truncate(length)
            del ids[length:]
        else:
            more = data.draw(parts(symbols))
            found.extend(more)
            ids += more
        count = data.draw(st.integers(0, 10))
        assert found.propose(count) == lookup(ids, count)
        anew = PromptLookup()
        anew.extend(ids)
        assert [b.tolist() for b in found._befores] == [b.tolist() for b in anew._befores] or found._bits != anew._bits


@pytest.mark.parametrize("symbols", [2, 5, 129_280])
def test_id_by_id_and_back_again_over_several_sizes_of_table(symbols):
    chance = random.Random(symbols)
    ids = [chance.randrange(symbols) for _ in range(1500)]
    ids[700:1100] = ids[100:500]
    found = PromptLookup()
    for i, token in enumerate(ids):
        found.extend([token])
        if i % 29 == 0:
            assert found.propose(6) == lookup(ids[: i + 1], 6)
    for length in range(1499, 0, -1):
        found.truncate(length)
        if length % 37 == 0:
            assert found.propose(6) == lookup(ids[:length], 6)
    found.truncate(0)
    assert found.propose(5) == []


def test_an_empty_one_counts_as_one():
    """Callers tell one that holds nothing from none by its truth."""
    assert PromptLookup()


def test_a_document_s_words_are_proposed_as_it_has_them():
    document = list(range(500, 900))
    found = PromptLookup()
    found.extend([*document, 1, 2, 3, *document[100:103]])
    assert found.propose(8) == document[103:111]
    found.extend([7])
    assert found.propose(8) == []


def test_of_several_the_last_counts_and_a_longer_match_before_it():
    found = PromptLookup()
    found.extend([9, 1, 2, 3, 40, 8, 1, 2, 3, 50, 7, 1, 2, 3])
    assert found.propose(1) == [50]
    found = PromptLookup()
    found.extend([9, 1, 2, 3, 40, 8, 1, 2, 3, 50, 9, 1, 2, 3])
    assert found.propose(1) == [40]


def test_a_passage_that_runs_into_the_end_goes_on_with_itself():
    found = PromptLookup()
    found.extend([1, 2, 3, 1, 2, 3])
    assert found.propose(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_an_index_takes_some_bytes_an_id():
    found = PromptLookup()
    for size in (1 << 14, (1 << 14) + 1, 20_000):
        found.extend([i * 31 % 1009 for i in range(size - len(found._ids))])
        held = [found._ids, *found._lasts, *found._befores]
        assert sum(len(a) * a.itemsize for a in held) <= 80 * size
    found.truncate(100)
    assert sum(len(a) * a.itemsize for a in [found._ids, *found._lasts, *found._befores]) < 10_000


def test_tables_grow_with_what_they_hold():
    found = PromptLookup()
    for i in range(3000):
        found.extend([i % 701])
        assert all(len(cells) >= len(found._ids) for cells in found._lasts)


def test_a_crowded_cell_is_not_searched_for_ever(monkeypatch):
    looked = []

    class Counted(list):
        def __getitem__(self, at):
            looked.append(at)
            return super().__getitem__(at)

    monkeypatch.setattr(PromptLookup, "_cells", lambda self: [0] * max(0, min(8, len(self._ids)) - 2))
    found = PromptLookup()
    for i in range(250):
        found.extend([i])
    found._befores = [Counted(b) for b in found._befores]
    assert found.propose(3) == [] and len(looked) <= 6 * 64


# Which drafter


@pytest.mark.parametrize(
    ("asked", "has_mtp", "has_dspark", "expected"),
    [
        ("auto", True, False, "mtp"),
        ("auto", False, False, "off"),
        ("auto", False, True, "off"),
        ("mtp", True, False, "mtp"),
        ("lookup", True, False, "lookup"),
        ("lookup", False, False, "lookup"),
        ("off", True, True, "off"),
    ],
)
def test_the_drafter_that_runs(asked, has_mtp, has_dspark, expected):
    assert resolve_drafter(asked, has_mtp, has_dspark) == expected


@pytest.mark.parametrize(("has_dspark", "names"), [(False, "no draft head"), (True, "DSpark head")])
def test_a_head_the_checkpoint_does_not_have_is_refused_by_name(has_dspark, names):
    with pytest.raises(RequestError, match=rf"'mtp'.*{names}.*auto, lookup, off"):
        resolve_drafter("mtp", False, has_dspark)
