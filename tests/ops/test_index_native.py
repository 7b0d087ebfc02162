"""The native lightning indexer over FP4 pages: what its definition chooses, to the bit wherever and however it runs."""

import ctypes
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyrosome.cache.shards import SharedRows
from pyrosome.cache.streams import PAGE_ROWS
from pyrosome.cache.views import PagedRows
from pyrosome.dist import Mesh
from pyrosome.ops import native, toolchain
from pyrosome.ops.index_topk import index_topk
from pyrosome.ops.seam import place_of
from pyrosome.quant import simulate_fp4
from pyrosome.quant.rows import FP4IndexRows

try:
    native.library()
except OSError as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)

LEVELS = toolchain.supported()
SHAPES = [(4, 64), (8, 32), (16, 64), (5, 96), (64, 128), (1, 32)]  # heads, channels
COUNTS = (0, 1, 15, 16, 17, 63, 64, 65, 130, 1000, 2500)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    native.library().pyrosome_set_grain(ctypes.c_int64(0))


def paged(rows_BNC: Tensor, layout, seed=0) -> PagedRows:
    """Rows in shuffled pages of a pool whose other bytes are anything."""
    (B, N, C), g = rows_BNC.shape, torch.Generator().manual_seed(seed)
    P, row_format = -(-N // PAGE_ROWS), FP4IndexRows(rows_BNC.shape[2])
    num_pages = B * P + 3
    table = 1 + torch.randperm(num_pages - 1, generator=g)[: B * P].view(B, P)
    row = torch.arange(N)
    place = table[:, row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS
    planes = tuple(
        torch.randint(0, 256, (num_pages * PAGE_ROWS, n), generator=g).to(dtype) for dtype, n in row_format.planes(C)
    )
    for plane, encoded in zip(planes, row_format.encode(rows_BNC), strict=True):
        plane[place] = encoded
    span = torch.tensor([b for b, (first, last) in enumerate(layout) for _ in range(first, last)])
    return PagedRows(planes, row_format, table, SimpleNamespace(span_T=span, context=4 * N), 4)


class Case(NamedTuple):
    q: Tensor
    keys: PagedRows
    weight: Tensor
    visible: Tensor
    layout: list[tuple[int, int]]
    topk: int

    def first(self, T):
        """The same, of the first T tokens."""
        layout = [(min(a, T), min(z, T)) for a, z in self.layout]
        return self._replace(q=self.q[:T], weight=self.weight[:T], visible=self.visible[:T], layout=layout)


def coarse(g, *shape):
    """Sums of products of these are exact in any order, and tie often."""
    return torch.randint(-2, 3, shape, generator=g) / 2


def case(heads=8, width=32, topk=20, values=coarse, seed=0, spans=((0, 40), (40, 41), (41, 60)), rows=2500):
    """Three spans of one pool; each sees all of `COUNTS` and other numbers of rows."""
    g, T = torch.Generator().manual_seed(seed), spans[-1][1]
    visible = torch.randint(0, rows + 1, (T,), generator=g)
    visible[: len(COUNTS)] = torch.tensor(COUNTS).clamp(max=rows)
    visible[-len(COUNTS) :] = torch.tensor(COUNTS).clamp(max=rows)
    q = simulate_fp4(values(g, T, heads, width))
    keys = values(g, len(spans), rows, width)
    return Case(q, paged(keys, spans), values(g, T, heads), visible, list(spans), topk)


def normal(g, *shape):
    return torch.randn(shape, generator=g)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_kernel_is_chosen():
    args = case()
    assert index_topk.chosen(*args) == "cpu"
    with torch.enable_grad():
        assert index_topk.chosen(*args) == "cpu-train"
    assert index_topk.pick(place_of(*args[:2])).run.__module__ == "pyrosome.ops.index_topk.cpu"


@pytest.mark.parametrize(("heads", "width"), SHAPES)
@pytest.mark.parametrize("topk", [1, 17, 512, 2499, 2500, 3000])
def test_exact_sums_choose_exactly_what_the_definition_does(heads, width, topk):
    args = case(heads, width, topk)
    ours, theirs = index_topk(*args), index_topk.definition(*args)
    assert ours[0].dtype == theirs[0].dtype and ours[1].dtype == theirs[1].dtype
    assert same(ours, theirs)


@pytest.mark.parametrize(("heads", "width"), SHAPES)
@pytest.mark.parametrize("rounded", [True, False], ids=["fp4", "float"])
def test_scores_of_any_values_are_those_of_float64(heads, width, rounded):
    args = case(heads, width, 64, normal)
    if not rounded:
        args = args._replace(q=normal(torch.Generator().manual_seed(7), *args.q.shape))
    score, index = index_topk(*args)
    wanted = index_topk.definition(args.q.double(), *args[1:])
    assert torch.equal(index, wanted[1])
    keys = args.keys.span_rows(0, args.keys.num_rows).double()[args.keys.span_T]
    q, weight = args.q.double(), args.weight.double()
    product = torch.einsum("thc,tnc->thn", q, keys).relu()
    exact = torch.einsum("th,thn->tn", weight, product)
    # Products of FP4 are exact; those of other values are rounded, each sum by its own terms.
    terms = product if rounded else torch.einsum("thc,tnc->thn", q.abs(), keys.abs())
    size = torch.einsum("th,thn->tn", weight.abs(), terms)
    error = (score.double() - exact.gather(1, index.clamp(min=0))).abs()
    assert (error <= 1e-6 * size.gather(1, index.clamp(min=0)))[index >= 0].all()


def test_queries_in_codes_and_in_floats_meet_the_same_numbers():
    """A token with one group that is not FP4 takes the other way; its other heads score as before."""
    args = case(heads=8, width=64, values=normal, topk=2500)
    odd, weight = args.q.clone(), args.weight.clone()
    odd[::2, 3, 40], weight[:, 3] = 0.123456789, 0
    assert same(index_topk(*args._replace(q=odd, weight=weight)), index_topk(*args._replace(weight=weight)))


@pytest.mark.parametrize("apart", [2.0**-3, 2.0**-8])
def test_groups_of_a_head_may_be_far_apart(apart):
    """Those near each other share a power of two; either way the sums of these are exact."""
    args = case(heads=6, width=64, topk=700)
    q = args.q.clone()
    q[::2, :, 32:] *= apart
    q[1::2, 3, :32] *= apart
    args = args._replace(q=q)
    assert same(index_topk(*args), index_topk.definition(*args))


@pytest.mark.parametrize("weight", [2.0**-100, 2.0**-147, 2.0**100, float("inf"), float("nan")])
def test_a_weight_may_have_any_size(weight):
    """Scales of the query go into weights only where that loses nothing."""
    args = case(heads=1, topk=2500, rows=600)
    args = args._replace(weight=torch.full_like(args.weight, weight), visible=args.visible.clamp(min=600))
    for ours, theirs in zip(index_topk(*args), index_topk.definition(*args), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("topk", [1, 40, 300])
def test_scores_of_every_size_are_put_in_order(topk):
    """Of both signs and eighty powers of two, with ties: what is chosen is cut out of them bit by bit."""
    args, g = case(heads=1, topk=topk), torch.Generator().manual_seed(3)
    keys = coarse(g, 3, 2500, 32) * 2.0 ** torch.randint(-40, 41, (3, 2500, 1), generator=g)
    args = args._replace(keys=paged(keys, args.layout), weight=torch.where(args.weight < 0, -1.0, 1.0))
    assert same(index_topk(*args), index_topk.definition(*args))


@pytest.mark.parametrize("values", [0.0, 1.0])
@pytest.mark.parametrize("topk", [1, 100, 512])
def test_ties_go_to_the_lowest_index(values, topk):
    args = case(topk=topk)
    keys = torch.full((3, 2500, 32), values)
    args = args._replace(keys=paged(keys, args.layout))
    score, index = index_topk(*args)
    place = torch.arange(topk)
    assert torch.equal(index, torch.where(place < args.visible[:, None], place, -1))
    assert same((score, index), index_topk.definition(*args))


@pytest.mark.parametrize("rising", [True, False])
def test_scores_in_order_of_rows(rising):
    """Rising, every row is better than all before it; falling, none is."""
    N = 2500
    size = torch.arange(N) if rising else torch.arange(N).flip(0)
    keys = torch.zeros(1, N, 32)
    for i in range(6):  # base 4, a head for each digit
        keys[0, :, i] = size // 4**i % 4
    q = torch.eye(32)[:6].repeat(3, 1, 1)
    weight = (4.0 ** torch.arange(6)).repeat(3, 1)
    layout, visible = [(0, 3)], torch.tensor([N, 2000, 100])
    args = (q, paged(keys, layout), weight, visible, layout, 300)
    score, index = index_topk(*args)
    assert same((score, index), index_topk.definition(*args))
    assert index[0, 0] == (N - 300 if rising else 0) and torch.equal(score[0], size[index[0]].float())


def test_minus_zero_is_zero():
    """A weight below zero makes -0 of keys that no head meets: still the lowest index wins."""
    args = case(topk=10, rows=100)
    args = args._replace(weight=-args.weight.abs())
    score, _ = index_topk(*args)
    assert same(index_topk(*args), index_topk.definition(*args))
    assert not torch.signbit(score[score == 0]).any()


def bits(out):
    return [x.view(torch.int32) if x.dtype == torch.float32 else x for x in out]


EVERY_WAY = [(normal, True), (normal, False), (coarse, True)]
every_way = pytest.mark.parametrize(("values", "rounded"), EVERY_WAY, ids=["fp4", "float", "ties"])


def example(values, rounded, **kwargs):
    args = case(heads=6, width=64, values=values, **kwargs)
    if rounded:
        return args
    return args._replace(q=normal(torch.Generator().manual_seed(7), *args.q.shape))


@every_way
@pytest.mark.parametrize(("heads", "width"), SHAPES)
def test_every_level_has_the_same_bits(values, rounded, heads, width):
    args = case(heads, width, 50, values, spans=((0, 9), (9, 26)), rows=300)
    if not rounded:
        args = args._replace(q=normal(torch.Generator().manual_seed(7), *args.q.shape))
    found = []
    for level in LEVELS:
        with native.use_level(level):
            found.append(bits(index_topk(*args)))
    assert all(same(found[0], other) for other in found[1:])


@every_way
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("topk", [7, 512])
def test_threads_change_no_bit(values, rounded, threads, topk, monkeypatch):
    args = example(values, rounded, topk=topk)
    alone = [bits(index_topk(*args.first(T))) for T in (1, 3, 25, 60)]
    monkeypatch.setattr(native, "threads", lambda: threads)
    native.library().pyrosome_set_grain(ctypes.c_int64(1))
    for T, wanted in zip((1, 3, 25, 60), alone, strict=True):
        assert same(bits(index_topk(*args.first(T))), wanted), f"{T} tokens"


@every_way
def test_a_token_has_the_same_bits_in_any_company(values, rounded):
    args = example(values, rounded)
    whole = bits(index_topk(*args))
    for T in (1, 2, 15, 16, 17, 40, 41, 59):
        assert same(bits(index_topk(*args.first(T))), [x[:T] for x in whole]), f"{T} tokens"
    mixed = args._replace(q=args.q.clone())
    mixed.q[1::2] += 0.01  # neighbours of another kind
    assert same([x[::2] for x in bits(index_topk(*mixed))], [x[::2] for x in whole])


@every_way
def test_rows_that_are_not_visible_may_hold_anything(values, rounded):
    args = example(values, rounded, topk=100)
    args = args._replace(visible=args.visible.clamp(max=203))
    before = bits(index_topk(*args))
    row = torch.arange(203, args.keys.num_rows)
    place = args.keys.table_BP[:, row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS
    codes, scales = args.keys.planes
    for code, scale in [(0x77, 255), (0xFF, 254), (0, 0)]:
        codes[place], scales[place] = code, scale
        codes[:PAGE_ROWS], scales[:PAGE_ROWS] = code, scale  # the page that is nobody's
        assert same(bits(index_topk(*args)), before)


def test_more_may_be_said_to_be_visible_than_there_are():
    args = case(rows=70)
    assert same(
        index_topk(*args._replace(visible=args.visible + 1000)),
        index_topk(*args._replace(visible=args.visible * 0 + 70)),
    )


def test_a_fault_in_a_row_shows():
    args = case(topk=3, rows=100)
    scales = args.keys.planes[1]
    scales[args.keys.table_BP[0, 0] * PAGE_ROWS + 5] = 255
    score, index = index_topk(*args)
    seen = (args.visible > 5) & (args.keys.span_T == 0)
    assert ((index == 5) & score.isnan()).any(1)[seen].all()
    assert not score[~seen].isnan().any()


def test_every_code_and_scale_is_read_as_it_is_decoded():
    """All bytes of codes under scales from the least to the largest usable, by one channel of the query at a time."""
    keys = paged(torch.zeros(1, 256, 32), [(0, 32)])
    codes, scales = keys.planes
    place = keys.table_BP[0].repeat_interleave(PAGE_ROWS) * PAGE_ROWS + torch.arange(256) % PAGE_ROWS
    codes[place], scales[place, 0] = (
        torch.arange(256, dtype=torch.uint8)[:, None],
        (torch.arange(256) % 120 + 67).to(torch.uint8),
    )
    weight, visible = torch.tensor([[1.0, -1.0]]).repeat(32, 1), torch.full((32,), 256)
    q = torch.stack([torch.eye(32), -torch.eye(32)], dim=1)
    score, index = index_topk(q, keys, weight, visible, [(0, 32)], 256)
    assert torch.equal(index, torch.arange(256).repeat(32, 1))
    assert torch.equal(score, keys.span_rows(0, 256)[0].t())


@pytest.mark.parametrize("values", [coarse, normal])
def test_rows_shared_out_between_ranks_are_scored_by_the_definition(values, monkeypatch):
    args = case(topk=5, rows=100, values=values)
    called = []
    definition = index_topk.definition
    monkeypatch.setattr(index_topk, "definition", lambda *a: called.append(a[1]) or definition(*a))
    wanted = index_topk(*args)
    assert not called
    shared = SharedRows(args.keys, Mesh())
    assert same(index_topk(*args._replace(keys=shared)), wanted) and called == [shared]
