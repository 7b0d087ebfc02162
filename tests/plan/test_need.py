"""What is needed, read from a sentence, and the machines of a price list that give it."""

from __future__ import annotations

import math

import pytest

from pyrosome.errors import RequestError
from pyrosome.plan.need import Need, offers, parse
from tests.plan import made


@pytest.mark.parametrize(
    ("text", "need"),
    [
        ("20 users, 128K, 30 tok/s each", Need(20, 131_072, 30.0)),
        ("128K, 30 tok/s each, 20 users", Need(20, 131_072, 30.0)),
        ("30 tok/s and 1 user with 1M", Need(1, 1_048_576, 30.0)),
        ("5 sessions of 200,000 tokens", Need(5, 200_000)),
        ("1,000 users; context 8k; 600 tok/s total", Need(1000, 8192, total_tok_s=600.0)),
        ("20 users,128K,300 tokens/s together,$5/h", Need(20, 131_072, total_tok_s=300.0, usd_hour=5.0)),
        (
            "3 at once, 64K tokens each, at least 25 tokens per second, under $3,650/month",
            Need(3, 65_536, 25.0, usd_hour=5.0),
        ),
        ("2 people, 64K context, >= 12.5 tps per user, max 4 dollars an hour", Need(2, 65_536, 12.5, usd_hour=4.0)),
        ("2 clients, 64K, first token in 20 s", Need(2, 65_536, first_token_s=20.0)),
        ("2 clients, 64K, TTFT < 1.5s", Need(2, 65_536, first_token_s=1.5)),
        ("2 clients, 64K, 7300 $/month", Need(2, 65_536, usd_hour=10.0)),
        ("  2   USERS ,  128 K ", Need(2, 131_072)),
    ],
)
def test_a_need_is_read_in_any_order_and_by_the_words_people_use(text, need):
    assert parse(text) == need


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "does not say how many sessions and the context"),
        ("20 users", "does not say the context"),
        ("128K", "does not say how many sessions"),
        ("20 users, 128K, 64K", "says the context twice"),
        ("20 users, 128K, 30 tok/s, 20 tok/s each", "says the speed of each twice"),
        ("20 users, 128K, $5/h, $3000/month", "says the price twice"),
        ("20 users, 128K, fast", "'fast' was not understood"),
        ("-20 users, 128K", "'-20 users' was not understood"),
        ("0 users, 128K", "how many sessions is 0; a whole number from 1"),
        ("2.5 users, 128K", "how many sessions is 2.5; a whole number"),
        ("99999999 users, 128K", "how many sessions is 99999999; a whole number from 1 to 1,000,000"),
        ("20 users, 0", "--need is '0'"),
        ("20 users, 99999M", "--need is '99999m'"),
        ("20 users, 128K, 0 tok/s", "the speed of each is 0; a number above 0"),
        ("20 users, 128K, nan tok/s", "'nan tok/s' was not understood"),
        ("20 users, 128K, $0/h", "the price is 0; a number above 0"),
        ("20 users, 128K, 5", "says the context twice"),
    ],
)
def test_nonsense_is_refused_with_what_was_found(text, found):
    with pytest.raises(RequestError) as refused:
        parse(text)
    assert found in str(refused.value)


def test_what_was_not_understood_is_answered_with_the_form_that_is():
    with pytest.raises(RequestError, match="20 users, 128K, 30 tok/s each"):
        parse("as many as you can")
    with pytest.raises(RequestError, match=r"price list.*--prices"):
        offers(Need(1, 8192), made.asked(), [], lambda asked: [])


MACHINES = {"small": made.machine(1, 4.0), "large": made.machine(4, 16.0), "middle": made.machine(2, 8.0)}


def names(need, plans):
    """Names in the order they are offered, and the offers, where `plans` are each machine's."""
    by_count = {MACHINES[name].count: found for name, found in plans.items()}
    found = offers(need, made.asked(), list(MACHINES.items()), lambda asked: by_count[asked.machine.count])
    return [o.name for o in found], {o.name: o for o in found}


