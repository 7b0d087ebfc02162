"""Intervals and errors, checked against numbers worked out by hand or drawn."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from pyrosome.errors import RequestError
from pyrosome.evals.shares import Share, difference, ratio


def test_a_share_has_wilsons_interval():
    found = Share.of([True] * 8 + [False] * 2)
    assert (found.hits, found.n) == (8, 10)
    assert (found.low, found.high) == pytest.approx((0.4901, 0.9433), abs=1e-3)  # Wilson's for 8 of 10
    assert found.as_dict() == {"share": 0.8, "low": found.low, "high": found.high, "hits": 8, "n": 10}


def test_the_share_of_nothing():
    assert Share.of([]).as_dict() == {"share": None, "low": 0.0, "high": 1.0, "hits": 0, "n": 0}


def test_a_difference_is_that_of_the_pairs():
    found = difference([True, True, False, False, True], [False, True, False, True, False])
    assert found["difference"] == pytest.approx(0.2) and found["n"] == 5
    assert found["low"] < 0.2 < found["high"]
    turned = difference([False, True, False, True, False], [True, True, False, False, True])
    assert (turned["low"], turned["high"]) == pytest.approx((-found["high"], -found["low"]))


def test_answers_that_agree_make_a_difference_sure():
    agree = difference([True, False] * 50, [True, False] * 50)
    apart = difference([True, False] * 50, [False, True] * 50)
    assert agree["difference"] == apart["difference"] == 0
    assert agree["high"] < 0.04 and apart["high"] > 0.15
    assert difference([True] * 100, [False] * 100)["high"] == pytest.approx(1.0, abs=0.01)
    assert difference([], [])["difference"] is None


def test_an_interval_of_differences_holds_the_true_one_about_95_times_in_100():
    rng, held = random.Random(1), 0
    for _ in range(400):
        first = [rng.random() < 0.8 for _ in range(60)]
        second = [a if rng.random() < 0.5 else rng.random() < 0.6 for a in first]
        found = difference(first, second)  # in truth 0.8 - (0.4 + 0.3) = 0.1
        held += found["low"] <= 0.1 <= found["high"]
    assert 0.92 < held / 400 < 0.99


def test_pairs_have_two_sides():
    with pytest.raises(RequestError, match="of 1 and 2 answers"):
        difference([True], [True, False])


def test_a_ratio_is_of_the_sums_and_its_error_that_of_its_groups():
    assert ratio([1.0, 3.0], [1.0, 1.0], ["a", "b"]) == pytest.approx((2.0, math.sqrt(2 * 2) / 2))
    once = ratio([1.0, 3.0, 2.0, 2.0], [1.0] * 4, [1, 2, 3, 4])
    together = ratio([1.0, 3.0, 2.0, 2.0], [1.0] * 4, [1, 1, 2, 2])  # what differs within a group evens out
    assert once.value == together.value == 2.0 and together.error == 0 < once.error
    assert math.isnan(ratio([1.0, 3.0], [1.0, 1.0], ["a", "a"]).error)


def test_the_error_of_a_ratio_is_how_much_it_varies():
    rng = random.Random(2)

    def sample():
        sizes = [rng.randint(5, 50) for _ in range(80)]
        return ratio([rng.gauss(2, 1) * n for n in sizes], sizes, range(80))

    found = [sample() for _ in range(300)]
    spread = statistics.stdev(f.value for f in found)
    assert statistics.mean(f.error for f in found) == pytest.approx(spread, rel=0.15)
