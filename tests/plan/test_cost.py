"""Dollars: the bill, its division among sessions and tokens, and bands that follow the speeds'."""

from __future__ import annotations

import pytest

from pyrosome.plan.cost import cost_of, turn_cost
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.plan import Asked, Band, Sessions
from pyrosome.plan.planner import make_plan
from pyrosome.testing.shapes import tiny
from tests.plan.machines import even, gpus

MODEL = Model.of(tiny(), 1, "bf16")


def priced(price=7.2, decoding=20, **fields):
    asked = Asked(MODEL, gpus(1, price=price), **{"context": 8000, "sessions": 10, "kv_format": "f32", **fields})
    speed = even(asked, Layout.of("tp", 1), Placement())
    return asked, speed, cost_of(asked, Sessions(decoding, 1, 0, 0, 1, 1), speed)


def test_the_bill_is_by_the_hour_the_month_and_the_session():
    _, _, cost = priced()
    assert (cost.hour, cost.month, cost.session_hour) == (7.2, pytest.approx(5256), pytest.approx(0.72))


def test_an_hour_of_prompts_or_of_answers_costs_an_hour():
    _, speed, cost = priced()
    for end in ("low", "mid", "high"):
        other = {"low": "high", "mid": "mid", "high": "low"}[end]
        assert getattr(cost.million_in, end) * getattr(speed.prefill_tok_s, other) * 3600 / 1e6 == pytest.approx(7.2)
        assert getattr(cost.million_out, end) * getattr(speed.total_tok_s, other) * 3600 / 1e6 == pytest.approx(7.2)


def test_replicas_that_compute_prompts_beside_one_another_share_the_bill():
    one, several = (
        make_plan(Asked(MODEL, gpus(2, price=7.2), context=512, sessions=4, kv_format="f32", mode=mode), even).cost
        for mode in ("tp", "dp")
    )
    assert several.million_in.mid == pytest.approx(one.million_in.mid / 2)
    assert several.million_out == one.million_out  # of all sessions together already


def test_cached_tokens_cost_the_memory_they_take_for_as_long_as_a_turn_lasts():
    # All the history there is room for, held for an hour by turns of 0.5 s of prompt and 50 s of answer, costs an hour.
    asked, _, cost = priced(prompt=500, output=500)
    turns = 3600 / (0.5 + 50)
    assert cost.million_cached.mid * 20 * asked.context / 1e6 * turns == pytest.approx(7.2)
    assert cost.million_cached.low < cost.million_cached.mid < cost.million_cached.high


def test_a_turn_costs_what_is_computed_what_is_held_and_what_is_said():
    asked, _, cost = priced(prompt=500, output=200)
    expected = (500 * cost.million_in.mid + 7500 * cost.million_cached.mid + 200 * cost.million_out.mid) / 1e6
    assert turn_cost(asked, cost).mid == pytest.approx(expected)
    whole, _, price = priced(output=200)  # no prompt named: all of the context is computed
    assert turn_cost(whole, price).mid == pytest.approx(
        (8000 * price.million_in.mid + 200 * price.million_out.mid) / 1e6
    )


def test_bands_are_in_order():
    for band in (priced()[2].million_in, priced()[2].million_cached, priced()[2].million_out):
        assert isinstance(band, Band) and 0 < band.low < band.mid < band.high


def test_without_a_price_nothing_is_said_of_cost():
    assert priced(price=None)[2] is None
    plan = make_plan(Asked(MODEL, gpus(1), context=512, kv_format="f32"), even)
    assert plan.cost is None and any("price" in note for note in plan.notes)
    free = make_plan(Asked(MODEL, gpus(1, price=0.0), context=512, kv_format="f32"), even)
    assert free.cost is not None and free.cost.month == 0.0
