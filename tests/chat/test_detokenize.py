"""Text as it grows is never taken back, never half a character, and all of it in the end."""

import random

import pytest

from pyrosome.chat import Detokenizer
from tests.chat.cases import NANO, OFFICIAL, golden, tokenizer

HOMES = pytest.mark.parametrize("home", [OFFICIAL, NANO], ids=["official", "nano"])


def pieces(ids, home, size=1):
    detokenizer = Detokenizer(tokenizer(home))
    out = [detokenizer.feed(ids[n : n + size]) for n in range(0, len(ids), size)]
    return [*out, detokenizer.close()]


@HOMES
@pytest.mark.parametrize("case", golden("tokenizer"), ids=lambda c: c["id"])
def test_pieces_join_to_the_text_and_split_no_character(case, home):
    tokens = tokenizer(home)
    text = case["decoded_keep_special"]
    ids = tokens.encode(text, allow_special=True)
    for size in (1, 2, 7):
        out = pieces(ids, home, size)
        assert "".join(out) == tokens.decode(ids) == text
        assert "\ufffd" not in "".join(out) or "\ufffd" in text


@HOMES
def test_any_ids_at_all_join_to_their_decoding(home):
    tokens, rng = tokenizer(home), random.Random(7)
    for _ in range(3000):
        ids = [rng.randrange(tokens.vocab_size) for _ in range(rng.randrange(10))]
        assert "".join(pieces(ids, home, rng.randrange(1, 4))) == tokens.decode(ids)


def test_a_character_comes_with_its_last_byte():
    ids = tokenizer(NANO).encode("aé思🌤b")
    assert pieces(ids, NANO) == ["a", "", "é", "", "", "思", "", "", "", "🌤", "b", ""]


def test_broken_bytes_become_replacement_characters_once_they_are_surely_broken():
    tokens = tokenizer(NANO)
    first, second, third = tokens.encode("思")
    a, control = tokens.encode("a")[0], tokens.id_of("</think>")
    assert pieces([first, a], NANO) == ["", "\ufffda", ""]
    assert pieces([first, second, control], NANO) == ["", "", "\ufffd</think>", ""]
    assert pieces([third, first, second], NANO) == ["\ufffd", "", "", "\ufffd"]


def test_closing_starts_anew():
    tokens = tokenizer(NANO)
    detokenizer = Detokenizer(tokens)
    first, *rest = tokens.encode("é")
    assert detokenizer.feed([first]) == "" and detokenizer.close() == "\ufffd"
    assert detokenizer.feed([first, *rest]) == "é" and detokenizer.close() == ""
