"""What keys look like."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrosome.server.keys.keys import (
    CHECK_CHARS,
    ID_CHARS,
    INVITE,
    KEY,
    SECRET_CHARS,
    is_same,
    new_secret,
    read_secret,
)


def test_a_key_has_more_than_160_bits_that_nobody_can_guess():
    assert 62**SECRET_CHARS > 2**160
    texts = {new_secret(KEY).text for _ in range(300)}
    assert len(texts) == 300
    assert all(re.fullmatch(r"pyr-[0-9A-Za-z]{46}", t) for t in texts)
    assert len({t[len(KEY) + ID_CHARS :][:SECRET_CHARS] for t in texts}) == 300


def test_a_key_is_read_again_as_what_it_was_made_as():
    made = new_secret(KEY)
    read = read_secret(KEY, made.text)
    assert (read.id, read.digest) == (made.id, made.digest)
    assert made.text.startswith(KEY + made.id)


def test_a_new_secret_under_an_old_id_has_another_digest():
    first = new_secret(KEY)
    second = new_secret(KEY, first.id)
    assert second.id == first.id
    assert not is_same(first.digest, second.digest)


@pytest.mark.parametrize("at", range(len(KEY) + ID_CHARS + SECRET_CHARS + CHECK_CHARS))
def test_a_key_with_one_wrong_character_is_no_key(at):
    text = new_secret(KEY).text
    other = "A" if text[at] != "A" else "B"
    assert read_secret(KEY, text[:at] + other + text[at + 1 :]) is None


def test_an_invite_is_no_key():
    assert read_secret(KEY, new_secret(INVITE).text) is None
    assert read_secret(INVITE, new_secret(INVITE).text)


def test_neither_text_nor_digest_is_shown_where_a_secret_is_printed():
    secret = new_secret(KEY)
    assert secret.text not in repr(secret)
    assert secret.digest not in repr(secret)
    assert secret.id in repr(secret)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reader(text):
    assert read_secret(KEY, text) is None
    assert read_secret(KEY, KEY + text) is None


def test_a_key_with_anything_after_it_is_no_key():
    text = new_secret(KEY).text
    assert read_secret(KEY, text + "\n") is None
    assert read_secret(KEY, text + text) is None
    assert read_secret(KEY, " " + text) is None
