"""Text predicted: what is asked, what it costs, and counting beside it."""

from __future__ import annotations

import math
import random

import pytest
import torch

from pyrosome.errors import RequestError
from pyrosome.evals.subject import Subject
from pyrosome.evals.text import Passage, cost_of, passages, text
from pyrosome.tasks.text import Corpus, Text
from tests.evals.subjects import checkpoint
from tests.evals.test_recall import After


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Sixty documents of short sentences, a few of them held out."""
    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["falcon", "otter", "ran", "to", "the", "river", "and", "the", "old", "mill", "by", "night", "again"]
    for number in range(60):
        lines = [" ".join(rng.choices(words, k=9)) + f" {number}" for _ in range(30)]
        (root / f"{number}.txt").write_text("\n".join(lines) + "\n")
    files = tuple(sorted(root.iterdir()))
    return Text([Corpus("made up", "none", root, files, sum(f.stat().st_size for f in files))])


@pytest.fixture(scope="module")
def subject():
    with Subject(checkpoint(), numerics="exact") as one:
        yield one


def test_passages_are_all_there_is_once_and_begin_with_a_line():
    documents = ["aa\nbb\ncc\n", "d" * 25, "\n\n\n", "e"]
    cut = passages(documents, 7)
    assert [p.text for p in cut] == ["aa\nbb\n", "cc\n", *["d" * 7] * 3, "d" * 4, "e"]
    assert [p.document for p in cut] == [0, 0, 1, 1, 1, 1, 3]
    assert passages([], 7) == []


def test_the_cost_is_that_of_each_token_given_those_before_it():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    expected = -float(torch.log_softmax(logits[0], 0)[2] + torch.log_softmax(logits[1], 0)[0])
    seen = []

    def network(ids):
        seen.append(ids)
        return logits[: len(ids)]

    assert cost_of(network, [1, 2, 0]) == pytest.approx(expected)
    assert seen == [[1, 2]]


def test_a_random_network_is_no_better_than_chance_and_counting_is(subject, found):
    report = text(subject, 12, 0, 200, found=found)
    figures = {r["name"]: r for r in report["results"]}
    assert list(figures) == ["model", "unigram", "5-gram"]
    chance = math.log(1280)
    assert figures["model"]["nats_per_token"] > chance - 0.5
    assert figures["5-gram"]["nats_per_token"] < figures["unigram"]["nats_per_token"] < 0.7 * chance
    assert report["n"] == 12 and report["documents"] > 1 and report["corpora"] == {"made up": "none"}
    for r in figures.values():
        bits = r["nats_per_token"] / math.log(2) * report["tokens"] / report["bytes"]
        assert r["bits_per_byte"] == pytest.approx(bits)
        assert 0 < r["nats_per_token_error"] < 0.1 * r["nats_per_token"]
    unigram, five = report["margins"]
    assert (unigram["name"], five["name"]) == ("unigram - model", "5-gram - model")
    assert five["bits_per_byte"] == pytest.approx(
        figures["5-gram"]["bits_per_byte"] - figures["model"]["bits_per_byte"]
    )
    assert unigram["bits_per_byte_error"] > 0


def test_a_passage_is_given_after_the_beginning_of_a_sentence_and_no_passage_twice(subject, found, monkeypatch):
    seen = []

    def logits(ids):
        seen.append(tuple(ids))
        return torch.zeros(len(ids), 1280)

    monkeypatch.setattr(subject.model, "logits", logits)
    report = text(subject, 20, 3, 150, found=found)
    assert report["results"][0]["nats_per_token"] == pytest.approx(math.log(1280))
    assert len(set(seen)) == 20 and {ids[0] for ids in seen} == {0}
    held = "".join(found.documents[True])
    assert all(subject.tokenizer.decode(ids[1:]) in held for ids in seen)
    assert report["tokens"] == sum(map(len, seen))
    again = seen.copy()
    seen.clear()
    text(subject, 20, 3, 150, found=found)
    assert seen == again
    seen.clear()
    text(subject, 20, 4, 150, found=found)
    assert seen != again


def test_less_training_text_is_less_help(subject, found, monkeypatch):
    monkeypatch.setattr(subject.model, "logits", lambda ids: torch.zeros(len(ids), 1280))
    costs = [text(subject, 9, 0, 200, n, found)["results"][2]["nats_per_token"] for n in (200, 2000, 20_000)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[2] + 0.2


def test_what_is_stopped_has_what_was_predicted_until_then(subject, found):
    report = text(subject, 8, 0, 200, found=found, watch=After(3))
    assert report["n"] == 3 and len(report["results"]) == 3
    watch = After(1)
    watch.stopped = True
    report = text(subject, 8, 0, 200, found=found, watch=watch)
    assert report["n"] == 0 and report["results"] == report["margins"] == []


def test_one_document_alone_has_no_error(subject, found, monkeypatch):
    monkeypatch.setattr("pyrosome.evals.text.passages", lambda d, c: [Passage(0, x[:50]) for x in d])
    report = text(subject, 2, 0, 50, found=found)
    assert report["results"][0]["bits_per_byte_error"] is None


def test_more_passages_than_there_are(subject, found):
    with pytest.raises(RequestError, match=r"9999 passages were asked for and \d+ of 200 characters are held out"):
        text(subject, 9999, 0, 200, found=found)
