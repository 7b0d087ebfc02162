"""The lightning indexer by Triton chooses what its definition chooses, whatever the keys are and however it is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import pyrosome.ops.index_topk.triton as wrapper
from pyrosome.cache.streams import PAGE_ROWS
from pyrosome.cache.views import PagedRows
from pyrosome.errors import KernelUnavailable
from pyrosome.ops import gpu
from pyrosome.ops.index_topk import choosing, index_scores, index_topk, rank_index, rank_key, scoring
from pyrosome.quant import simulate_fp4
from pyrosome.quant.rows import RowFormat, index_rows
from tests.ops.gpu.held import CAPABILITIES, DEVICE, kernels, rms, same_bits

SPANS = [(0, 4), (4, 5), (5, 12)]
COUNTS = 0, 1, 63, 64, 65, 129, 300


class Given:
    """Rows of every span that a source gives as floats."""

    def __init__(self, rows_BNC: Tensor, row_format: str = "") -> None:
        self.rows, self.format, self.num_rows = rows_BNC.to(DEVICE), row_format, rows_BNC.shape[1]

    def span_rows(self, low: int, high: int) -> Tensor:
        return self.rows[:, low:high]


class Case(NamedTuple):
    """Arguments of a call."""

    q: Tensor
    keys: PagedRows | Given
    weight: Tensor
    visible: Tensor
    layout: list[tuple[int, int]]
    topk: int

    def tokens(self, first: int, last: int) -> Case:
        """The same, of tokens of one span."""
        (b,) = (b for b, (low, high) in enumerate(self.layout) if low <= first and last <= high)
        keys = self.keys
        if isinstance(keys, PagedRows):
            keys = pages(
                keys.planes, keys.row_format, keys.table_BP[b : b + 1], torch.zeros(last - first), keys.num_rows
            )
        some = slice(first, last)
        return Case(self.q[some], keys, self.weight[some], self.visible[some], [(0, last - first)], self.topk)


def coarse(g, *shape):
    """Sums of products of these are exact in any order, and tie often."""
    return torch.randint(-2, 3, shape, generator=g) / 2


def noise(g, *shape):
    return torch.randn(shape, generator=g)


def pages(planes: tuple[Tensor, ...], row_format: RowFormat, table_BP: Tensor, span_T: Tensor, rows: int) -> PagedRows:
    step = SimpleNamespace(span_T=span_T.long().to(DEVICE), context=4 * rows)
    return PagedRows(planes, row_format, table_BP, step, 4)  # type: ignore[arg-type]


def paged(rows_BNC: Tensor, row_format: RowFormat, span_T: Tensor, g: torch.Generator) -> PagedRows:
    """Rows in shuffled pages of a pool whose other bytes are anything."""
    B, N, C = rows_BNC.shape
    P = -(-N // PAGE_ROWS)
    table = 1 + torch.randperm(B * P + 2, generator=g)[: B * P].view(B, P)
    row = torch.arange(N)
    place = table[:, row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS
    planes = []
    for (dtype, n), encoded in zip(row_format.planes(C), row_format.encode(rows_BNC), strict=True):
        plane = torch.randint(0, 256, ((B * P + 3) * PAGE_ROWS, n * dtype.itemsize), generator=g).byte().view(dtype)
        plane[place] = encoded
        planes.append(plane.to(DEVICE))
    return pages(tuple(planes), row_format, table.to(DEVICE), span_T, N)


def case(
    row_format="fp8", heads=4, width=64, topk=20, values=coarse, rows=300, layout=SPANS, query=simulate_fp4, seed=0
) -> Case:
    """Three spans of one pool; their tokens see all of `COUNTS` and other numbers of rows."""
    g, T = torch.Generator().manual_seed(seed), layout[-1][1]
    visible = torch.randint(0, rows + 1, (T,), generator=g)
    visible[-len(COUNTS) :] = torch.tensor(COUNTS)[-T:].clamp(max=rows)
    q = query(values(g, T, heads, width))
    span = torch.tensor([b for b, (first, last) in enumerate(layout) for _ in range(first, last)])
    keys = paged(values(g, len(layout), rows, width), index_rows(row_format, width), span, g)
    weight = values(g, T, heads)
    return Case(q.to(DEVICE), keys, weight.to(DEVICE), visible.to(DEVICE), layout, topk)


def found(c: Case, capability: int = 90) -> tuple[Tensor, Tensor]:
    with kernels(index_topk, capability):
        return index_topk(*c)


def check(c: Case, capability: int = 90, *, exact: bool = True) -> None:
    """The kernel's rows and scores are the definition's; where sums may differ in their last bits, nearly so."""
    score, index = found(c, capability)
    with torch.no_grad():
        wanted_score, wanted_index = index_topk.definition(*c)
    assert index.dtype == wanted_index.dtype and torch.equal(index, wanted_index)
    assert torch.equal(index < 0, score == float("-inf"))
    assert torch.equal(score.isnan(), wanted_score.isnan())
    if exact:
        assert same_bits(score.nan_to_num(nan=7.0), wanted_score.nan_to_num(nan=7.0))
    chosen = score.isfinite()
    assert rms(score[chosen], wanted_score[chosen]) < 1e-6


@pytest.mark.parametrize(("row_format", "heads", "width"), [("fp8", 5, 96), ("bf16", 3, 20), ("f32", 3, 20)])
def test_rows_in_pages_of_every_format(row_format, heads, width):
    check(case(row_format, heads, width))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_device_does_the_same(capability):
    check(case(rows=130), capability)


def test_the_true_shape_and_more_rows_wanted_than_are_seen():
    check(case(heads=64, width=128, topk=512, layout=[(0, 3), (3, 4)]))


@pytest.mark.parametrize("row_format", ["fp8", "bf16", "f32"])
def test_queries_that_nothing_rounds_are_not_rounded(row_format):
    check(case(row_format, values=noise, query=lambda q: q, layout=[(0, 3)]), exact=False)


def test_a_query_that_takes_two_parts():
    c = case("bf16", layout=[(0, 2)], rows=40, topk=3)
    c.q[0, 0, 0] = 1 + 2**-10
    check(c)


def test_noise_as_the_model_has_it():
    check(case(values=noise, rows=140), exact=False)


@pytest.mark.parametrize("programs", [1, 10, 10**9])
def test_programs_of_one_token_and_of_many(programs, monkeypatch):
    """Of many: spans end within a program, and some of its tokens see nothing of its rows."""
    monkeypatch.setattr(scoring, "PROGRAMS", programs)
    monkeypatch.setattr(scoring, "TOKENS", 8)
    check(case(layout=[(0, 1), (1, 3), (3, 20)], rows=270, topk=7))


@pytest.mark.parametrize("values", [coarse, noise])  # of which most tie, and of which none do
@pytest.mark.parametrize("block", ["1024", "4096", "8192", "16384"])
def test_blocks_of_rows_do_not_change_the_choice(block, values):
    c = case(heads=1, width=32, rows=4500, layout=[(0, 3)], topk=30, values=values)
    c.weight.abs_()
    c.visible[:] = torch.tensor([4500, 1025, 29])
    with gpu.forced(best_rows=block):
        check(c, exact=values is coarse)


@pytest.mark.parametrize("K", [1, 5, 9, 40])
def test_scores_of_any_bits_are_ordered_as_the_definition_orders_them(K):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, inf, nan, -nan, -inf, 1e-45, -1e-45, 1.0, -1.0, -3e38, 3e38, 0.0, -0.0, 1.0, nan])
    values = torch.cat([values.flip(0), values, torch.tensor([-1], dtype=torch.int32).view(torch.float32)])
    score = torch.zeros(len(values), 48, device=DEVICE)
    score[:, :33] = torch.stack([values.roll(n) for n in range(len(values))]).to(DEVICE)
    visible = torch.tensor([0, 1, 7, 33]).repeat_interleave(9)[-len(values) :].to(DEVICE)
    out = torch.empty(len(values), K, device=DEVICE), torch.empty(len(values), K, dtype=torch.int64, device=DEVICE)
    choosing.choose(score, visible, choosing.plan(33, K, gpu.target(DEVICE)), (0, len(values)), out)
    row = torch.arange(33)
    rank = rank_key(score[:, :33].cpu(), row).masked_fill(row >= visible.cpu()[:, None], -1)
    best = rank.topk(min(K, 33)).values
    wanted = rank_index(best).masked_fill(best < 0, 99).sort().values
    found = out[1].cpu()[:, : wanted.shape[1]]
    assert torch.equal(found, wanted.masked_fill(wanted == 99, -1))
    assert (out[1][:, 33:] == -1).all()
    chosen = found >= 0
    at = out[0].cpu()[:, : wanted.shape[1]][chosen], score.cpu().gather(1, found.clamp(min=0))[chosen] + 0.0
    assert same_bits(at[0].nan_to_num(nan=7.0), at[1].nan_to_num(nan=7.0))


def test_many_rounds():
    """Of 3 blocks of 1024 rows 500 are kept each, of two blocks with those again, and then the best."""
    c = case(heads=1, width=32, rows=2500, layout=[(0, 2)], topk=500)
    c.visible[:] = torch.tensor([2500, 1400])
    with gpu.forced(best_rows="1024"):
        rounds = choosing.plan(2500, 500, gpu.target(DEVICE))
        assert [(r.width, r.num_blocks) for r in rounds] == [(2500, 3), (1500, 2), (1000, 1)]
        check(c)


def test_a_block_that_would_leave_nothing_out_is_refused():
    with gpu.forced(best_rows="1024"), pytest.raises(KernelUnavailable, match="4096"):
        found(case(rows=2500, topk=600, layout=[(0, 1)]))


@pytest.mark.parametrize("row_format", ["fp8", "bf16"])
def test_tiles_of_rows_do_not_change_the_scores(row_format):
    c = case(row_format, values=noise, layout=[(0, 4)])
    c.visible[:] = 300
    score, index = found(c)
    for tile in scoring.variants(gpu.target(DEVICE)):
        with gpu.forced(index_scores=tile):
            again, again_index = found(c)
        assert torch.equal(index, again_index)
        # The interpreter's products are numpy's, whose sums may depend on the shape of a tile.
        assert same_bits(score, again) if DEVICE.type == "cuda" else rms(again, score) < 1e-6


def test_a_device_is_offered_tiles_that_fit_it():
    assert list(scoring.variants(gpu.Target(80))) == list(scoring.variants(gpu.Target(100))) == ["128"]
    assert list(scoring.variants(gpu.Target(90))) == ["128", "256"]


@pytest.mark.parametrize("row_format", ["fp8", "f32"])
def test_a_token_has_the_same_bits_whatever_is_beside_it(row_format, monkeypatch):
    monkeypatch.setattr(scoring, "PROGRAMS", 4)
    c = case(row_format, values=noise, rows=140)
    c.q[3] = noise(torch.Generator().manual_seed(5), *c.q[3].shape)  # takes three parts, between those that take one
    score, index = found(c)
    for first, last in [(2, 3), (3, 4), (4, 5), (5, 9), (11, 12)]:
        alone_score, alone = found(c.tokens(first, last))
        assert torch.equal(alone, index[first:last])
        assert same_bits(alone_score, score[first:last])


def test_equal_scores_go_to_the_lowest_rows():
    c = case(heads=16, width=32, rows=200, topk=50, layout=[(0, 2)])
    c.q[:] = 0
    c.visible[:] = torch.tensor([200, 70])
    score, index = found(c)
    assert index.tolist() == [list(range(50))] * 2
    c.weight[:] = -1.0  # -1 x 0 is -0
    again, index = found(c)
    assert index.tolist() == [list(range(50))] * 2
    assert same_bits(score, torch.zeros_like(score)) and same_bits(again, score)


def test_numbers_that_are_none_stand_where_the_definition_has_them():
    c = case("bf16", rows=70, topk=6, layout=[(0, 3)])
    c.visible[:] = 70
    plane, table = c.keys.planes[0], c.keys.table_BP
    place = table[0, 0] * PAGE_ROWS
    plane[place + 5, 3] = float("nan")
    plane[place + 11, 1] = float("inf")
    plane[place + 12, 1] = float("-inf")
    c.q[:, :, 1] = 1.0
    c.weight.abs_().add_(1)
    check(c)
    assert {5, 11} <= set(found(c)[1][0].tolist())
    c.weight.neg_()
    check(c)


def test_a_scale_that_is_none():
    c = case(rows=70, topk=6, layout=[(0, 3)])
    c.visible[:] = 70
    c.keys.planes[1][c.keys.table_BP[0, 1] * PAGE_ROWS + 2, 1] = 255
    c.keys.planes[1][c.keys.table_BP[0, 1] * PAGE_ROWS + 3] = 0  # 2^-127
    check(c)
    assert 66 in found(c)[1][0].tolist()


@pytest.mark.parametrize("row_format", ["fp8", "f32"])
def test_what_nobody_sees_is_not_read(row_format):
    c = case(row_format, rows=300, layout=[(0, 2)])
    c.visible[:] = torch.tensor([70, 3])
    c.keys.table_BP[:, 2:] = 1 << 40
    wanted = found(c)
    c.keys.table_BP[:, 2:] = 0
    assert torch.equal(wanted[1], index_topk.definition(*c)[1])


@pytest.mark.parametrize(
    ("row_format", "layout"),
    [("", SPANS), ("fp8", SPANS), ("bf16", [(0, 12)]), ("", [(0, 4), (4, 4), (4, 12)])],  # the last has an empty span
)
def test_sources_that_give_floats(row_format, layout, monkeypatch):
    monkeypatch.setattr(wrapper, "SOURCE_ROWS", 48 * len(layout))  # they are asked more than once
    c = case(layout=layout, rows=100)
    c = c._replace(keys=Given(coarse(torch.Generator().manual_seed(3), len(layout), 100, 64), row_format))
    check(c)


@pytest.mark.parametrize("given", [False, True])
def test_memory_is_bounded_and_tokens_come_one_tile_after_the_other(given, monkeypatch):
    c = case(layout=[(0, 12), (12, 24)], rows=60, topk=9)
    if given:
        c = c._replace(keys=Given(coarse(torch.Generator().manual_seed(3), 2, 60, 64)))
    wanted = found(c)
    monkeypatch.setattr(wrapper, "WORKSPACE", 1)
    made = []
    launch = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda k, grid, *a, **o: (made.append((k, grid)), launch(k, grid, *a, **o)))
    score, index = found(c)
    assert [grid[0] for kernel, grid in made if kernel is choosing._best_rows] == [16, 8]
    assert torch.equal(index, wanted[1]) and same_bits(score, wanted[0])


def test_a_long_prompt_over_a_million_tokens_takes_no_more_than_the_workspace():
    T, N = 4096, 1 << 18
    on_meta = torch.device("meta")
    planes = tuple(torch.empty(64, n, dtype=dtype, device=on_meta) for dtype, n in index_rows("fp8", 128).planes(128))
    table = torch.empty(1, N // PAGE_ROWS, dtype=torch.int64, device=on_meta)
    visible = torch.empty(T, dtype=torch.int64, device=on_meta)
    keys = PagedRows(planes, index_rows("fp8", 128), table, SimpleNamespace(span_T=visible, context=4 * N), 4)  # type: ignore[arg-type]
    q, weight = torch.empty(T, 64, 128, device=on_meta), torch.empty(T, 64, device=on_meta)
    with gpu.tracing(90) as launches:
        score, index = wrapper.index_topk(q, keys, weight, visible, [(0, T)], 512)
    assert score.shape == index.shape == (T, 512)
    most = max(launch.grid[0] for launch in launches if launch.kernel is choosing._best_rows)
    assert most >= 16 and most * N * 4 <= wrapper.WORKSPACE
    names = [launch.kernel.__name__ for launch in launches]
    assert names[:5] == ["_split_queries", "_scores", "_best_rows", "_best_rows", "_split_queries"]


def test_pages_are_those_of_a_cache():
    assert scoring.PAGE_ROWS == PAGE_ROWS


def test_sizes_of_nothing_and_of_one():
    for layout, rows, topk in [([(0, 1)], 1, 1), ([(0, 1)], 1, 5), ([(0, 2)], 70, 1), ([(0, 2)], 3, 0)]:
        check(case(rows=rows, topk=topk, layout=layout))
    c = case(rows=5, layout=[(0, 3)])
    c.visible[:] = torch.tensor([0, 9, 5])  # more than there are
    check(c)
    none = case(layout=[(0, 2)])
    none = none._replace(q=none.q[:0], weight=none.weight[:0], visible=none.visible[:0], layout=[])
    assert [x.shape for x in found(none)] == [(0, 20)] * 2


def test_too_many_rows_wanted_of_too_many_are_left_to_the_definition(monkeypatch):
    monkeypatch.setattr(choosing, "MOST_KEPT", 10)
    monkeypatch.setattr(choosing, "MOST_ROWS", 100)
    monkeypatch.setattr(gpu, "launch", lambda *a, **o: pytest.fail("launched"))
    check(case(layout=[(0, 2)]))


def test_tensors_apart_and_at_any_address():
    c = case(rows=130, layout=[(0, 2), (2, 5)])
    T, H, C = c.q.shape
    q = torch.randn(T, H, 2 * C + 1, device=DEVICE)[:, :, 1 : 2 * C : 2]
    q.copy_(c.q)
    weight = torch.empty(H, T, device=DEVICE).t()
    weight.copy_(c.weight)
    visible = torch.empty(T, 3, dtype=torch.int64, device=DEVICE)[:, 1]
    visible.copy_(c.visible)
    keys = c.keys
    moved = []
    for plane in keys.planes:  # rows apart, and off by one
        wide = torch.zeros(plane.shape[0], plane.shape[1] + 3, dtype=plane.dtype, device=DEVICE)
        wide[:, 1 : 1 + plane.shape[1]] = plane
        moved.append(wide[:, 1 : 1 + plane.shape[1]])
    table = keys.table_BP.t().contiguous().t()
    apart = pages(tuple(moved), keys.row_format, table, keys.span_T, keys.num_rows)
    check(c._replace(q=q, keys=apart, weight=weight, visible=visible))
    twice = tuple(plane.repeat_interleave(2, dim=1)[:, ::2] for plane in keys.planes)  # channels apart
    check(c._replace(keys=pages(twice, keys.row_format, table, keys.span_T, keys.num_rows)))
    check(c._replace(visible=c.visible.int(), weight=c.weight.bfloat16()))


def test_wrong_shapes_are_told():
    c = case(rows=70, layout=[(0, 4)])
    keys = c.keys
    wrong = [
        c._replace(q=c.q[0]),
        c._replace(weight=c.weight[:, :-1]),
        c._replace(visible=c.visible[:-1]),
        c._replace(layout=[(0, 3)]),
        c._replace(q=c.q[:, :, :32].contiguous()),
        c._replace(keys=pages(keys.planes, keys.row_format, keys.table_BP, keys.span_T[:-1], 70)),
        c._replace(
            keys=pages((keys.planes[0], keys.planes[1][:, :1]), keys.row_format, keys.table_BP, keys.span_T, 70)
        ),
        c._replace(keys=Given(torch.zeros(2, 70, 64))),
        c._replace(keys=Given(torch.zeros(1, 70, 32))),
    ]
    for bad in wrong:
        with pytest.raises(RuntimeError, match=r"index_topk: .*(they are|it gave)"):
            found(bad)
    keys.num_rows = 200  # the table is of 70
    with pytest.raises(RuntimeError, match="a table of as many rows"):
        found(c)


def test_it_is_for_float32():
    c = case(layout=[(0, 2)])
    with kernels(index_topk):
        assert index_topk.chosen(c.q, c.keys) == "triton"
        with pytest.raises(KernelUnavailable, match="it is for float32"):
            index_topk.chosen(c.q.double(), c.keys)


def test_a_pool_of_more_than_two_gigabytes():
    row_format, C, N = index_rows("fp8", 64), 64, 70
    g = torch.Generator().manual_seed(1)
    places = (1 << 31) // (C // 2) + 4 * PAGE_ROWS  # so that the last rows begin behind 2^31 bytes
    planes = tuple(torch.empty(places, n, dtype=dtype, device=DEVICE) for dtype, n in row_format.planes(C))
    table = torch.tensor([[places // PAGE_ROWS - 1, places // PAGE_ROWS - 3]], device=DEVICE)
    row = torch.arange(N, device=DEVICE)
    place = table[0, row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS
    for plane, encoded in zip(planes, row_format.encode(coarse(g, N, C)), strict=True):
        plane[place] = encoded.to(DEVICE)
    q, weight = simulate_fp4(coarse(g, 2, 4, C)).to(DEVICE), coarse(g, 2, 4).to(DEVICE)
    keys = pages(planes, row_format, table, torch.zeros(2), N)
    check(Case(q, keys, weight, torch.tensor([70, 66], device=DEVICE), [(0, 2)], 8))


@pytest.mark.parametrize(
    ("T", "H", "C", "N"), [(1, 1, 1, 1), (5, 3, 20, 77), (3, 64, 128, 130), (0, 2, 8, 4), (2, 2, 8, 0)]
)
def test_scores_of_plain_keys(T, H, C, N):
    g = torch.Generator().manual_seed(2)
    q, keys, weight = (noise(g, *shape).to(DEVICE) for shape in ((T, H, C), (N, C), (T, H)))
    with kernels(index_scores):
        assert index_scores.chosen(q, keys, weight) == "triton"
        found = index_scores(q, keys, weight)
        assert found.shape == (T, N)
        assert rms(found, index_scores.definition(q, keys, weight)) < 1e-6
        if T > 1 and N > 1:
            assert same_bits(index_scores(q[1:2], keys, weight[1:2]), found[1:2])
            apart = keys.t().contiguous().t()
            assert same_bits(index_scores(q, apart, weight), found)
            with pytest.raises(RuntimeError, match="index_scores: queries"):
                index_scores(q, keys[:, :-1], weight)
