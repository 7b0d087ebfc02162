"""A plan in words and columns."""

from __future__ import annotations

import pytest

from pyrosome.plan import words
from pyrosome.plan.layout import MODES
from pyrosome.plan.plan import Band, Item, Place
from tests.plan import made


def test_places_that_hold_the_same_are_one_column():
    more = (*made.ITEMS, Item("head", "weights", 1 << 30))
    places = [Place(f"h200 {i}", 100, more if i == 3 else made.ITEMS) for i in range(6)]
    found = words.columns([*places, Place("RAM", 0, ())])
    assert [(c.title, c.count) for c in found] == [("h200 0-2", 3), ("h200 3", 1), ("h200 4-5", 2), ("RAM", 1)]


def test_places_of_other_sizes_are_columns_of_their_own():
    found = words.columns([Place("h200 0", 100, made.ITEMS), Place("h200 1", 101, made.ITEMS)])
    assert [c.title for c in found] == ["h200 0", "h200 1"]


def test_rows_are_by_kind_the_large_ones_first_without_what_is_nowhere():
    places = (
        Place("a", 0, (Item("x", "kv", 1), Item("experts", "weights", 2), Item("none", "state", 0))),
        Place("b", 0, (Item("experts", "weights", 5), Item("head", "weights", 7), Item("y", "something new", 9))),
    )
    assert words.rows(words.columns(places)) == [
        ("weights", [("head", [0, 7]), ("experts", [2, 5])]),
        ("history, stored", [("x", [1, 0])]),
        ("something new", [("y", [0, 9])]),
    ]


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        (0, "0"), (0.0123, "0.012"), (0.5, "0.50"), (1.26, "1.3"), (9.96, "10"), (12.4, "12"), (99.6, "100"),
        (1234, "1,200"), (98_765, "99,000"), (float("inf"), "-"), (float("nan"), "-"),
    ],
)  # fmt: skip
def test_an_estimate_is_shown_by_two_digits(x, shown):
    assert words.figure(x) == shown


def test_a_band_is_shown_by_its_ends_and_never_bare():
    assert words.band(Band(31, 45, 62)) == "31-62"
    assert words.band(Band(0.4, 0.6, 0.9), prefix="$") == "$0.40-0.90"
    assert words.band(Band(30.1, 30.2, 30.3)) == "30"  # ends that no estimate tells apart


def test_every_mode_is_explained():
    assert set(words.MEANING) == set(MODES)


def test_the_short_form_says_the_load_the_room_the_speed_and_where_they_are_from():
    plan, speed = words.short(made.plan())
    assert plan == ("Plan: 7 sessions of 1,048,576 tokens by ep; there is room for 48, each 3.77 GiB.")
    assert speed == (
        "Predicted: 30-120 tok/s for each of them, 3,000-12,000 tok/s of prompt; limited by memory bandwidth: routed "
        "experts (maker's peaks)."
    )
    alone = made.plan()
    alone.asked["machine"] = {"count": 1}
    assert words.short(alone)[0].startswith("Plan: 7 sessions of 1,048,576 tokens; there is room")
    lacking = words.short(made.plan(fits=False, room=5))
    assert lacking[-1] == "It does not fit: h200 0 lacks 3.20 GiB of 140.40 GiB. 5 sessions instead of 7 fit"


def test_a_ranked_line_has_the_price_of_a_session_when_full():
    assert words.ranked(made.plan("pp", hour=12.0)) == ("pp", "48", "30-120", "210-840", "$0.25", "$3.2-13")
    assert words.ranked(made.plan("pp", hour=None))[-2:] == ("-", "-")
