"""Models that count: proper, and better the longer they look where there is something to see."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from pyrosome.evals.ngram import NGram

TEXTS = [[0, 3, 4, 5, 3, 4, 6], [0, 3, 4, 5, 7], [0, 5, 3], [0], []]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context", [[0], [0, 3], [0, 3, 4], [0, 3, 4, 5, 3, 4], [0, 9, 9], [0, 9, 3, 4]], ids=str)
def test_all_tokens_together_have_probability_one(order, context):
    model = NGram(order, 10, TEXTS)
    p = [math.exp(-model.nats([*context, w])[-1]) for w in range(10)]
    assert sum(p) == pytest.approx(1.0) and min(p) > 0


def test_an_order_of_one_counts_what_there_is_but_for_what_texts_begin_with():
    p = np.exp(-NGram(1, 10, TEXTS).nats([3, 4, 5, 6, 7, 0, 9]))
    counts = {3: 4, 4: 3, 5: 3, 6: 1, 7: 1}  # of 12, less a discount, which is shared out; none is met twice
    shared = 0.9 * 5 / 12 / 10
    assert p == pytest.approx([max(counts.get(w, 0) - 0.9, 0) / 12 + shared for w in (3, 4, 5, 6, 7, 0, 9)][1:])


def test_a_context_tells_and_an_unknown_one_is_passed_over():
    model = NGram(3, 10, TEXTS)
    after_3_4 = [math.exp(-model.nats([0, 3, 4, w])[-1]) for w in range(10)]
    assert max(range(10), key=after_3_4.__getitem__) == 5
    shorter = NGram(2, 10, TEXTS)
    assert model.nats([0, 9, 9, 4])[-1] == pytest.approx(NGram(3, 10, TEXTS).nats([0, 8, 9, 4])[-1])
    assert shorter.nats([0, 9, 4])[-1] == pytest.approx(shorter.nats([0, 8, 4])[-1])


def test_a_token_met_after_many_others_goes_before_one_that_is_frequent_after_one():
    texts = [[0, 1, 2]] * 6 + [[0, w, 3] for w in (4, 5, 6, 7)]
    model = NGram(2, 10, texts)
    two, three = np.exp(-model.nats([0, 8, 2]))[-1], np.exp(-model.nats([0, 8, 3]))[-1]
    assert three > 2 * two


def test_nothing_reaches_over_the_end_of_a_text():
    apart, joined = NGram(2, 10, [[0, 3], [4, 5]]), NGram(2, 10, [[0, 3, 4, 5]])
    assert joined.nats([0, 3, 4])[-1] < apart.nats([0, 3, 4])[-1]


def test_longer_looks_cost_less_where_text_repeats_itself():
    rng = random.Random(0)
    phrases = [[rng.randrange(1, 60) for _ in range(6)] for _ in range(12)]

    def text():
        return [0, *(w for _ in range(10) for w in rng.choice(phrases))]

    train, held = [text() for _ in range(60)], [text() for _ in range(10)]
    costs = [sum(NGram(n, 60, train).nats(t).sum() for t in held) / 600 for n in (1, 2, 5)]
    assert costs[0] > costs[1] + 1 > costs[2] + 1.05
    assert costs[2] == pytest.approx(math.log(12) / 6, abs=0.15)  # what a phrase costs, spread over its tokens


def test_without_a_text_all_tokens_are_alike():
    assert NGram(5, 8, []).nats([0, 1, 2]) == pytest.approx([math.log(8)] * 2)
