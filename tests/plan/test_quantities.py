"""Numbers as people write them: what each form is worth, and what is refused with the flag and the forms named."""

from __future__ import annotations

import pytest

from pyrosome.errors import RequestError
from pyrosome.plan.quantities import (
    MAX_BYTES,
    MAX_TOKENS,
    count,
    dollars,
    drive_bytes,
    memory_bytes,
    show_bytes,
    show_dollars,
    show_tokens,
    tokens,
)

NONSENSE = (
    "", " ", "-1", "+1", "nan", "inf", "-inf", "1e3", "0x10", "K", "1KM", "1 2", "1.5.2", "1,00", "٣", "1" * 50,
    None, True, [1], b"1", float("nan"), float("inf"), -3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1M", 1_048_576), ("1m", 1_048_576), ("128K", 131_072), ("128Ki", 131_072), ("200000", 200_000),
        ("200,000", 200_000), ("1_048_576", 1_048_576), ("1.5M", 1_572_864), ("0.5K", 512), (" 8K ", 8192),
        ("8K tokens", 8192), ("1", 1), (4096, 4096), (str(MAX_TOKENS), MAX_TOKENS),
    ],
)  # fmt: skip
def test_tokens_are_counted_in_powers_of_two(text, expected):
    assert tokens(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512G", 512 << 30), ("512GB", 512 << 30), ("512GiB", 512 << 30), ("512 gib", 512 << 30), ("1.5TiB", 3 << 39),
        ("2T", 2 << 40), ("64M", 64 << 20), ("1P", 1 << 50), (7_835_731_200, 7_835_731_200), ("2097152 bytes", 2 << 20),
        ("0.3G", 322_122_547), ("1024P", MAX_BYTES),
    ],
)  # fmt: skip
def test_memory_is_sold_in_powers_of_two(text, expected):
    assert memory_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2T", 2 * 10**12), ("2TB", 2 * 10**12), ("2TiB", 2 << 40), ("512G", 512 * 10**9), ("1.92TB", 1_920_000_000_000)],
)
def test_drives_are_sold_in_powers_of_ten(text, expected):
    assert drive_bytes(text) == expected


@pytest.mark.parametrize("text", ["9.42", "$9.42", "$9.42/h", "9.42 USD", "9.42 per hour", "$ 9.42 an hour", 9.42])
def test_a_price_is_in_dollars_an_hour(text):
    assert dollars(text) == 9.42


@pytest.mark.parametrize("price", [28.36 / 3, 1e-05, "9.4533333333333333"])
def test_a_price_that_was_computed_is_read_with_all_its_digits(price):
    assert dollars(price) == float(price)


def test_a_count_begins_where_it_is_told_to():
    assert count("7", "--sessions") == 7
    assert count("0", "--parked", least=0) == 0
    with pytest.raises(RequestError, match=r"--sessions is '0'; it is from 1 to"):
        count("0", "--sessions")


@pytest.mark.parametrize("read", [tokens, memory_bytes, drive_bytes, dollars, lambda v, f: count(v, f)])
@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_nonsense_is_refused_with_the_flag_and_the_form(read, value):
    with pytest.raises(RequestError, match=r"^--this is .+; .*(written|expected)"):
        read(value, "--this")


@pytest.mark.parametrize(
    ("read", "value", "said"),
    [
        (tokens, "0", "from 1 to 2,147,483,647 tokens"),
        (tokens, "4096M", "from 1 to 2,147,483,647 tokens"),
        (tokens, "0.1K", "102.4 tokens and not whole"),
        (tokens, "128G", "written 200000, 128K"),
        (memory_bytes, "512", "512 bytes: a unit is missing"),
        (memory_bytes, "0", "from 1,048,576 to"),
        (memory_bytes, "99999P", "from 1,048,576 to"),
        (memory_bytes, "1M tokens", "written 512G"),
        (drive_bytes, "2", "2 bytes: a unit is missing"),
        (dollars, "0", "above 0"),
        (dollars, "99999999", "up to 1,000,000"),
        (dollars, "9.42/month", "written 9.42 or"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(read, value, said):
    with pytest.raises(RequestError) as caught:
        read(value, "--this")
    assert said in str(caught.value)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(RequestError) as caught:
        tokens("x" * 10_000)
    assert len(str(caught.value)) < 250


def test_what_is_shown_reads_back_as_the_same_number():
    for n in (1, 999, 1024, 131_072, 200_000, 1_048_576, 3 << 20, 1_572_864):
        assert tokens(show_tokens(n)) == n
    assert [show_tokens(n) for n in (1_048_576, 131_072, 200_000)] == ["1M", "128K", "200,000"]


def test_bytes_are_shown_in_the_largest_unit_and_exactly_beside():
    assert show_bytes(4_052_700_160) == "3.77 GiB"
    assert show_bytes(4_052_700_160, exact=True) == "3.77 GiB (4,052,700,160 bytes)"
    assert show_bytes(-3 << 40) == "-3.00 TiB"
    assert [show_bytes(n, exact=True) for n in (0, 1023)] == ["0 B", "1,023 B"]
    assert show_bytes(1 << 20) == "1.00 MiB"


def test_dollars_are_shown_in_cents_or_in_the_digits_that_count():
    assert [show_dollars(d) for d in (9.42, 1234.5, 0.1, 0.0042, 0.000012, 0)] == [
        "$9.42",
        "$1,234.50",
        "$0.10",
        "$0.0042",
        "$0.000012",
        "$0.00",
    ]
