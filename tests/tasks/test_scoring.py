"""Wilson's interval against published values, and what counts as right."""

import pytest

from pyrosome.errors import RequestError
from pyrosome.tasks.sample import Sample
from pyrosome.tasks.scoring import is_right, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)  # Newcombe 1998, table I, method 3
def test_the_interval_is_wilsons(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_no_trials_say_nothing_and_a_smaller_z_says_more():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100, z=1.0)
    assert wilson(50, 100)[0] < low < 0.5 < high < wilson(50, 100)[1]


@pytest.mark.parametrize(("hits", "n"), [(-1, 3), (4, 3)])
def test_more_hits_than_trials_are_refused(hits, n):
    with pytest.raises(RequestError, match=f"{hits} hits of {n}"):
        wilson(hits, n)


def test_an_answer_is_right_as_a_whole_spaces_around_it_aside():
    sample = Sample("several", about={"expected": "12 37"})
    assert is_right(sample, " 12 37\n")
    assert not any(is_right(sample, a) for a in ("12", "37 12", "12  37", "12 37 .", ""))
