"""Where a text ends: stop strings and end tokens, with a model that says what it is told to, letter by letter."""

from __future__ import annotations

import pytest
import torch

from pyrosome.llm import LLM
from pyrosome.options import SamplingParams


@pytest.fixture(scope="module")
def llm(noise_checkpoint):
    with LLM(noise_checkpoint, numerics="exact", drafter="off") as one:
        yield one


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 16, "seed": 1, "ignore_eos": True, **changes})


@pytest.fixture
def says(llm, monkeypatch):
    """Makes the model emit the tokens given, whatever it would say."""
    network, computed = llm.model.network, []

    def say(*pieces: str | int) -> list[int]:
        ids = [t for p in pieces for t in ([p] if isinstance(p, int) else llm.tokenizer.encode(p))]
        while llm.stats().running:  # one whose text was cut ends before its next step
            pass
        computed.clear()

        def logits(streams):
            computed.append(len(streams))
            rows = torch.full((len(streams), llm.model.config.vocab_size), -1e4)
            rows[:, ids[min(len(computed), len(ids)) - 1]] = 0
            return rows

        monkeypatch.setattr(network, "logits", logits)
        return ids

    return say


def test_every_letter_is_a_token(llm):
    """So the tests below cross tokens wherever a string has more than one letter."""
    assert len(llm.tokenizer.encode("abcdefSTOP .")) == 12


STOPS = [
    # said, stop strings, text, tokens computed
    ("abSTOPcd", ("STOP",), "ab", 6),
    ("abSTOcd", ("STOP",), "abSTOcd", 7),
    ("abSTSTOPc", ("STOP",), "abST", 8),
    ("STOP", ("STOP",), "", 4),
    ("aaab", ("aab",), "a", 4),
    ("abcdef", ("x", "cd", "bcde"), "ab", 4),  # the first to be complete, not the first to begin
    ("abcdef", ("e", "cdef"), "abcd", 5),
    ("abc", ("c",), "ab", 3),
    ("a b. c", (". ",), "a b", 5),
]


@pytest.mark.parametrize(("said", "stop", "text", "num_tokens"), STOPS)
def test_a_stop_string_ends_the_text_before_it(llm, says, said, stop, text, num_tokens):
    ids = says(said)
    wanted = SamplingParams(max_tokens=len(ids), temperature=0, stop=stop)
    (output,) = llm.generate(["x"], wanted)
    assert (output.text, output.token_ids) == (text, ids[:num_tokens])
    assert output.finish_reason == ("stop" if text != said else "length")
    says(said)
    pieces = list(llm.stream("x", wanted))
    assert "".join(p.text for p in pieces) == text and pieces[-1].finish_reason == output.finish_reason


@pytest.mark.parametrize("said", ["abSTOPcd", "abSTOabSTOPc", "SSTSTOPx", "abSTO"])
def test_a_stream_never_shows_what_may_be_the_beginning_of_a_stop_string(llm, says, said):
    ids = says(said)
    shown = ""
    for piece in llm.stream("x", SamplingParams(max_tokens=len(ids), temperature=0, stop=("STOP", "zz"))):
        shown += piece.text
        assert "STOP" not in shown and said.startswith(shown)
    assert shown == said.split("STOP")[0]


def test_what_was_reused_is_told_also_where_a_stop_string_ended_it(llm):
    prompt = llm.encode("a tale of two pages " * 20)
    whole, again = (llm.generate([prompt], params(max_tokens=8, temperature=0))[0] for _ in range(2))
    assert again.cached_tokens == again.reuse.reused_tokens >= 128 > 0 == whole.cached_tokens
    assert again.timeline.ended >= again.timeline.first_token > 0 and again.reuse.prompt_tokens == len(prompt)
    (cut,) = llm.generate([prompt], params(max_tokens=8, temperature=0, stop=(whole.text[1],)))
    assert len(cut.token_ids) < 8 and cut.cached_tokens == again.cached_tokens


def test_a_stop_string_inside_one_token_cuts_that_token_s_text(llm, says):
    pieces = [llm.tokenizer.decode([n]) for n in range(llm.model.config.vocab_size)]
    at, token = next((i, t) for i, t in enumerate(pieces) if len(t) > 3)
    for stop in (
        (token[1:3],),
        (token[2:4], token[1:3]),
        (token[1:3], token[2:4]),
    ):  # of two at once the first to begin
        says("ab", at, "c")
        (output,) = llm.generate(["x"], SamplingParams(max_tokens=9, temperature=0, stop=stop))
        assert (output.text, output.finish_reason) == ("ab" + token[:1], "stop")


def test_only_the_request_that_said_a_stop_string_ends(llm):
    prompts = ["one", "two", "three"]
    free = llm.generate(prompts, params(max_tokens=30))
    stop = free[1].text[4:6]
    outputs = llm.generate(prompts, [params(max_tokens=30), params(max_tokens=30, stop=stop), params(max_tokens=30)])
    assert [outputs[0], outputs[2]] == [free[0], free[2]]
    assert outputs[1].text == free[1].text[: free[1].text.index(stop)] and outputs[1].finish_reason == "stop"
    assert len(outputs[1].token_ids) < 30


def test_an_end_token_is_in_the_ids_and_not_in_the_text(llm, says):
    eos = llm.model.config.eos_token_id
    says("ab", eos, "cd")
    (output,) = llm.generate(["x"], SamplingParams(max_tokens=9, temperature=0))
    assert (output.text, output.token_ids[-1], output.finish_reason) == ("ab", eos, "stop")
    says("ab", eos, "cd")
    (output,) = llm.generate(["x"], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert (output.text, output.finish_reason) == ("ab" + llm.tokenizer.decode([eos]) + "cd", "length")
    c = llm.tokenizer.encode("c")[0]
    says("abcd")
    (output,) = llm.generate(["x"], SamplingParams(max_tokens=9, temperature=0, stop_token_ids=[c]))
    assert (output.text, output.token_ids[-1], output.finish_reason) == ("ab", c, "stop")


def test_a_character_cut_by_the_end_is_a_replacement_character(llm, says):
    ids = llm.tokenizer.encode("é")
    assert len(ids) == 2
    says("a", ids[0], "é")
    (output,) = llm.generate(["x"], SamplingParams(max_tokens=2, temperature=0))
    assert output.text == "a\ufffd"
    says("a", *ids)
    pieces = [p.text for p in llm.stream("x", SamplingParams(max_tokens=3, temperature=0))]
    assert pieces == ["a", "", "é", ""]  # the last tells why it ended
