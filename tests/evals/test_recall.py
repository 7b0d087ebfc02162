"""Recall: what is asked, how long and how far, what counts as right, and figures by class."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.evals.recall import RecallTask, Run, case_of, compared, draw, measure, over_none, shifts, summary
from pyrosome.evals.subject import Subject
from pyrosome.evals.watch import Watch
from pyrosome.tasks.heldout import KEPT
from tests.evals.subjects import Oracle, checkpoint

KINDS = pytest.mark.parametrize("kind", ["ledger", "records"])
QUESTION = re.compile(r"\? (\w+)(?:<｜Assistant｜></think>)?$")


def fact(prompt: str) -> str:
    """What the document says of the name that is asked."""
    (value,) = re.findall(rf"\b{QUESTION.search(prompt)[1]} (\d\d) ;", prompt)
    return value


def knows(prompt: str) -> str:
    return fact(prompt) if "</think>" in prompt else f" {fact(prompt)} ; and"


def wrong_where(rule):
    """A rule that is wrong where `rule` says so of (prompt tokens, distance of the fact)."""
    oracle = Oracle(str)

    def say(prompt):
        tokens = len(oracle.tokenizer.encode(prompt, allow_special=True))
        after = prompt.split(f"{QUESTION.search(prompt)[1]} {fact(prompt)} ;")[1]
        distance = len(oracle.tokenizer.encode(" ;" + after, allow_special=True))
        return "no" if rule(tokens, distance) else knows(prompt)

    return say


def asked(oracle, **changes):
    task = RecallTask(**{"contexts": (256,), "n": 128, **changes})
    return measure(oracle, task, draw(oracle, task))


@KINDS
def test_every_document_is_asked_one_held_out_fact_once(kind):
    oracle = Oracle(knows)
    (run,) = asked(oracle, kind=kind, facts=5)
    assert len(run.outcomes) == len(oracle.asked) == len({p for p, _ in oracle.asked}) == 128
    assert all(o.right for o in run.outcomes)
    for prompt, request in oracle.asked:
        assert prompt.count("?") == 1 and len(re.findall(r"\w+ \d\d ;", prompt)) == 5
        assert fact(prompt) in KEPT[QUESTION.search(prompt)[1]]
        assert prompt.startswith("<｜begin▁of▁sentence｜>") and prompt.count("<｜User｜>") == (kind == "ledger")
        assert request.salt == request.id  # no two documents share what was computed


@KINDS
@pytest.mark.parametrize("context", [256, 1000])
def test_prompts_are_as_long_as_said_in_all_lengths(kind, context):
    (run,) = asked(Oracle(knows), kind=kind, contexts=(context,), n=256)
    tokens = [o.tokens for o in run.outcomes]
    assert context - 68 < min(tokens) < context - 60 and context + 60 < max(tokens) < context + 68
    assert abs(sum(tokens) / 256 - context) < 3
    assert set(Counter(t % 4 for t in tokens)) == {0, 1, 2, 3} and len({t % 128 for t in tokens}) > 100
    found = summary(run, 24)
    assert all(40 < s["n"] < 90 for s in found["by_mod4"].values())
    assert all(20 < s["n"] < 45 for s in found["by_mod128"].values())


def test_a_tokenizer_of_other_words_gets_prompts_of_the_same_length(monkeypatch):
    oracle = Oracle(str)
    plain = oracle.tokenizer._plain_ids
    monkeypatch.setattr(oracle.tokenizer, "_plain_ids", lambda text: [n for letter in text for n in plain(letter)])
    task = RecallTask((512,), 8, 128)
    tokens = [case_of(oracle, s).tokens for s in draw(oracle, task)[512]]
    assert 425 < min(tokens) < 470 and 550 < max(tokens) < 600


@pytest.mark.parametrize(
    ("n", "least", "most"), [(1, -64, -64), (2, -64, 0), (4, -64, 32), (128, -64, 63), (300, -64, 63)]
)
def test_few_prompts_are_spread_and_many_have_all_lengths(n, least, most):
    found = shifts(n)
    assert len(found) == n and (min(found), max(found)) == (least, most)
    counts = Counter(found).values()
    assert max(counts) - min(counts) <= 1


@KINDS
def test_distances_are_tokens_from_the_fact_to_the_end(kind):
    oracle = Oracle(knows)
    task = RecallTask((256,), 8, 32, kind)
    for sample in draw(oracle, task)[256]:
        case = case_of(oracle, sample)
        ids = case.prompt.ids if kind == "ledger" else case.prompt
        assert len(ids) == case.tokens
        text = oracle.tokenizer.decode(ids)
        assert oracle.tokenizer.decode([ids[-1 - case.distance]]).strip() == fact(text)
        assert oracle.tokenizer.decode([ids[-2 - case.distance]]).strip() == sample.about["name"]


def test_the_same_seed_asks_the_same_and_another_another():
    oracle = Oracle(knows)
    first, again, other, more = (
        draw(oracle, RecallTask((256,), 8, n, seed=seed))[256] for n, seed in ((8, 0), (8, 0), (8, 1), (8, 0))
    )
    assert first == again == more and not any(a == b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("said", "right"), [("37", False), ("{}", True), (" {}\n", True), ("{} ;", False), ("", False)]
)
def test_a_ledger_wants_the_value_and_nothing_else(said, right):
    (run,) = asked(Oracle(lambda p: said.format(fact(p))), n=4)
    assert {o.right for o in run.outcomes if o} == {right}


@pytest.mark.parametrize(
    ("said", "right"), [(" {} ;", True), (" {}", True), (" {}7", False), ("{}", True), (" ; {}", False)]
)
def test_records_want_the_next_word(said, right):
    (run,) = asked(Oracle(lambda p: said.format(fact(p))), n=4, kind="records")
    assert {o.right for o in run.outcomes} == {right}


@KINDS
def test_a_fault_at_one_length_shows_in_its_class_alone(kind):
    found = summary(asked(Oracle(wrong_where(lambda t, _: t % 4 == 2)), n=256, kind=kind)[0], 24)
    assert [s["share"] for s in found["by_mod4"].values()] == [1, 1, 0, 1]
    found = summary(asked(Oracle(wrong_where(lambda t, _: t % 128 < 16)), n=256, kind=kind)[0], 24)
    assert [s["share"] for s in found["by_mod128"].values()] == [0] + [1] * 7
    assert list(found["by_mod128"])[:2] == ["0-15", "16-31"]


@KINDS
def test_a_model_that_sees_its_window_alone_shows_as_such(kind):
    found = summary(asked(Oracle(wrong_where(lambda _, d: d >= 24)), n=256, kind=kind)[0], 24)
    assert found["in_window"]["share"] == 1 and found["in_window"]["n"] > 0
    assert found["beyond_window"]["share"] == 0
    assert found["in_window"]["n"] + found["beyond_window"]["n"] == found["right"]["n"] == 256
    near, *far = found["by_distance"]
    assert near["share"] > 0 and not any(q["share"] for q in far)
    assert [q["n"] for q in found["by_distance"]] == [64] * 4
    assert all(a["to"] <= b["from"] for a, b in zip([near, *far], far, strict=False))


def test_each_ablation_is_asked_the_same_and_compared():
    oracle = Oracle(knows)
    task = RecallTask((256, 384), 8, 16, ablations=("none", "window"))
    runs = measure(oracle, task, draw(oracle, task))
    assert [(r.context, r.ablation) for r in runs] == [(c, a) for c in (256, 384) for a in ("none", "window")]
    assert [a for _, a in oracle.jobs] == ["none", "window"] * 2
    prompts = [p for p, _ in oracle.asked]
    assert prompts[:16] == prompts[16:32] != prompts[32:48] == prompts[48:]
    for (context, _), run in zip(oracle.jobs, runs, strict=True):
        assert context >= max(o.tokens for o in run.outcomes) + 16


def test_differences_are_of_the_same_questions():
    task = RecallTask((256,), 8, 40, ablations=("none", "half"))
    samples = draw(Oracle(knows), task)
    good = measure(Oracle(knows), task, samples)
    bad = measure(Oracle(wrong_where(lambda t, _: t % 4 == 0)), task, samples)
    (none, half) = compared(good, bad)
    assert (none["context"], none["ablation"], half["ablation"]) == (256, "none", "half")
    assert none["n"] == 40 and none["difference"] == sum(not o.right for o in bad[0].outcomes) / 40 > 0
    assert over_none([good[0], bad[1]])[0]["difference"] == -none["difference"]
    assert over_none([bad[1]]) == []
    partial = [Run(256, "none", bad[0].outcomes[:7], 1.0)]
    assert [d["n"] for d in compared(good, partial)] == [7]


class After(Watch):
    """Stops after so many answers."""

    def __init__(self, most, raises=False):
        super().__init__()
        self.left, self.begun, self.raises = most, [], raises

    def begin(self, what, total):
        self.begun.append((what, total))

    def advance(self):
        self.left -= 1
        if not self.left and self.raises:
            raise KeyboardInterrupt
        self.stopped = not self.left


@pytest.mark.parametrize("raises", [False, True])
def test_what_is_stopped_has_what_was_asked_until_then(raises):
    task = RecallTask((256, 384), 8, 10, ablations=("none", "half"))
    oracle, watch = Oracle(knows), After(13, raises)
    runs = measure(oracle, task, draw(oracle, task), watch)
    assert [len(r.outcomes) for r in runs] == [10, 3] and watch.stopped
    assert watch.begun == [("256 tokens", 10), ("256 tokens, half", 10)]
    assert summary(runs[1], 24)["right"]["n"] == 3
    assert measure(oracle, task, draw(oracle, task), watch) == []


def test_no_outcome_at_all_has_a_summary():
    found = summary(Run(256, "none", [], 0.0), 24)
    assert found["right"]["n"] == 0 and found["by_distance"] == [] and found["tokens"] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kind": "copy"}, "'copy' was asked for; there are ledger, records"),
        ({"n": 0}, "at least one question"),
        ({"contexts": ()}, "one context"),
        ({"contexts": (64,)}, "context of 64 tokens was asked for; prompts vary by 64"),
        ({"ablations": ("none", "all")}, "ablation 'all' was asked for; there are none, dense"),
    ],
    ids=str,
)
def test_tasks_that_cannot_be(changes, part):
    with pytest.raises(RequestError, match=part):
        RecallTask(**changes)


def test_contexts_that_do_not_fit():
    oracle = Oracle(knows)
    with pytest.raises(ContextTooLong, match=r"4176 tokens.*holds 4096; prompts vary by 64 tokens.*4096: ask for less"):
        draw(oracle, RecallTask((256, 4096)))
    with pytest.raises(RequestError, match=r"40 facts were asked for in 160 tokens.*need a context of 19\d or more"):
        draw(oracle, RecallTask((160,), 40))
    with pytest.raises(RequestError, match="facts = 500"):
        draw(oracle, RecallTask((2048,), 500))


def test_a_real_network_is_asked():
    with Subject(checkpoint(), numerics="exact") as subject:
        task = RecallTask((128,), 4, 6, ablations=("none", "random"))
        first, random = (summary(r, 24) for r in measure(subject, task, draw(subject, task)))
    assert first["right"]["n"] == random["right"]["n"] == 6 and first["right"]["hits"] <= 1
    assert first["drafts"]["n"] > 20 and first["seconds"] > 0


@pytest.mark.parametrize(("kind", "tokens"), [("ledger", 16), ("records", 2)])
def test_an_answer_is_no_longer_than_it_need_be(kind, tokens):
    oracle = Oracle(knows)
    asked(oracle, kind=kind, n=2)
    assert {r.params.max_tokens for _, r in oracle.asked} == {tokens}
