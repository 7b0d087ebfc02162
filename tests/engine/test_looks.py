"""Where an indexer looked: told as it was chosen in serving, and put together for a person."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pyrosome.engine import looks as module
from pyrosome.engine.loaded import LoadedModel
from pyrosome.engine.looks import Look, Place, csa_layers, looks, places
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.model.deepseek_v4 import Choice
from pyrosome.model.step import Span, Step
from pyrosome.testing.shapes import tiny
from tests.networks import build_network, network, tokens

CONFIG = tiny((0, 4, 128, 4), max_position_embeddings=400)
IDS = tokens(300)


def loaded(net) -> LoadedModel:
    return LoadedModel(net, net.config, "exact", "f32", Path(), None)


def test_a_known_choice_is_told_best_first_with_its_tokens_and_without_padding():
    net = build_network(tiny((0, 4)))
    rows, scores = [0, 2, 3, -1, 5], [1.0, 3.0, 3.0, -math.inf, 2.0]

    def choose(*given):
        step = next(x for x in given if isinstance(x, Step))
        count = len(step.ids_T)
        score_TK = torch.tensor(scores).repeat(count, 1)
        return Choice(score_TK + 10 * step.position_T[:, None], torch.tensor(rows).repeat(count, 1))

    net.layers[1].attn.indexer.forward = choose
    found = looks(loaded(net), IDS[:30], last=2)
    windows = [(4, 11, 3.0), (8, 15, 3.0), (16, 23, 2.0), (0, 3, 1.0)]  # rows 2, 3 (an equal score), 5, 0
    assert found == [Look(1, p, a, b, s + 10 * p, None) for p in (28, 29) for a, b, s in windows]


@pytest.mark.parametrize("last", [1, 2, 8, 300, 1000])
@pytest.mark.parametrize("num_ids", [257, 300])
def test_through_the_cache_the_choice_is_that_of_the_whole_sequence(monkeypatch, num_ids, last):
    monkeypatch.setattr(module, "STEP_TOKENS", 64)  # 257 tokens: a part of one token, and then the last ones
    net, ids = network(CONFIG), IDS[:num_ids]
    with torch.inference_mode():
        whole = net(Step.of([Span(0, 0, ids)])).scores
    assert len(whole) == 2
    expected = {}
    for layer, choice in zip((1, 3), whole, strict=True):
        for position in range(max(0, num_ids - last), num_ids):
            pairs = zip(choice.rows[position].tolist(), choice.score[position].tolist(), strict=True)
            for row, score in pairs:
                if row >= 0:
                    expected[layer, position, max(0, 4 * row - 4), 4 * row + 3] = score
    found = looks(loaded(net), ids, last)
    assert {x[:4] for x in found} == set(expected) and len(found) == len(expected)
    assert all(abs(x.score - expected[x[:4]]) < 1e-4 for x in found)
    assert found == sorted(found, key=lambda x: (x.layer, x.position, -x.score))
    assert all(x.last <= x.position and x.mass is None for x in found)


def test_fewer_than_eight_tokens_have_as_many_rows_as_are_finished():
    for num_ids in range(1, 10):
        found = looks(loaded(network(CONFIG)), IDS[:num_ids], last=1)
        windows = [(0, 3), (0, 7)][: num_ids // 4]
        assert sorted((x.layer, x.position, x.first, x.last) for x in found) == [
            (layer, num_ids - 1, *w) for layer in (1, 3) for w in windows
        ]


def test_a_network_without_an_indexer_looks_nowhere():
    model = loaded(network(tiny((0, 128))))
    assert (csa_layers(model), looks(model, IDS[:40])) == ([], [])
    assert csa_layers(loaded(network(CONFIG))) == [1, 3]


def test_what_cannot_be_computed_is_refused():
    model = loaded(network(CONFIG))
    with pytest.raises(RequestError, match="last is 0"):
        looks(model, IDS[:20], 0)
    with pytest.raises(RequestError, match="empty prompt"):
        looks(model, [])
    with pytest.raises(RequestError, match="token 160 at position 1"):
        looks(model, [3, 160])
    with pytest.raises(ContextTooLong, match="401 tokens were asked for and the context holds 400"):
        looks(model, tokens(401))


def look(layer: int, position: int, row: int, score: float) -> Look:
    return Look(layer, position, max(0, 4 * row - 4), 4 * row + 3, score, None)


def test_rows_that_overlap_or_touch_become_one_place_and_others_do_not():
    found = places([look(1, 99, 3, 5.0), look(3, 99, 4, 4.0), look(1, 98, 6, 3.0), look(1, 97, 9, 2.0)])
    assert [(p.first, p.last) for p in found] == [(8, 27), (32, 39)]  # 8..15, 12..19 and 20..27; 28..31 is nobody's
    assert found[0] == Place(8, 27, ((1, 98), (1, 99), (3, 99)), 5.0) and found[0].layers == (1, 3)


def test_the_shorter_first_row_joins_its_neighbours():
    assert [(p.first, p.last) for p in places([look(1, 9, 0, 1.0), look(1, 9, 1, 2.0), look(1, 9, 2, 3.0)])] == [
        (0, 11)
    ]


def test_how_often_a_place_is_the_best_counts_more_than_its_score():
    rarely, often, never = 10, 20, 30
    given = [look(1, 97, rarely, 9.0), look(1, 98, often, 2.0), look(3, 98, often, 1.0), look(3, 98, never, 0.5)]
    given += [look(1, 97, 40, 8.0), look(1, 99, 50, 3.0)]
    assert [(p.first, len(p.firsts)) for p in places(given)] == [(76, 2), (36, 1), (196, 1), (156, 0), (116, 0)]


def test_only_the_best_rows_of_each_layer_and_token_are_taken():
    given = [look(1, 9, row, float(-row)) for row in range(0, 40, 4)] + [look(3, 9, 60, -99.0)]
    assert [p.first for p in places(given)] == [0, 236, 12]
    assert [p.first for p in places(given, best=1)] == [0, 236]


def test_positions_outside_are_left_out_before_a_row_is_called_the_best():
    given = [look(1, 99, 20, 9.0), look(1, 99, 5, 4.0), look(1, 99, 2, 3.0), look(1, 99, 9, 1.0)]
    inside = [Place(16, 23, ((1, 99),), 4.0), Place(8, 11, (), 3.0), Place(32, 35, (), 1.0)]
    assert places(given, range(8, 36), best=3) == inside
    assert places(given, range(100, 120)) == [] == places([])
