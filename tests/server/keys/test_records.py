"""What may stand in a field."""

import pytest

from pyrosome.errors import RequestError
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import (
    LAST_TIME,
    Limits,
    changed_limits,
    day_of,
    iso,
    name_of,
    price_of,
    scopes_of,
    span_of,
    time_of,
)

NOW = 1_700_000_000.5  # 2023-11-14T22:13:20.5Z


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ("30d", 1_700_000_000 + 30 * 86400), ("12h", 1_700_043_200), ("8w", 1_704_838_400), ("5m", 1_700_000_300),
        ("2030-01-31", 1_896_048_000), ("2030-01-31T12:00:00Z", 1_896_091_200),
        ("2030-01-31T12:00:00+02:00", 1_896_084_000), (1_896_048_000, 1_896_048_000), (None, None),
    ],
)  # fmt: skip
def test_a_time_to_come_has_many_spellings(given, at):
    assert time_of(given, NOW) == at


@pytest.mark.parametrize(
    "given", ["", "soon", "2023-11-14", 1_700_000_000, "0d", True, 1.5, [], LAST_TIME + 1, "9999999d", "٣d", "-5d"]
)
def test_a_time_that_is_none_or_has_passed_is_refused(given):
    with pytest.raises(RequestError, match="expires is"):
        time_of(given, NOW)


def test_a_span_is_seconds_or_words():
    assert [span_of(v, "grace", 86400) for v in (0, 60, "30m", "1d")] == [0, 60, 1800, 86400]
    for wrong in (-1, 86401, "2d", "x", None, True):
        with pytest.raises(RequestError, match="grace is"):
            span_of(wrong, "grace", 86400)


@pytest.mark.parametrize("name", ["a", "ключ", "'; DROP TABLE keys; --", "=1+1", "x" * 100])
def test_any_printable_name_is_one(name):
    assert name_of(name) == name


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x00b", "x" * 101, 5, None, "\u202e", "\ud800"])
def test_a_name_that_cannot_be_shown_in_a_line_is_refused(name):
    with pytest.raises(RequestError, match="name is"):
        name_of(name)


def test_scopes_are_some_of_those_there_are():
    assert scopes_of(["generate", "account"]) == frozenset({"generate", "account"})
    for wrong in ([], "generate", ["root"], [None], None, [["admin"]]):
        with pytest.raises(RequestError, match="scope"):
            scopes_of(wrong)


def test_limits_that_are_not_given_stay_and_null_takes_one_away():
    now = Limits(60, 1000, 5, 7)
    assert changed_limits({"tokens_per_min": 10, "max_concurrent": None}, now) == Limits(60, 10, None, 7)


@pytest.mark.parametrize(
    "wrong",
    [{"requests_per_min": 0}, {"tokens_per_min": -1}, {"max_concurrent": 1.5}, {"budget_micro": True},
     {"budget_micro": 10**16}, {"requests": 5}, [], 5, {"requests_per_min": "5"}],
)  # fmt: skip
def test_a_limit_outside_its_range_is_refused_by_name(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong)) if isinstance(wrong, dict) else "limits"):
        changed_limits(wrong, Limits())


def test_a_limit_that_is_not_there_is_wider_than_any_but_is_not_compared_as_a_wish():
    assert Limits().wider(Limits(5, None, 1)) == ["requests_per_min", "max_concurrent"]
    assert Limits().above(Limits(5, None, 1)) == []
    assert Limits(6, 10, 1).above(Limits(5, None, 1)) == ["requests_per_min"]
    assert Limits(5, 10, 1).wider(Limits(5, 10, 1)) == []


def test_a_price_is_whole_or_not_there():
    assert price_of({"prompt_micro": 1, "cached_micro": 2, "output_micro": 3}) == Price(1, 2, 3)
    assert price_of(None) is None
    for wrong in ({"prompt_micro": 1}, {"prompt": 1}, 5, {"prompt_micro": -1, "cached_micro": 0, "output_micro": 0}):
        with pytest.raises(RequestError, match="price"):
            price_of(wrong)


def test_days_are_of_utc():
    assert day_of(1_698_796_799.999) == "2023-10-31"
    assert day_of(1_698_796_800) == "2023-11-01"
    assert iso(1_698_796_800) == "2023-11-01T00:00:00Z"
    assert iso(None) is None