def test_the_cheapest_that_meets_a_need_comes_first_and_what_does_not_meet_it_last():
    order, found = names(
        Need(20, 131_072, 30.0),
        {
            "small": [made.plan(fits=False, room=5)],
            "middle": [made.plan(tok_s=31.0, hour=8.0)],
            "large": [made.plan(tok_s=90.0, hour=16.0)],
        },
    )
    assert order == ["middle", "large", "small"]
    assert found["small"].lacks == ("holds 5 of 20 sessions",) and found["small"].shortfall == 4.0
    assert not found["middle"].lacks and not found["middle"].surely  # its band begins at half of 31
    assert not found["large"].lacks and found["large"].surely


def test_a_machine_is_offered_by_the_mode_that_meets_the_need():
    plans = [made.plan("tp", tok_s=20.0), made.plan("pp", fits=False), made.plan("ep", tok_s=40.0)]
    _, found = names(Need(20, 131_072, 30.0), dict.fromkeys(MACHINES, plans))
    assert {o.plan.mode for o in found.values()} == {"ep"}


def test_where_nothing_meets_a_need_the_nearest_comes_first_with_all_that_lacks():
    order, found = names(
        Need(20, 131_072, 100.0, total_tok_s=5000.0, first_token_s=10.0, usd_hour=5.0),
        {
            "small": [made.plan(tok_s=25.0, first_token_s=5.0)],
            "middle": [made.plan(tok_s=80.0, sessions=20, first_token_s=20.0)],
            "large": [made.plan(tok_s=30.0, first_token_s=5.0)],
        },
    )
    assert order[0] == "middle"  # 3.1 times too slow together; the small one is 28 times
    assert found["middle"].lacks == (
        "$8.00/h is $3.00 too much",
        "about 80 tok/s each, not 100",
        "about 1,600 tok/s together, not 5,000",
        "first token after about 20 s, not 10",
    )
    assert found["middle"].shortfall == pytest.approx(5000 / 1600)


def test_a_first_token_is_sure_where_the_late_end_of_its_band_is_in_time():
    plans = {"small": [made.plan(first_token_s=9.0)], "middle": [made.plan(first_token_s=4.0)], "large": [made.plan()]}
    order, found = names(Need(2, 8192, first_token_s=10.0), plans)
    assert order == ["small", "middle", "large"]  # 100 s is too late, 9 and 4 are not
    assert (found["small"].surely, found["middle"].surely) == (False, True)


def test_what_holds_nothing_comes_after_what_holds_too_few_with_its_reason():
    plans = {
        "small": [made.plan(fits=False, room=0)],
        "middle": [made.plan(fits=False, room=90)],  # room enough for sessions, and something else lacks
        "large": [made.plan(fits=False, room=2)],
    }
    order, found = names(Need(20, 8192), plans)
    assert order[0] == "large" and found["large"].lacks == ("holds 2 of 20 sessions",)
    assert found["small"].lacks == found["middle"].lacks == ("h200 0 lacks 3.20 GiB of 140.40 GiB",)


def test_a_machine_without_a_price_meets_no_limit_and_comes_after_those_that_have_one():
    without = [*MACHINES.items(), ("unknown", made.machine(8, None))]
    for limit, meets in ((math.inf, True), (100.0, False)):
        found = offers(Need(1, 8192, usd_hour=limit), made.asked(), without, lambda asked: [made.plan()])
        assert found[-1].name == "unknown" and (not found[-1].lacks) is meets
    assert found[-1].lacks == ("its price is not known",)


def test_each_machine_is_planned_for_the_sessions_and_the_context_that_are_needed():
    seen = []

    def planner(asked):
        seen.append((asked.machine.count, asked.sessions, asked.context, asked.kv_format))
        return [made.plan()]

    offers(Need(20, 131_072), made.asked(kv_format="bf16"), list(MACHINES.items()), planner)
    assert seen == [(1, 20, 131_072, "bf16"), (4, 20, 131_072, "bf16"), (2, 20, 131_072, "bf16")]
