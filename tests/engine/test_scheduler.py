"""Who computes what in a step: the budget is kept, nobody starves, and a long prompt makes nobody wait."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.engine.scheduler import PROMPT_SHARE, cut, plan_step
from pyrosome.engine.track import AGING_STEPS


@dataclasses.dataclass(eq=False)
class Waiting:
    """What planning sees of a completion."""

    order: int
    num_pending: int = 1
    length: int = 0
    prompt: int = 0  # tokens of it; from there on it generates
    num_drafts: int = 0
    priority: int = 0
    boundary: int = 0
    turn: int = 0
    waited: int = 0

    @property
    def is_decoding(self) -> bool:
        return self.length >= self.prompt

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority + self.waited // AGING_STEPS, -self.order


def prompt(order: int, length: int, **about) -> Waiting:
    return Waiting(order, num_pending=length, prompt=length, **about)


def says(order: int, drafts: int = 0, **about) -> Waiting:
    return Waiting(order, length=50, prompt=50, num_drafts=drafts, **about)


def planned(candidates, step_tokens: int) -> dict[int, tuple[int, int]]:
    plan = plan_step(candidates, step_tokens)
    assert len({id(c) for c, _, _ in plan}) == len(plan), "nobody twice"
    assert sum(count + drafts for _, count, drafts in plan) <= step_tokens
    assert all(0 < count <= c.num_pending and 0 <= drafts <= c.num_drafts for c, count, drafts in plan)
    assert all(not drafts or count == c.num_pending for c, count, drafts in plan), "drafts follow the last id"
    return {c.order: (count, drafts) for c, count, drafts in plan}


def test_who_generates_comes_first_with_its_drafts_and_prompts_have_the_rest():
    assert planned([prompt(0, 1000), says(1, 3), says(2)], 100) == {1: (1, 3), 2: (1, 0), 0: (95, 0)}
    assert planned([says(0, 8), says(1, 8)], 10) == {0: (1, 8), 1: (1, 0)}
    assert planned([], 100) == {}


def test_drafts_leave_prompts_their_share():
    found = planned([says(i, 8) for i in range(10)] + [prompt(10, 1000)], 80)
    assert found[10][0] >= 80 // PROMPT_SHARE and all(found[i][0] == 1 for i in range(10))


def test_short_prompts_are_not_behind_a_long_one():
    found = planned([prompt(0, 10_000), prompt(1, 20), prompt(2, 30)], 600)
    assert (found[1], found[2]) == ((20, 0), (30, 0)) and found[0][0] >= 4 * BLOCK_TOKENS


def test_higher_priority_goes_first_and_waiting_makes_up_for_it():
    low, high = prompt(0, 1000), prompt(1, 1000, priority=1)
    assert planned([low, high], BLOCK_TOKENS) == {1: (BLOCK_TOKENS, 0)}
    low.waited = 2 * AGING_STEPS
    assert planned([low, high], BLOCK_TOKENS) == {0: (BLOCK_TOKENS, 0)}


def test_a_prompt_is_cut_at_blocks_and_where_state_is_to_be_kept():
    assert cut(prompt(0, 1000), 300) == 256
    assert cut(prompt(0, 1000), 100) == 100, "less than a block is better than nothing"
    assert cut(prompt(0, 200), 300) == 200
    at = prompt(0, 1000, boundary=640)
    at.length, at.num_pending = 300, 700
    assert cut(at, 500) == 340 and cut(at, 100) == 84
    assert cut(at, 20) == 20


def test_a_budget_smaller_than_what_generates_goes_round():
    everybody = [says(i) for i in range(7)]
    served, turns = [], itertools.count(1)
    for _ in range(7):
        for order in planned(everybody, 3):
            everybody[order].turn = next(turns)
            served.append(order)
    assert sorted(served) == sorted(list(range(7)) * 3)


one = st.builds(
    lambda order, is_prompt, size, drafts, priority, boundary: (
        prompt(order, size, priority=priority, boundary=boundary)
        if is_prompt
        else says(order, drafts, priority=priority)
    ),
    st.just(0), st.booleans(), st.integers(1, 700), st.integers(0, 8), st.integers(0, 2), st.integers(0, 700),
)  # fmt: skip


@given(st.lists(one, min_size=1, max_size=30), st.integers(1, 600))
@example([prompt(0, 16), prompt(1, 16, priority=1), prompt(2, 16, priority=1)], 1)
@example([prompt(0, 700), *(prompt(i, 700, priority=2) for i in range(1, 30))], 1)
def test_everybody_is_served_before_long_whatever_the_budget(everybody, step_tokens):
    """Prompts end, and who generates is served again and again, in a number of steps that the work bounds."""
    for order, c in enumerate(everybody):
        c.order = order
    # A round serves each once: at least one in a step, and a prompt by a share at least.  Prompts of higher priority
    # may take whole steps before one of lower priority has its first: so long again at most.
    longest = max(c.num_pending for c in everybody)
    bound = 2 * (len(everybody) + 1) * (longest // max(1, step_tokens // PROMPT_SHARE) + 3)
    turn, seen = 0, {c.order: 0 for c in everybody}
    for _ in range(bound):
        before = [(c.num_pending, c.length, c.turn, c.waited) for c in everybody]
        plan = planned(everybody, step_tokens)
        assert plan, "a step with work does something"
        assert [(c.num_pending, c.length, c.turn, c.waited) for c in everybody] == before, "planning changes nothing"
        for c in everybody:
            c.waited += 1
            if c.order in plan:
                turn += 1
                count, _ = plan[c.order]
                c.turn, c.waited = turn, 0
                seen[c.order] += 1
                c.length += count
                c.num_pending = c.num_pending - count or 1
        if all(seen.values()) and all(c.is_decoding for c in everybody):
            break
    assert all(seen.values()) and all(c.is_decoding for c in everybody)
