"""Attention whose tokens read rows together, where neighbours have the same ones: each token's bits are those alone."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from pyrosome.cache.views import PagedRows, WindowRows
from pyrosome.model.step import Span, Step
from pyrosome.ops import native
from pyrosome.ops.linear import grouped_linear
from pyrosome.ops.rope import rotation
from pyrosome.ops.sparse_attention import attention
from pyrosome.quant.rows import FP8KVRows
from pyrosome.quant.tiles import tile
from tests.ops.test_native import LEVELS, noise, stored

WIDTH, ROPE, RING = 96, 32, 40
FORMAT = FP8KVRows(WIDTH - ROPE, ROPE)
SLOTS = 4


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    native.library().pyrosome_set_grain(ctypes.c_int64(0))


def arguments(spans, heads, ratio, chosen=0):
    """Of `attention` as a layer gives them: the window of each token, and all rows of a ratio, or some few of them."""
    step = Step.of([Span(slot, start, [1] * count) for slot, start, count in spans])
    T = step.ids_T.shape[0]
    ring = tuple(x.unflatten(0, (SLOTS, RING)) for x in FORMAT.encode(noise(SLOTS * RING, WIDTH, seed=4)))
    window = WindowRows(ring, FORMAT, step.slot_B, FORMAT.round_trip(noise(T, WIDTH, seed=5)))
    num_pages = -(-step.num_rows(ratio) // 64)
    table = torch.arange(len(spans) * num_pages).view(len(spans), num_pages).flip(1) + 1
    planes = tuple(FORMAT.encode(noise((table.numel() + 1) * 64, WIDTH, seed=3)))
    pages = PagedRows(planes, FORMAT, table, step, ratio)
    far = step.all_rows(ratio)
    if chosen:  # another choice for each token, ascending, as an indexer's
        picked = torch.rand(far.shape, generator=torch.Generator().manual_seed(1)).masked_fill(far < 0, 2)
        near_first = picked.argsort(-1)[:, :chosen]
        far = torch.where(far.gather(1, near_first) < 0, step.num_rows(ratio), near_first).sort(-1).values
        far = torch.where(far == step.num_rows(ratio), -1, far)
    turn = rotation(noise(ROPE // 2), step.position_T.clamp(min=0))
    parts = [(window, step.window_index(RING - 8, RING)), (pages, far)]
    return noise(T, heads, WIDTH), parts, noise(heads, seed=7), turn


def alone(args, t):
    """Token t by itself."""
    q, parts, sink, turn = args
    cut = []
    for source, index in parts:
        if isinstance(source, PagedRows):
            step = SimpleNamespace(span_T=source.span_T[t : t + 1], context=source.num_rows)
            source = PagedRows(source.planes, FORMAT, source.table_BP, step, 1)
        cut.append((source, index[t : t + 1]))
    return attention(q[t : t + 1], cut, sink, turn[t : t + 1])


# Spans are (slot, first position, tokens): a prompt's beginning, one that goes on, several at once, single tokens.
SPANS = {
    "from the beginning": [(1, 0, 45)],
    "going on": [(2, 1021, 37)],
    "several": [(1, 0, 3), (3, 300, 19), (2, 77, 20)],
    "one token each": [(1, 50, 1), (2, 50, 1), (3, 51, 1)],
}


@pytest.mark.parametrize("heads", [3, 8, 24, 64, 70])
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize(("ratio", "chosen"), [(4, 0), (4, 11), (128, 0)])
def test_tokens_that_read_together_have_the_bits_of_each_alone(spans, heads, ratio, chosen, monkeypatch):
    args = arguments(SPANS[spans], heads, ratio, chosen)
    assert attention.chosen(*args) == "cpu"
    ours = attention(*args)
    assert torch.equal(ours, torch.cat([alone(args, t) for t in range(len(ours))]))
    theirs = attention.definition(*args)
    assert (ours - theirs).norm() / theirs.norm() < 4e-3  # weights are rounded after another maximum
    monkeypatch.setattr(native, "threads", lambda: 3)
    native.library().pyrosome_set_grain(ctypes.c_int64(1))
    assert torch.equal(attention(*args), ours)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_the_same_bits(level):
    for heads in (8, 64):
        args = arguments(SPANS["several"], heads, 4)
        ours = attention(*args)
        with native.use_level(level):
            assert torch.equal(attention(*args), ours)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ratio", [4, 128])
def test_a_row_that_is_not_finite_reaches_those_who_see_it_and_no_other(value, ratio):
    args = arguments(SPANS["going on"], 8, ratio)
    ((window, _), _) = args[1]
    for t in (13, 30):
        window.fresh_TC[t] = value
    out = attention(*args)
    seen = torch.tensor([any(t <= i < t + RING - 8 for t in (13, 30)) for i in range(len(out))])
    assert torch.equal(~out.isfinite().all(-1).all(-1), seen)
    assert torch.equal(out[~seen], torch.cat([alone(args, t) for t in range(len(out)) if not seen[t]]))


def test_the_last_row_of_a_ratio_poisons_no_token_before_it():
    args = arguments(SPANS["going on"], 8, 4)
    pages = args[1][1][0]
    row = pages.num_rows - 1  # that only the last tokens see
    place = pages.table_BP[0, row // 64] * 64 + row % 64
    pages.planes[-1][place] = 255  # NaN scales
    out = attention(*args)
    sees = (args[1][1][1] == row).any(-1)
    assert 0 < sees.sum() < len(out)
    assert torch.equal(out.isnan().any(-1).any(-1), sees)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["fp8", "fp4"])
def test_inputs_that_bfloat16_holds_are_multiplied_as_pairs_with_the_same_bits(name, level):
    """One row that it does not hold sends all of them the other way."""
    weight, x = tile(stored(name, 3 * 44, 160), 3), noise(9, 3, 160).bfloat16().float()
    other = torch.cat([x, noise(1, 3, 160, seed=2)])
    with native.use_level(level):
        assert torch.equal(grouped_linear(x, weight), grouped_linear(other, weight)[:9])
