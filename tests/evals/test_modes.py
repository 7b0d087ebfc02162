"""Sums in each mode: the same questions, judged by the answer alone, thoughts counted."""

from __future__ import annotations

import random
import re

import pytest

from pyrosome.errors import RequestError
from pyrosome.evals.modes import modes, questions
from pyrosome.evals.subject import Subject
from pyrosome.tasks.heldout import sum_is_held_out
from tests.evals.subjects import Oracle, checkpoint
from tests.evals.test_recall import After

SUM = re.compile(r"<｜User｜>(\d+) ([+-]) (\d+)<｜Assistant｜>(<think>|</think>)$")


def result(prompt: str) -> int:
    a, op, b, _ = SUM.search(prompt).groups()
    return int(a) + int(b) if op == "+" else int(a) - int(b)


def thinks(prompt: str) -> str:
    """Right after thinking, and seldom without."""
    if prompt.endswith("<think>"):
        return f"falcon otter {result(prompt)}</think>{result(prompt)}"
    return str(result(prompt) + (random.Random(prompt).random() < 0.8))


def test_questions_are_held_out_and_asked_once():
    found = [s.about["question"] for s in questions(300, 0)]
    assert len(set(found)) == 300
    assert all(sum_is_held_out(int(a), op, int(b)) for a, op, b in (q.split() for q in found))
    assert found == [s.about["question"] for s in questions(300, 0)]
    assert found != [s.about["question"] for s in questions(300, 1)]


def test_thinking_that_helps_shows_with_its_margin_and_its_cost():
    oracle = Oracle(thinks)
    found = modes(oracle, 60, 0, ("off", "high"))
    off, high = found["results"]
    assert (off["thinking"], high["thinking"]) == ("off", "high")
    assert high["right"]["share"] == 1 and off["right"]["share"] < 0.5 and off["right"]["n"] == 60
    assert high["thought_tokens"] == {"mean": 3, "median": 3, "most": 3} and off["thought_tokens"]["mean"] == 0
    assert high["cut"]["hits"] == off["cut"]["hits"] == 0
    assert high["drafts"]["share"] == 0.75
    (margin,) = found["margins"]
    assert (margin["thinking"], margin["over"], margin["apart"], margin["n"]) == ("high", "off", True, 60)
    assert margin["difference"] == pytest.approx(1 - off["right"]["share"]) and margin["low"] > 0.3
    prompts = [SUM.search(p).groups() for p, _ in oracle.asked]
    assert [p[:3] for p in prompts[:60]] == [p[:3] for p in prompts[60:]]  # pairs are of the same question
    assert {p[3] for p in prompts[:60]} == {"</think>"} and {p[3] for p in prompts[60:]} == {"<think>"}


def test_every_mode_is_compared_with_those_that_think_less():
    oracle = Oracle(thinks)
    found = modes(oracle, 4, 0, ("max", "off", "high"))
    assert [r["thinking"] for r in found["results"]] == ["max", "off", "high"]
    assert [(m["thinking"], m["over"]) for m in found["margins"]] == [("high", "off"), ("max", "off"), ("max", "high")]
    assert not found["margins"][2]["apart"] and found["margins"][2]["difference"] == 0
    assert sum(len(p) > 400 for p, _ in oracle.asked) == 4  # the instruction of the highest effort


def test_an_answer_that_is_cut_is_wrong_and_counted():
    def rambles(prompt):
        return "falcon " * 50 + f"</think>{result(prompt)}"

    oracle = Oracle(rambles)
    (found,) = modes(oracle, 5, 0, ("high",), max_tokens=20)["results"]
    assert found["cut"]["share"] == 1 and found["right"]["hits"] == 0 and found["thought_tokens"]["most"] == 20
    assert all(r.params.max_tokens == 20 for _, r in oracle.asked)


def test_thoughts_are_no_answer():
    (found,) = modes(Oracle(lambda p: f"{result(p)}</think>no"), 3, 0, ("high",))["results"]
    assert found["right"]["hits"] == 0


def test_what_is_stopped_compares_what_there_is():
    found = modes(Oracle(thinks), 10, 0, ("off", "high", "max"), watch=After(13))
    assert [r["right"]["n"] for r in found["results"]] == [10, 3]
    assert [(m["over"], m["n"]) for m in found["margins"]] == [("off", 3)]
    assert modes(Oracle(thinks), 10, 0, watch=After(10))["margins"] == []


def test_refusals():
    with pytest.raises(RequestError, match=r"mode 'low' was asked for; there are off, high, max"):
        modes(Oracle(thinks), 3, 0, ("off", "low"))
    with pytest.raises(RequestError, match=r"100000 sums were asked for and there are 1\d\d\d held out"):
        questions(100_000, 0)


def test_a_real_network_is_asked():
    with Subject(checkpoint(), numerics="exact") as subject:
        found = modes(subject, 4, 0, ("off", "high"), max_tokens=12)
    assert [r["right"]["n"] for r in found["results"]] == [4, 4] and found["results"][0]["drafts"]["n"] > 0
