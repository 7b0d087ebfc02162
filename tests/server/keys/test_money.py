"""Prices, costs and amounts: integers, and rounded once."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrosome.chat.events import Usage
from pyrosome.errors import RequestError
from pyrosome.server.keys.money import MAX_MICRO, Price, micro_of, shown

counts = st.integers(0, 2_000_000)
prices = st.builds(Price, *[st.integers(0, 10**9)] * 3)


@given(prices, counts, counts, st.integers(0, 400_000))
def test_a_cost_is_exact_and_rounded_up_once(price, prompt, cached, output):
    cached = min(prompt, cached)
    exact = Fraction((prompt - cached) * price.prompt + cached * price.cached + output * price.output, 10**6)
    cost = price.of(Usage(prompt, output, 0, cached))
    assert isinstance(cost, int)
    assert exact <= cost < exact + 1


@given(prices, counts, counts, st.integers(0, 400_000), st.integers(0, 400_000))
def test_no_request_costs_more_than_what_it_was_held_to(price, prompt, cached, output, more):
    assert price.of(Usage(prompt, output, 0, min(prompt, cached))) <= price.at_most(prompt, output + more)


def test_cached_tokens_have_their_own_price():
    price = Price(prompt=1_000_000, cached=100_000, output=2_000_000)  # 1, 0.1 and 2 units a million
    assert price.of(Usage(1000, 10, 0, 600)) == 400 + 60 + 20


def test_more_cached_tokens_than_prompt_are_not_paid_back():
    assert Price(1_000_000, 0, 0).of(Usage(10, 0, 0, 50)) == 0


@given(st.integers(0, MAX_MICRO))
def test_an_amount_shown_is_the_amount_read(micro):
    assert micro_of(shown(micro)) == micro


@pytest.mark.parametrize(
    ("micro", "text"), [(0, "0.00"), (12_500_000, "12.50"), (1, "0.000001"), (-1_500_000, "-1.50")]
)
def test_amounts_have_two_decimals_and_more_where_they_need_them(micro, text):
    assert shown(micro) == text


@pytest.mark.parametrize("text", ["", "x", "-1", "0.0000001", "1e99", "nan", "Infinity", "1,5", "1000000001"])
def test_what_is_no_amount_is_refused_by_name(text):
    with pytest.raises(RequestError, match="budget is"):
        micro_of(text, "budget")


@pytest.mark.parametrize("wrong", [-1, 10**12 + 1, 0.5, True, "1", None])
def test_a_price_is_an_integer_in_its_range(wrong):
    with pytest.raises(RequestError, match="price of cached"):
        Price(0, wrong, 0)
