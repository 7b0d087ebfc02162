"""Recall by length: what is asked, what stands out, and a fault that only some lengths have."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch

from pyrosome.model.deepseek_v4 import Indexer
from pyrosome.model.step import Step
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.shapes import tiny
from pyrosome.verify import haystack, needle, subject
from pyrosome.verify.chance import DRAWS, chance_of
from pyrosome.verify.finding import Wanted
from pyrosome.verify.needle import Answered, judged
from tests.evals.subjects import Oracle, checkpoint
from tests.evals.test_recall import knows

NANO = Wanted("builtin:nano", quick=True)


@pytest.fixture(autouse=True)
def _nothing_is_held():
    yield
    subject.release()


def answers(n=128, context=256, right=lambda a: True):
    rng = random.Random(0)
    lengths = rng.sample(range(context - 64, context + 64), n)
    drawn = [Answered(tokens, rng.randrange(150), True) for tokens in lengths]
    return [dataclasses.replace(a, right=right(a)) for a in drawn]


def by_what(answered, floor=0.9):
    return {f.what.removeprefix("recall at 256 tokens").strip(", "): f for f in judged(answered, 256, floor)}


def test_the_built_in_model_finds_facts_at_every_length():
    found = list(needle.check(NANO))
    assert [f.ok for f in found] == [True] * (1 + len(needle.SORTED)), [f.detail for f in found]
    assert found[0].figures["recall"]["n"] == 128 and "at least 0.9 is asked" in found[0].detail
    classes = {f.what: f.figures["classes"] for f in found[1:]}
    assert [len(c) for c in classes.values()] == [4, 8, 2, 4]
    assert all(c["n"] > 20 for c in classes["recall at 256 tokens, by length mod 4"].values())
    assert list(classes["recall at 256 tokens, by length mod 128"])[:2] == [
        "length mod 128 is 0 to 15",
        "length mod 128 is 16 to 31",
    ]


def test_an_indexer_that_sees_nothing_at_one_residue_is_found(monkeypatch):
    forward = Indexer.forward

    def blind(self, *given):
        choice, step = forward(self, *given), next(x for x in given if isinstance(x, Step))
        lost_T1 = (step.position_T % 4 == 2)[:, None]
        return choice._replace(rows=torch.where(lost_T1, -1, choice.rows))

    monkeypatch.setattr(Indexer, "forward", blind)
    found = by_what(needle.of_ledgers(subject.subject(NANO), 256, 64, 0))
    assert found["by length mod 4"].ok is False and found[""].ok is False
    assert "worst where length mod 4 is 3" in found["by length mod 4"].detail


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (lambda a: a.tokens % 4 == 2, "by length mod 4"),
        (lambda a: 48 <= a.tokens % 128 < 64, "by length mod 128"),
        (lambda a: a.tokens % 128 in (126, 127, 0, 1, 2), "beside a block's border"),
        (lambda a: (a.tokens - a.distance) % 4 == 1, "by the fact's place mod 4"),
    ],
)
def test_each_way_of_sorting_sees_its_own_fault(wrong, seen):
    found = by_what(answers(right=lambda a: not wrong(a)))
    assert found[seen].ok is False and found[seen].figures["chance"] < needle.LEVEL
    assert "are called different" in found[seen].detail


def test_misses_spread_by_chance_are_called_no_fault():
    for seed in range(8):
        rng = random.Random(seed)
        assert all(f.ok for f in by_what(answers(right=lambda a, rng=rng: rng.random() < 0.95)).values())


def test_recall_below_its_floor_fails_and_far_below_nothing_else_is_told():
    found = by_what(answers(right=lambda a: a.distance % 10 < 8))
    assert found[""].ok is False and "at least 0.9" in found[""].detail
    found = by_what(answers(right=lambda a: a.distance < 10))
    assert found[""].ok is False and found["by length mod 4"].ok is None
    assert "too low" in found["by length mod 4"].detail
    unknown = by_what(answers(right=lambda a: False), floor=None)
    assert unknown[""].ok is None and by_what(answers(), floor=None)[""].ok is True


def test_chance_is_fishers():
    assert chance_of([5, 5], [5, 5]) == chance_of([0, 0], [5, 5]) == chance_of([3], [5]) == 1
    # Two by two: of 8 hits and 8 misses, 7 and 1 against 1 and 7.  Fisher's exact test says 130 / 12,870.
    assert abs(chance_of([7, 1], [8, 8]) - 130 / 12870) < 0.002
    assert chance_of([32, 32, 0, 32], [32] * 4) == 1 / (DRAWS + 1)
    assert chance_of([7, 1, 0], [8, 8, 0]) == chance_of([7, 1], [8, 8])


def test_a_needle_is_at_its_depth_and_the_question_at_the_end():
    rng = random.Random(3)
    for depth in (0.0, 0.5, 0.99):
        one = haystack.needle(rng, 200, depth)
        name = re.search(r"code of the (\w+)\?", one.text)[1]
        fact = f"The access code of the {name} is {one.value}."
        assert one.text[: one.end].endswith(fact) and one.text.count(one.value) == 1
        assert one.text.count("The access code") == haystack.FACTS
        assert abs(one.text.index(fact) / len(one.text) - depth) < 0.15
        assert len(one.text.split()) == 200 + 8 * haystack.FACTS + 13


@pytest.mark.parametrize(
    ("said", "right"),
    [("{}", True), ("It is {}.", True), ("{} or 7", False), ("no", False), ("1{}", False), ("", False)],
)
def test_the_answer_is_the_one_number(said, right):
    one = haystack.Needle("", 0, "12345")
    assert one.is_right(said.format("12345")) is right


def code(prompt):
    name = re.search(r"code of the (\w+)\?", prompt)[1]
    return re.search(rf"code of the {name} is (\d+)\.", prompt)[1]


def test_sentences_are_asked_at_all_lengths_and_depths():
    oracle = Oracle(code)
    found = needle.of_sentences(oracle, 512, 32, seed=0)
    assert all(a.right for a in found) and len({p for p, _ in oracle.asked}) == 32
    assert {a.tokens % 4 for a in found} == {0, 1, 2, 3}
    assert 440 < min(a.tokens for a in found) < 456 and 568 < max(a.tokens for a in found) < 584
    assert min(a.distance for a in found) < 80 and max(a.distance for a in found) > 380
    wrong = Oracle(lambda p: "7" if len(oracle.tokenizer.encode(p, allow_special=True)) % 4 == 1 else code(p))
    assert [a.right for a in needle.of_sentences(wrong, 512, 32, seed=0)] == [a.tokens % 4 != 1 for a in found]


@pytest.mark.parametrize(("ask", "rule"), [(needle.of_ledgers, knows), (needle.of_sentences, code)])
def test_how_many_are_answered_is_told_and_whoever_stops_is_heard(ask, rule):
    told = []
    watch = needle._Telling(Wanted("", progress=lambda *so_far: told.append(so_far)))
    ask(Oracle(rule), 512, 3, 0, watch)
    assert told == [(n, 3, "needle: questions answered") for n in (1, 2, 3)]

    def leave(*_):
        watch.stopped = True

    watch = needle._Telling(Wanted("", progress=leave))
    with pytest.raises(KeyboardInterrupt):
        ask(Oracle(rule), 512, 3, 0, watch)


def test_ledgers_are_judged_as_evaluations_judge_them():
    assert all(a.right for a in needle.of_ledgers(Oracle(knows), 256, 16, seed=0))
    assert not any(a.right for a in needle.of_ledgers(Oracle(lambda p: "no"), 256, 16, seed=0))


def test_a_model_that_answers_nothing_is_not_judged(monkeypatch):
    monkeypatch.setattr(needle, "_PLAIN", {True: ((256, 8),)})
    found = list(needle.check(Wanted(str(checkpoint()), quick=True)))
    assert found[0].ok is None and "nothing is known" in found[0].detail
    assert all(f.ok is None for f in found[1:])
    monkeypatch.setattr(subject, "OFFICIAL_VOCABULARY", 1280)
    first = next(needle.check(Wanted(str(checkpoint()), quick=True)))
    assert first.ok is False and f"at least {needle.FLOOR_OFFICIAL} is asked" in first.detail


def test_what_cannot_be_asked_is_left_out_with_a_reason(tmp_path):
    path = random_checkpoint(tmp_path / "tiny", tiny((0, 4, 128), max_position_embeddings=300), 0, "bf16")
    (only,) = needle.check(Wanted(str(path), quick=True))
    assert only.ok is None and "no tokenizer" in only.detail
    (only,) = needle.check(Wanted(str(path), quick=True, tokenizer=subject.subject(NANO).model.path))
    assert only.ok is None and "300 positions" in only.detail
