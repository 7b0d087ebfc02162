"""The ledger as CSV."""

import csv
import io

import pytest

from pyrosome.errors import RequestError
from pyrosome.server.keys import usage
from pyrosome.server.keys.ledger import add
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.usage import CSV_COLUMNS, Slice, csv_text, sums
from pyrosome.server.keys.views import days_in
from tests.server.keys.lines import STARTED, line


def rows_of(store, part=Slice()):  # noqa: B008
    return list(csv.DictReader(io.StringIO("".join(csv_text(store, part)), newline="")))


def test_every_line_is_there_once_oldest_first_over_many_pages(store, monkeypatch):
    monkeypatch.setattr(usage, "LINES_A_PAGE", 7)
    for count in (0, 6, 7, 8, 40):
        with_same_time = [line(f"{count}-{i:02}", started=STARTED + count * 1000 + i // 3) for i in range(count)]
        store.write(lambda c, lines=with_same_time: add(c, lines) if lines else None)
    found = [r["request"] for r in rows_of(store)]
    assert found == [f"{count}-{i:02}" for count in (6, 7, 8, 40) for i in range(count)]


def test_a_line_of_csv_has_whole_units_and_times_in_words(store):
    store.write(lambda c: add(c, [line("r1", price=Price(280_000, 28_000, 420_000), cost=123, first_ms=None)]))
    (row,) = rows_of(store)
    assert list(row) == list(CSV_COLUMNS)
    assert row["started"] == "2023-11-14T22:13:20Z"
    assert (row["price_prompt"], row["price_cached"], row["price_output"], row["cost"]) == (
        "0.28",
        "0.028",
        "0.42",
        "0.000123",
    )
    assert (row["first_token_ms"], row["total_ms"], row["prompt_tokens"]) == ("", "12.500", "100")


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@x", "＝1"])
def test_text_that_a_spreadsheet_would_carry_out_is_marked_as_text(store, start):
    store.write(lambda c: add(c, [line("r1", model=start + ',"x\n')]))
    (row,) = rows_of(store)
    assert row["model"] == "'" + start + ',"x\N{REPLACEMENT CHARACTER}'


def test_a_part_is_of_one_account_some_keys_and_some_days(store):
    lines = [line("a"), line("b", key="k2"), line("c", account="acct-b"), line("d", started=STARTED + 86400)]
    store.write(lambda c: add(c, lines))
    part = Slice("acct-a", frozenset(["k1"]), "2023-11-14", "2023-11-14")
    assert [r["request"] for r in rows_of(store, part)] == ["a"]
    assert [r["request"] for r in rows_of(store, Slice("acct-a"))] == ["a", "b", "d"]
    assert rows_of(store, Slice("' OR 1=1 --")) == []


def test_without_days_it_is_this_month(store):
    assert days_in({}, STARTED) == ("2023-11-01", "2023-11-14")
    assert days_in({"from": "2023-01-02"}, STARTED) == ("2023-01-02", "2023-11-14")
    for wrong in ("yesterday", "2023-13-01", "'; DROP TABLE"):
        with pytest.raises(RequestError, match="to is"):
            days_in({"to": wrong}, STARTED)


def test_sums_by_anything_else_are_refused(store):
    with pytest.raises(RequestError, match="cannot be summed by 'request'"):
        store.read(lambda c: sums(c, Slice(), ["request"]))
