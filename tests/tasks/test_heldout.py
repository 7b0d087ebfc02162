"""Training shows nothing that evaluation asks; evaluation asks nothing else."""

import itertools
import random
import re

import pytest

from pyrosome import tasks
from pyrosome.tasks.heldout import KEPT, TRAINED, is_held_out, sum_is_held_out
from pyrosome.tasks.words import NAMES, VALUES

FACT = re.compile(r"([a-z]+) (\d\d) ;")
DOCUMENTS = ("records", "ledger", "ordinal", "several")


def samples(kind, heldout, num=1000, **knobs):
    rng = random.Random(11)
    return [tasks.make(kind, rng, 128, heldout, **knobs) for _ in range(num)]


def text_of(sample):
    return sample.text or sample.messages[0]["content"]


def test_the_hash_is_the_same_on_every_machine():
    assert [is_held_out(n, v) for n, v in (("rake", "27"), ("elm", "64"), ("rake", "26"), ("elm", "76"))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_an_eighth_of_each_kind_of_content_is_kept_back():
    for name in NAMES:
        assert sorted((*KEPT[name], *TRAINED[name])) == list(VALUES)
        assert 4 <= len(KEPT[name]) <= 20
    pairs = list(itertools.product(range(100), repeat=2))
    for op in "+-":
        share = sum(sum_is_held_out(a, op, b) for a, b in pairs) / len(pairs)
        assert 0.1 < share < 0.15
    assert all(sum_is_held_out(a, "+", b) == sum_is_held_out(b, "+", a) for a, b in pairs)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_training_documents_hold_no_fact_that_is_kept_back(kind):
    facts = {f for s in samples(kind, False) for f in FACT.findall(text_of(s))}
    assert len(facts) > 2000
    assert not [f for f in facts if is_held_out(*f)]


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_evaluation_asks_only_what_was_kept_back_among_facts_of_any_kind(kind):
    knobs = {"asks": 2} if kind in ("records", "ledger") else {}
    others = set()
    for sample in samples(kind, True, 300, **knobs):
        about = sample.about
        if kind in ("records", "ledger"):
            facts = dict(FACT.findall(text_of(sample)))
            asked = [(n, facts[n]) for n in about["names"]]
        else:
            asked = [(about["name"], v) for v in about["expected"].split()]
        assert asked and all(is_held_out(*f) for f in asked)
        others |= set(FACT.findall(text_of(sample))) - set(asked)
    assert {is_held_out(*f) for f in others} == {True, False}


@pytest.mark.parametrize("kind", ["sums", "tool", "dialogue", "copy", "quote"])
@pytest.mark.parametrize("heldout", [False, True])
def test_what_is_asked_outside_documents_is_kept_back_likewise(kind, heldout):
    for sample in samples(kind, heldout):
        question, expected = sample.messages[0]["content"], sample.about["expected"]
        if kind == "copy" or kind == "quote":
            kept = is_held_out(*expected.split())
        elif kind == "dialogue":
            kept = is_held_out(question) if any(c.isdigit() for c in question) or question[:3] == "say" else heldout
        elif question.startswith("look up "):
            kept = is_held_out(sample.about["name"], expected)
        elif question[0].isdigit():
            a, op, b = question.split()
            kept = sum_is_held_out(int(a), op, int(b))
        else:
            kept = False  # a greeting: in training only
        assert kept == heldout, question


def test_every_turn_of_several_sums_is_of_the_same_part():
    for heldout in (False, True):
        for sample in samples("sums", heldout, 200, asks=4):
            for message in sample.messages[::2]:
                a, op, b = message["content"].split()
                assert sum_is_held_out(int(a), op, int(b)) == heldout
