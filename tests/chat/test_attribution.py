"""Tokens and the pieces of text they are part of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrosome.answer import ChatReader
from pyrosome.chat import Chat
from pyrosome.chat.attribution import Attribution
from pyrosome.chat.events import ContentDelta, ReasoningDelta
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.request import TokenEvent

CHAT = Chat(open_checkpoint("builtin:nano").path)
TOKENIZER = CHAT.tokenizer
EOS = TOKENIZER.id_of("<｜end▁of▁sentence｜>")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def tokens(text):
    return TOKENIZER.encode(text, allow_special=True)


def attributed(ids, pieces):
    """Texts of the tokens that each piece gets."""
    attribution = Attribution(TOKENIZER, [TOKENIZER.id_of("</think>")])
    for token in ids:
        attribution.add(token, token)
    return [[TOKENIZER.decode([t]) for t in attribution.take(piece)] for piece in pieces]


def test_a_piece_gets_the_tokens_it_is_made_of():
    ids = tokens("one two three")
    assert attributed(ids, ["one", " two three"]) == [["one"], [TOKENIZER.decode([t]) for t in ids[1:]]]


def test_dropped_newlines_and_marks_are_in_no_piece():
    assert attributed(tokens("a\n\n</think>\n\nb"), ["a", "b"]) == [["a"], ["b"]]
    assert attributed(tokens("a</think>b"), ["ab"]) == [["a", "b"]]


def test_a_token_that_two_pieces_share_is_given_once():
    (token,) = tokens("ing")
    attribution = Attribution(TOKENIZER)
    attribution.add(token, "item")
    assert (attribution.take("i"), attribution.take("ng")) == (["item"], [])


def test_the_tokens_of_one_character_go_together():
    ids = TOKENIZER.encode("😀")
    assert len(ids) > 1
    attribution = Attribution(TOKENIZER)
    for token in ids[:-1]:
        attribution.add(token, token)
    assert attribution.take("�") == ids[:-1], "a character that was never completed"
    attribution = Attribution(TOKENIZER)
    for token in [*tokens("x"), *ids]:
        attribution.add(token, token)
    assert attribution.take("x😀") == [*tokens("x"), *ids]


def test_a_mark_is_in_a_piece_whole_or_not_at_all():
    assert attributed(tokens("</think>>"), [">"]) == [[">"]]
    assert attributed(tokens("a</think>"), ["a</think>"]) == [["a", "</think>"]]


def test_what_no_piece_held_is_left():
    attribution = Attribution(TOKENIZER)
    for token in tokens("ab cd"):
        attribution.add(token, token)
    given = attribution.take("ab")
    assert given + attribution.rest() == tokens("ab cd")
    assert attribution.rest() == []


PARTS = [
    "hello", " world", "\n", "\n\n", "</think>", "😀", "é", "<", "｜DSML｜",
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", "`", "stop", "st", "op",
]  # fmt: skip


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
@given(parts=st.lists(st.sampled_from(PARTS), max_size=12), has_tools=st.booleans(), cut=st.integers(0, 3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_tokens_of_a_channel_spell_its_text(thinking, parts, has_tools, cut):
    body = {"messages": [{"role": "user", "content": "x"}], "thinking": {"type": thinking}, "stop": ["stop"]}
    prompt = CHAT.render(body | ({"tools": TOOLS} if has_tools else {}))
    ids = tokens("".join(parts))
    ids = ids[: len(ids) - cut]
    reader = ChatReader(CHAT, prompt, EOS)
    said = [e for n, t in enumerate(ids) for e in reader.feed(TokenEvent("r", 0, t, {t: float(-n)}))]
    said += reader.end("length")
    logs = [log for _, tokens in said for log in tokens]
    order = [log.logprobs[log.token] for log in logs]
    assert order == sorted(order, reverse=True), "in order, and none twice"
    for kind in (ReasoningDelta, ContentDelta):
        text = "".join(e.text for e, _ in said if isinstance(e, kind))
        spelled = TOKENIZER.decode([log.token for e, tokens in said if isinstance(e, kind) for log in tokens])
        # All the text, and at its tokens' ends perhaps newlines or half a stop string that were dropped.
        assert is_within(text, spelled), (text, spelled)
        assert len(spelled) - len(text) <= sum(c in "\nstop" for c in spelled)


def is_within(text, longer):
    """Whether all of `text` is in `longer`, in its order."""
    rest = iter(longer)
    return all(c in rest for c in text)
