"""Limits, with a clock that goes as it is told."""

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrosome.server.keys.limits import MERGED_S, MINUTE_S, SPENT_S, SWEEP_EVERY, Level, Meters, Window
from pyrosome.server.keys.records import Limits
from pyrosome.server.problems import Refused
from tests.server.keys.lines import Clock

MONTH = "2030-01"


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def meters(clock):
    return Meters(clock)


def level(name="k", **limits):
    return Level(name, f"the key {name!r}", Limits(**limits))


def enter(meters, *levels, prompt=10, most=0, month=MONTH):
    return meters.enter(levels, prompt, most, month)


def refused(meters, *levels, **more):
    with pytest.raises(Refused) as error:
        enter(meters, *levels, **more)
    return error.value


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5)), max_size=80),
    st.integers(1, 12),
)
@settings(max_examples=200)
def test_no_minute_has_more_than_the_limit_and_waiting_as_told_is_enough(steps, most):
    window, now, admitted = Window(), 0.0, []
    for pause, amount in steps:
        now += pause
        wait_s = window.wait_s(now, amount, most)
        if amount > most:
            assert wait_s == math.inf
            continue
        if wait_s:
            assert 0 < wait_s <= MINUTE_S + 1e-6
            now += wait_s + 1e-6
            assert window.wait_s(now, amount, most) == 0
        window.add(now, amount)
        admitted.append((now, amount))
        recent = sum(a for at, a in admitted if now - at < MINUTE_S)
        assert recent <= most
        assert window.used(now) >= recent  # merging may only make it stricter


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=60))
def test_what_is_counted_is_the_last_minute_give_or_take_what_is_merged(steps):
    window, now, all_of = Window(), 0.0, []
    for pause, amount in steps:
        now += pause
        window.add(now, amount)
        all_of.append((now, amount))
        later = now + 1
        assert window.used(later) >= sum(a for at, a in all_of if later - at < MINUTE_S - 1e-6)
        assert window.used(later) <= sum(a for at, a in all_of if later - at < MINUTE_S + MERGED_S + 1e-6)


def test_a_window_is_bounded_whatever_comes():
    window = Window()
    for i in range(20_000):
        window.add(i * 0.01, 1)
    assert window.used(200.0) == pytest.approx(6000, abs=12)
    assert len(window._parts) <= MINUTE_S / MERGED_S + 2


def test_requests_a_minute_are_refused_with_the_seconds_until_one_would_pass(meters, clock):
    key = level(requests_per_min=2)
    enter(meters, key)
    clock.now += 20
    enter(meters, key)
    error = refused(meters, key)
    assert error.status == 429
    assert error.headers["Retry-After"] == "40"
    assert "2 requests a minute" in str(error)
    assert "try again in 40 s" in str(error)
    clock.now += 39
    assert refused(meters, key).headers["Retry-After"] == "1"
    clock.now += 1
    enter(meters, key)


def test_tokens_are_counted_at_entry_by_the_prompt_and_at_the_end_by_the_output(meters, clock):
    key = level(tokens_per_min=100)
    hold = enter(meters, key, prompt=60)
    assert refused(meters, key, prompt=50).status == 429
    enter(meters, key, prompt=40).leave(0, 0, MONTH)
    clock.now += 30
    hold.leave(25, 0, MONTH)
    clock.now += 30
    error = refused(meters, key, prompt=76)
    assert error.headers["Retry-After"] == "30"
    enter(meters, key, prompt=75)


def test_a_prompt_that_never_fits_is_no_case_for_trying_again(meters):
    error = refused(meters, level(tokens_per_min=100), prompt=101)
    assert error.status == 400
    assert "Retry-After" not in error.headers
    assert "101 tokens" in str(error)


def test_only_so_many_run_at_once(meters):
    key = level(max_concurrent=2)
    first, _ = enter(meters, key), enter(meters, key)
    assert refused(meters, key).status == 429
    first.leave(0, 0, MONTH)
    first.leave(0, 0, MONTH)  # a second time gives nothing back
    enter(meters, key)
    assert refused(meters, key).status == 429


def test_what_one_level_refuses_is_counted_at_none(meters, clock):
    account, key = level("a", requests_per_min=10), level("k", requests_per_min=1)
    enter(meters, key, account)
    for _ in range(20):
        refused(meters, key, account)
    for i in range(9):
        enter(meters, level(f"other{i}"), account)
    assert "'a'" in str(refused(meters, level("last"), account))


def test_the_tighter_of_key_and_account_holds(meters):
    account, key = level("a", max_concurrent=1), level("k", max_concurrent=5)
    enter(meters, key, account)
    assert "'a'" in str(refused(meters, key, account))


def test_two_keys_of_an_account_share_its_limits_and_nothing_else(meters):
    account = level("a", requests_per_min=3)
    enter(meters, level("k", requests_per_min=1), account)
    refused(meters, level("k", requests_per_min=1), account)
    enter(meters, level("l", requests_per_min=1), account)


