"""The queue: its bound, its last places, and when a first token will come."""

from __future__ import annotations

import pytest

from pyrosome.server.gate import LONGEST_WAIT_S, Gate, Pace
from pyrosome.server.problems import Refused


def enter(gate: Gate, account: str, times: int) -> int:
    """How often an account gets in."""
    entered, found = 0, None
    while entered < times and found is None:
        try:
            gate.enter(account)
            entered += 1
        except Refused as refused:
            found = refused
    assert found is None or (found.status == 429 and int(found.headers["Retry-After"]) >= 1)
    return entered


def test_the_queue_has_an_end():
    gate = Gate(2, 3)
    assert enter(gate, "", 99) == 5
    gate.leave(1.0, "")
    assert enter(gate, "", 99) == 1
    assert (gate.num_inside, gate.num_refused) == (5, 2)


def test_one_account_cannot_fill_the_queue():
    gate = Gate(8, 92)
    assert enter(gate, "much", 1000) == 75
    assert enter(gate, "little", 10) == 10, "there is room for who has less"
    assert enter(gate, "much", 1) == 0


def test_the_last_places_are_shared_by_whoever_has_less_than_an_equal_part():
    gate = Gate(10, 90)
    assert enter(gate, "first", 1000) == 75
    assert enter(gate, "second", 1000) == 25, "of 100, two and one who may still come have 33 each"
    gate.leave(1.0, "first")
    assert enter(gate, "first", 1) == 0
    assert enter(gate, "third", 1) == 1


def test_accounts_are_forgotten_when_they_have_left():
    gate = Gate(1, 3)
    for n in range(1000):
        gate.enter(f"account {n}")
        gate.leave(0.1, f"account {n}")
    assert not gate._by_account


def test_without_accounts_everybody_may_use_all_of_it():
    gate = Gate(2, 2)
    assert enter(gate, "", 99) == 4


def test_who_is_turned_away_is_told_when_to_come_from_how_long_others_took():
    gate = Gate(2, 8)
    for _ in range(10):
        gate.enter()
    for _ in range(10):
        gate.leave(6.0)
    for _ in range(10):
        gate.enter()
    assert gate.retry_after() == 24, "eight wait, two go every six seconds"
    assert gate.wait_s() == pytest.approx(24)
    for _ in range(64):
        gate._took.append(1000.0)
    assert gate.retry_after() == LONGEST_WAIT_S


def test_a_gate_that_closes_lets_nobody_in():
    gate = Gate(1, 1)
    gate.is_closing = True
    with pytest.raises(Refused) as refused:
        gate.enter()
    assert refused.value.status == 503


def test_the_pace_is_that_of_the_fastest_prompt_and_counts_what_was_computed():
    pace = Pace()
    assert pace.tokens_per_s == 0 and pace.first_token_s(1000, ()) == 0, "nothing is known"
    pace.computed(1000, 0, 10.0)
    pace.computed(1000, 900, 0.5)
    assert pace.tokens_per_s == 200
    assert pace.first_token_s(1000, ()) == 5
    pace.computed(1000, 1000, 0.001)
    assert pace.tokens_per_s == 200, "what was all there says nothing about computing"
    assert pace.uncached(300) == pytest.approx(300 * (1 - 1900 / 3000))


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one():
    pace = Pace()
    pace.computed(100, 0, 1.0)
    assert pace.first_token_s(100, (10_000, 50)) == pytest.approx(2.5)
