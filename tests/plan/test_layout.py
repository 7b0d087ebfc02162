"""What each mode splits, and that runs of things are dealt out as the engine deals them."""

from __future__ import annotations

import pytest

from pyrosome.config import ModelConfig
from pyrosome.dist import Mesh
from pyrosome.errors import RequestError
from pyrosome.plan.layout import MODES, Layout, Placement, share

FLASH = ModelConfig.preset("flash")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num", [0, 1, 7, 43, 256])
def test_things_are_dealt_out_as_the_engine_deals_them(num, ranks):
    for rank in range(ranks):
        assert share(num, rank, ranks) == Mesh(rank, ranks).part(num)


@pytest.mark.parametrize("ranks", [3, 5, 6, 7])
@pytest.mark.parametrize("num", [0, 2, 43, 256])
def test_uneven_counts_are_dealt_out_whole_and_nearly_even(num, ranks):
    runs = [share(num, rank, ranks) for rank in range(ranks)]
    assert [i for run in runs for i in run] == list(range(num))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_each_mode_splits_what_its_name_says():
    shared = {
        mode: {
            name
            for name in ("tensor", "experts", "layers", "replicas", "context")
            if getattr(Layout.of(mode, 4), name) == 4
        }
        for mode in MODES
    }
    assert shared == {
        "tp": {"tensor", "experts"},
        "pp": {"layers"},
        "ep": {"experts", "replicas"},
        "dp": {"replicas"},
        "cp": {"experts", "context"},
    }


@pytest.mark.parametrize(("mode", "ranks", "word"), [("up", 2, "'up'"), ("tp", 0, "0 devices"), ("tp", 5000, "4,096")])
def test_no_such_layout(mode, ranks, word):
    with pytest.raises(RequestError, match=word):
        Layout.of(mode, ranks)


@pytest.mark.parametrize(
    ("mode", "most", "word"),
    [("tp", 8, "output groups"), ("pp", 43, "layers"), ("ep", 256, "experts"), ("dp", 4096, "")],
)
def test_a_model_is_cut_as_far_as_it_goes(mode, most, word):
    assert Layout.of(mode, most).why_not(FLASH) == ""
    if word:
        assert word in Layout.of(mode, most + 1).why_not(FLASH)


def test_a_placement_is_in_whole_experts_whatever_their_number():
    for num in (3, 8, 256, 384):
        for near in range(num + 1):
            placement = Placement.of(near, (num - near) // 2, num)
            assert placement.counts(num) == (near, (num - near) // 2, num - near - (num - near) // 2)