def test_a_hundred_threads_at_a_limit_of_five_are_five(meters):
    key, start = level(max_concurrent=5, requests_per_min=1000), threading.Barrier(100)
    admitted, refusals = [], []

    def come():
        start.wait()
        try:
            admitted.append(enter(meters, key))
        except Refused as error:
            refusals.append(error.status)

    threads = [threading.Thread(target=come) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(admitted), refusals) == (5, [429] * 95)
    for hold in admitted:
        hold.leave(0, 0, MONTH)
    for _ in range(5):
        enter(meters, key)


def test_an_answers_head_tells_what_is_left_of_the_tightest(meters, clock):
    account, key = level("a", requests_per_min=100, tokens_per_min=1000), level("k", requests_per_min=5)
    enter(meters, key, account, prompt=100)
    clock.now += 15
    assert enter(meters, key, account, prompt=250).headers == {
        "x-ratelimit-limit-requests": "5", "x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "650", "x-ratelimit-reset-tokens": "1m0s",
    }  # fmt: skip
    clock.now += 30.25
    assert meters.headers([key], clock.now)["x-ratelimit-reset-requests"] == "29.75s"
    assert enter(meters, level("free")).headers == {}


def spent(meters, budgeted, micro, month=MONTH):
    settled = meters.stale([budgeted], month)
    assert settled is not None
    meters.read([budgeted], month, {budgeted.id: micro}, settled)


def test_a_budget_that_is_spent_is_a_402_that_says_when_the_next_month_begins(meters):
    key = level(budget_micro=1000)
    spent(meters, key, 1000)
    error = refused(meters, key, most=1)
    assert error.status == 402
    assert "0.00 left of its 0.001 for 2030-01" in str(error)
    assert "2030-02-01, 00:00 UTC" in str(error)


def test_a_request_that_may_cost_more_than_is_left_is_told_to_ask_for_less(meters):
    key = level(budget_micro=1000)
    spent(meters, key, 400)
    assert "max_tokens" in str(refused(meters, key, most=601))
    enter(meters, key, most=600)


def test_what_runs_is_held_at_most_and_given_back_for_what_it_cost(meters):
    key = level(budget_micro=1000)
    spent(meters, key, 0)
    hold = enter(meters, key, most=700)
    error = refused(meters, key, most=400)
    assert error.status == 429, "it may fit once the other has ended"
    assert "Retry-After" in error.headers
    hold.leave(5, 100, MONTH)
    second = enter(meters, key, most=900)
    second.leave(5, 900, MONTH)
    assert refused(meters, key, most=1).status == 402


def test_a_budget_is_never_overspent_however_many_come(meters):
    key = level(budget_micro=1000)
    spent(meters, key, 0)
    paid = 0
    for cost in (300, 10, 250, 300, 7, 133, 50, 3, 90):
        try:
            hold = enter(meters, key, most=300)
        except Refused:
            continue
        hold.leave(1, cost, MONTH)
        paid += cost
    assert 700 < paid <= 1000


def test_what_costs_nothing_needs_no_budget(meters):
    key = level(budget_micro=0)
    spent(meters, key, 0)
    enter(meters, key, most=0)
    assert refused(meters, key, most=1).status == 402


def test_a_month_that_begins_has_its_whole_budget(meters):
    key = level(budget_micro=1000)
    spent(meters, key, 1000)
    refused(meters, key, most=1)
    spent(meters, key, 0, "2030-02")
    enter(meters, key, most=1000, month="2030-02")


def test_a_request_across_the_months_boundary_is_settled_in_the_month_it_began(meters):
    key = level(budget_micro=1000)
    spent(meters, key, 0)
    spent(meters, key, 0, "2030-02")
    hold = enter(meters, key, most=800)
    enter(meters, key, most=1000, month="2030-02").leave(1, 300, "2030-02")
    hold.leave(1, 500, MONTH)
    assert refused(meters, key, most=501).status == 402
    enter(meters, key, most=700, month="2030-02")


def test_what_was_settled_while_the_store_was_read_is_not_forgotten(meters, clock):
    key = level(budget_micro=1000)
    spent(meters, key, 0)
    hold = enter(meters, key, most=600)
    clock.now += SPENT_S
    settled = meters.stale([key], MONTH)
    hold.leave(1, 600, MONTH)
    meters.read([key], MONTH, {key.id: 0}, settled)  # the store was read before that line was there
    assert refused(meters, key, most=401).status == 402


def test_what_other_servers_spent_is_seen_within_seconds(meters, clock):
    key = level(budget_micro=1000)
    spent(meters, key, 0)
    assert meters.stale([key], MONTH) is None
    clock.now += SPENT_S
    spent(meters, key, 950)
    assert refused(meters, key, most=100).status == 402


def test_who_has_no_budget_is_not_looked_up(meters):
    assert meters.stale([level(requests_per_min=5)], MONTH) is None
    assert meters.stale([], MONTH) is None


def test_levels_that_are_idle_are_forgotten_and_those_at_work_are_not(meters, clock):
    busy = level("busy", max_concurrent=1)
    enter(meters, busy)
    clock.now += MINUTE_S
    for i in range(SWEEP_EVERY):
        enter(meters, level(f"k{i}")).leave(0, 0, MONTH)
        clock.now += 1
    assert len(meters._meters) < 100
    assert refused(meters, busy).status == 429
