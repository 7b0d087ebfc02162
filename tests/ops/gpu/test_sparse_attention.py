"""Attention by Triton equals its definition over rows of every kind, and a token's bits are those of it alone.

Shape letters: T tokens, H heads, C head dim, K rows per token.
"""

from __future__ import annotations

import pytest
import torch

import pyrosome.ops.sparse_attention.triton as module
from pyrosome.cache.views import PagedRows, WindowRows
from pyrosome.model.step import Span, Step
from pyrosome.ops import gpu
from pyrosome.ops.rope import rotation
from pyrosome.ops.rows import UnitedRows
from pyrosome.ops.sparse_attention import attention, finish_attention, sparse_attention
from pyrosome.quant.rows import FloatRows, FP8KVRows
from tests.ops.gpu.held import CAPABILITIES, DEVICE, kernels, rms, same_bits

H, C, ROPE, RING, SLOTS = 3, 96, 32, 40, 4
FORMATS = {
    "fp8": FP8KVRows(C - ROPE, ROPE),
    "bf16": FloatRows("bf16", torch.bfloat16),
    "f32": FloatRows("f32", torch.float32),
}
# The softmax's weights are rounded after the maximum of another number of keys than the definition's.
TOLERANCE = {"fp8": 3e-3, "bf16": 3e-3, "f32": 2e-6}
# Spans are (slot, first position, tokens).
SPANS = {"a beginning": [(1, 0, 3)], "going on": [(2, 301, 3)], "several": [(1, 0, 2), (3, 300, 1), (2, 77, 1)]}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after the other."""
    monkeypatch.setattr(module, "SPREAD", 4)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def example(spans=SPANS["several"], row_format=FORMATS["fp8"], heads=H, width=C, ratio=4, chosen=0, seed=0):
    """Of `attention` as a layer gives them: the window of each token, and all rows of a ratio, or some few of them."""
    rope = min(ROPE, width)
    step = Step.of([Span(slot, start, [1] * count) for slot, start, count in spans], device=DEVICE)
    T = step.ids_T.shape[0]
    ring = tuple(x.unflatten(0, (SLOTS, RING)) for x in row_format.encode(noise(SLOTS * RING, width, seed=seed + 4)))
    window = WindowRows(ring, row_format, step.slot_B, row_format.round_trip(noise(T, width, seed=seed + 5)))
    num_pages = -(-step.num_rows(ratio) // 64) + 1
    table = torch.arange(len(spans) * num_pages).view(len(spans), num_pages).flip(1).to(DEVICE) + 1
    size = 2.0 ** -(torch.arange(width, device=DEVICE) // 64 % 5)  # each group of channels has a scale of its own
    planes = tuple(row_format.encode(noise((table.numel() + 1) * 64, width, seed=seed + 3) * size))
    pages = PagedRows(planes, row_format, table, step, ratio)
    far = step.all_rows(ratio)
    if chosen:  # another choice for each token, in any order, with holes
        far = far[:, torch.randperm(far.shape[1], generator=torch.Generator().manual_seed(1)).to(DEVICE)][:, :chosen]
    turn = rotation.definition(noise(rope // 2), step.position_T.clamp(min=0))
    parts = [(window, step.window_index(RING - 8, RING)), (pages, far)]
    return noise(T, heads, width, seed=seed), parts, noise(heads, seed=seed + 7), turn


def cut(args, low, high):
    """Tokens low .. high by themselves."""
    q, parts, sink, turn = args
    kept = []
    for source, index in parts:
        if isinstance(source, PagedRows):
            alone = PagedRows.__new__(PagedRows)
            vars(alone).update(vars(source), span_T=source.span_T[low:high])
            source = alone
        kept.append((source, index[low:high]))
    return q[low:high], kept, sink, turn[low:high]


def held_to_definition(args, tolerance):
    with kernels(attention):
        assert attention.chosen(*args) == "triton"
        found = attention(*args)
    wanted = attention.definition(*args)
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    assert rms(found, wanted) < tolerance
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", FORMATS)
def test_window_and_pages(name, capability, monkeypatch):
    if capability == 80:  # queries that a program keeps
        monkeypatch.setattr(module, "PROGRAMS", 0)
    args = example([(3, 300, 2), (2, 77, 1)], FORMATS[name])
    with kernels(attention, capability):
        found = attention(*args)
    assert rms(found, attention.definition(*args)) < TOLERANCE[name]
    if name != "f32":
        assert torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize(("ratio", "chosen"), [(4, 11), (128, 0)])
def test_spans_and_choices(spans, ratio, chosen):
    held_to_definition(example(SPANS[spans], ratio=ratio, chosen=chosen), TOLERANCE["fp8"])


@pytest.mark.parametrize("programs", [0, 1 << 20])
@pytest.mark.parametrize(
    ("heads", "row_format"),
    [
        (1, FORMATS["fp8"]), (17, FP8KVRows(0, 32)), (70, FORMATS["fp8"]), (2, FP8KVRows(128, 64)),
        (1, FP8KVRows(192, 64)), (1, FP8KVRows(576, 32)), (2, FORMATS["bf16"]),
    ],
)  # fmt: skip
def test_heads_and_widths(heads, row_format, programs, monkeypatch):
    """Chunks of codes, of bfloat16 and in part of either are grouped in every way; rows have a second eight scales."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    width = row_format.nope + row_format.rope if isinstance(row_format, FP8KVRows) else 160
    if width == 32:
        row_format = FORMATS["bf16"]
    held_to_definition(example([(1, 50, 1)], row_format, heads, width, ratio=4), TOLERANCE["fp8"])


def test_true_widths():
    row_format = FP8KVRows(448, 64)
    held_to_definition(example([(1, 300, 1)], row_format, 64, 512, ratio=4), TOLERANCE["fp8"])


@pytest.mark.parametrize("name", FORMATS)
def test_one_part_and_parts_of_nothing(name):
    q, parts, sink, turn = example([(2, 301, 2)], FORMATS[name])
    for some in (
        parts[:1],
        parts[1:],
        [(s, i[:, :0]) for s, i in parts],
        [parts[0], (parts[1][0], parts[1][1][:, :0])],
        parts[::-1],
    ):
        held_to_definition((q, some, sink, turn), TOLERANCE[name])


def test_no_tokens():
    q, parts, sink, turn = cut(example(), 0, 0)
    with kernels(attention):
        assert attention(q, parts, sink, turn).shape == (0, H, C)


@pytest.mark.parametrize("kinds", [("fp8", "bf16"), ("fp8", "f32"), ("bf16", ""), ("fp8", "")])
def test_parts_of_different_kinds(kinds):
    """A source without storage gives floats; over narrow rows beside others only the former's queries are rounded."""
    spans = [(2, 101, 2)]
    (q, parts, sink, turn), other = example(spans), example(spans, FORMATS[kinds[1] or "fp8"])
    if kinds[0] != "fp8":
        parts = example(spans, FORMATS[kinds[0]])[1]
    far = other[1][1]
    if not kinds[1]:
        far = (Decoded(far[0]), far[1])
    held_to_definition((q, [parts[0], far], sink, turn), 3e-3)


class Decoded:
    """Rows of another source, which nobody reads in place."""

    def __init__(self, source):
        self.source, self.format, self.num_rows = source, source.format, source.num_rows

    def read(self, index_TK):
        return self.source.read(index_TK)


def test_three_parts():
    q, parts, sink, turn = example([(2, 301, 2)])
    found = held_to_definition((q, [*parts, parts[0]], sink, turn), TOLERANCE["fp8"])
    assert torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("name", ["fp8", "f32"])
def test_the_mergeable_form(name):
    q, parts, sink, turn = example([(2, 101, 2)], FORMATS[name])
    held = []
    for source, index in parts:
        with kernels(sparse_attention):
            assert sparse_attention.chosen(q, source, index) == "triton"
            o, lse = sparse_attention(q, source, index)
        wanted_o, wanted_lse = sparse_attention.definition(q, source, index)
        assert rms(o, wanted_o) < TOLERANCE[name]
        assert torch.equal(lse.isinf(), wanted_lse.isinf())
        assert torch.allclose(lse, wanted_lse, atol=1e-5, rtol=1e-5)
        held.append((o, lse))
    with kernels(finish_attention):
        for some in (held[:1], held, [*held, held[0]], held[::-1]):
            assert finish_attention.chosen(sink, turn, some) == "triton"
            found = finish_attention(sink, turn, some)
            assert rms(found, finish_attention.definition(sink, turn, some)) < 1e-6


def test_no_tokens_and_no_keys_in_the_mergeable_form():
    q, ((source, index), _), sink, turn = example([(2, 301, 2)])
    with kernels(sparse_attention):
        for some in (index[:, :0], torch.full_like(index, -1)):
            o, lse = sparse_attention(q, source, some)
            assert not o.any()
            assert (lse == float("-inf")).all()
        assert sparse_attention(q[:0], source, index[:0])[0].shape == (0, H, C)
    with kernels(finish_attention):
        assert not finish_attention(sink, turn, [(o, lse)] * 2).any()
        assert finish_attention(sink, turn[:0], [(o[:0], lse[:0])]).shape == (0, H, C)


@pytest.mark.parametrize("gap", [50.0, 1e4, 1e30])
def test_parts_far_apart_do_not_overflow(gap):
    ones, sink, turn = torch.ones(1, 1, 2, device=DEVICE), torch.full((1,), -1e35, device=DEVICE), torch.ones(1, 1)
    near, far = torch.tensor([[gap]], device=DEVICE), torch.tensor([[-gap]], device=DEVICE)
    with kernels(finish_attention):
        for parts in ([(ones, near), (-ones, far)], [(-ones, far), (ones, near)]):
            assert torch.equal(finish_attention(sink, turn.to(DEVICE, torch.complex64), parts), ones)


FORMS = {
    "whole": {"PROGRAMS": 0, "SEGMENT": 16},
    "leaves of a whole": {"PROGRAMS": 1 << 20, "SEGMENT": 16},
    "runs": {"PROGRAMS": 0, "SEGMENT": 2},
    "leaves of runs": {"PROGRAMS": 1 << 20, "SEGMENT": 2, "SPREAD": 1},
    "chunks of leaves": {"PROGRAMS": 1 << 20, "SEGMENT": 2, "SPREAD": 1 << 20},
    "a few tokens at once": {"PROGRAMS": 0, "SEGMENT": 2, "WORKSPACE_BYTES": 1 << 17},
}


@pytest.mark.parametrize("name", ["fp8", "f32"])
def test_a_token_has_the_same_bits_in_every_form_and_company(name, monkeypatch):
    """Leaves that are programs, runs, several workspaces: of one number of leaves to a run all are the same."""
    args = example([(1, 500 if name == "fp8" else 120, 1), (2, 40, 1)], FORMATS[name], heads=2)
    found = {}
    for form, sizes in FORMS.items():
        for size, value in sizes.items():
            monkeypatch.setattr(module, size, value)
        with kernels(attention):
            found[form] = attention(*args)
            if form in ("leaves of runs", "runs"):
                for t in range(2):
                    assert same_bits(attention(*cut(args, t, t + 1)), found[form][t : t + 1])
        monkeypatch.undo()
    assert rms(found["whole"], attention.definition(*args)) < TOLERANCE[name]
    assert same_bits(found["leaves of a whole"], found["whole"])
    assert rms(found["runs"], found["whole"]) < 1e-6  # runs of 2 leaves join otherwise than runs of 16
    for form in ("leaves of runs", "chunks of leaves", "a few tokens at once"):
        assert same_bits(found[form], found["runs"])


@pytest.mark.parametrize("variant", module.VARIANTS)
def test_every_variant_is_the_same(variant, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 0)
    args = example([(1, 100, 2)], FP8KVRows(128, 64), width=192)
    with kernels(attention):
        taken = attention(*args)
        with gpu.forced(weigh=variant, gather=variant):
            assert same_bits(attention(*args), taken)


@pytest.mark.parametrize("programs", [0, 1 << 20])
def test_an_index_past_all_rows_shows(programs, monkeypatch):
    """Its token is no number, others are what they were, and no memory is read for it; any number below 0 is no row."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    q, ((window, near), (pages, far)), sink, turn = example([(2, 301, 5)])
    wrong_near, wrong_far = near.clone(), torch.where(far < 0, -(1 << 40), far)
    wrong_near[0, 5], wrong_near[4, 7] = window.num_rows, 1 << 40
    wrong_far[2, 3] = 64 * pages.table_BP.shape[1]
    with kernels(attention):
        right = attention(q, [(window, near), (pages, far)], sink, turn)
        found = attention(q, [(window, wrong_near), (pages, wrong_far)], sink, turn)
    assert found[[0, 2, 4]].isnan().all()
    assert same_bits(found[[1, 3]], right[[1, 3]])
    values = noise(4, C)
    index = torch.tensor([[0, 1], [5, 1]], device=DEVICE)
    with kernels(sparse_attention):
        o, lse = sparse_attention(q[:2], OutOfReach(values), index)
    assert o.isnan().flatten(1).all(1).tolist() == lse.isnan().all(1).tolist() == [False, True]


class OutOfReach:
    """Rows that nobody reads in place, with an index that is past them."""

    format, num_rows = "f32", 4

    def __init__(self, values):
        self.values = values

    def read(self, index_TK):
        return self.values, index_TK


@pytest.mark.parametrize("programs", [0, 1 << 20])
def test_leaves_without_a_key_change_no_bit(programs, monkeypatch):
    """Past the last one, as where fewer rows are seen than may be, and between others."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    q, parts, sink, turn = example([(1, 500, 2)])
    (window, near), (pages, far) = parts
    hole = torch.full((2, 64), -1, device=DEVICE)
    with kernels(attention):
        taken = attention(q, [(window, near), (pages, far[:, :64])], sink, turn)
        behind = attention(q, [(window, near), (pages, torch.cat([far[:, :64], hole, hole], 1))], sink, turn)
        between = attention(q, [(window, near), (pages, torch.cat([hole, hole, far[:, :64]], 1))], sink, turn)
    assert same_bits(behind, taken)
    assert same_bits(between, taken)


def test_index_0_of_a_window_is_a_row_of_zeros():
    values = noise(4, C)
    source = UnitedRows(values.new_zeros(1, 0, C), values)
    q, index = noise(2, H, C), torch.tensor([[0, 1, -1], [-1, 0, 4]], device=DEVICE)
    with kernels(sparse_attention):
        found = sparse_attention(q, source, index)
        wanted = sparse_attention.definition(q, source, index)
        assert all(rms(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True))
    q, parts, sink, turn = example([(2, 301, 2)])
    parts[0][1][:, 3] = 0
    held_to_definition((q, parts, sink, turn), TOLERANCE["fp8"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("programs", [0, 1 << 20])
def test_a_row_that_is_not_finite_reaches_those_who_see_it_and_no_other(value, programs, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    args = example([(2, 301, 4)])
    args[1][0][0].fresh_TC[2] = value
    with kernels(attention):
        found = attention(*args)
    assert (~found.isfinite().all(-1).all(-1)).tolist() == [False, False, True, True]


def test_a_scale_that_is_no_number_shows():
    args = example([(2, 301, 2)])
    pages, far = args[1][1]
    place = pages.table_BP[0, far[0, 5] // 64] * 64 + far[0, 5] % 64
    pages.planes[-1][place] = 255
    with kernels(attention):
        assert attention(*args).isnan().any(-1).all()


@pytest.mark.parametrize("size", [1e-20, 300.0, 1e4])
def test_huge_and_tiny_scores(size):
    q, parts, sink, turn = example([(2, 301, 2)], FORMATS["f32"])
    held_to_definition((q * size, parts, sink, turn), 2e-4 if size > 1 else 2e-6)


def test_places_past_two_billion_bytes():
    """A pool whose last rows lie past 2^31 bytes; only what is read is ever written."""
    row_format, width = FP8KVRows(448, 64), 512
    pages_of_pool = (1 << 31) // (64 * 576) + 3
    step = Step.of([Span(1, 70, [1])], device=DEVICE)
    pool = (
        torch.empty(pages_of_pool * 64, 576, dtype=torch.uint8, device=DEVICE),
        torch.empty(pages_of_pool * 64, 8, dtype=torch.uint8, device=DEVICE),
    )
    table, small = torch.tensor([[pages_of_pool - 1]], device=DEVICE), noise(64, width)
    for plane, rows in zip(pool, row_format.encode(small), strict=True):
        plane[-64:] = rows
    q, index = noise(1, 2, width), torch.arange(9, device=DEVICE)[None]
    far = PagedRows(pool, row_format, table, step, 4)
    near = PagedRows(row_format.encode(small), row_format, table * 0, step, 4)
    with kernels(sparse_attention):
        for found, wanted in zip(sparse_attention(q, far, index), sparse_attention(q, near, index), strict=True):
            assert same_bits(found, wanted)
        assert rms(found, sparse_attention.definition(q, near, index)[1]) < 1e-5


def test_memory_that_is_not_in_order_or_not_aligned():
    q, parts, sink, turn = example([(2, 301, 2)])
    (window, near), (pages, far) = parts
    wanted = attention.definition(q, parts, sink, turn)
    apart = PagedRows.__new__(PagedRows)
    vars(apart).update(vars(pages), planes=tuple(p.repeat_interleave(2, 1)[:, ::2] for p in pages.planes))
    moved = PagedRows.__new__(PagedRows)
    planes = tuple(torch.cat([p.flatten()[:1], p.flatten()])[1:].view(p.shape) for p in pages.planes)
    vars(moved).update(vars(pages), planes=planes)
    turned = torch.stack([turn, turn], 1).conj().resolve_conj()[:, 0].conj()
    with kernels(attention):
        for source in (apart, moved):
            for table in (pages.table_BP, pages.table_BP.int()):
                source.table_BP = table if source is moved else pages.table_BP
                args = (
                    q.repeat_interleave(2, 2)[..., ::2],
                    [(window, near.T.contiguous().T), (source, far)],
                    sink,
                    turned,
                )
                assert rms(attention(*args), wanted) < TOLERANCE["fp8"]
        small = [(window, near.int()), (pages, far.int())]
        assert rms(attention(q, small, sink, turn), wanted) < TOLERANCE["fp8"]


def test_wrong_shapes_are_told():
    q, parts, sink, turn = example([(2, 301, 2)])
    (window, near), far = parts
    wrong = [
        (q[..., :64], parts, sink, turn), (q, [(window, near[:1]), far], sink, turn), (q, parts, sink[:1], turn),
        (q, parts, sink, turn[:1]), (q, [], sink, turn), (q[0], parts, sink, turn),
        (q, parts, sink, torch.cat([turn] * 4, 1)),
    ]  # fmt: skip
    with kernels(attention):
        for args in wrong:
            with pytest.raises(RuntimeError, match="attention"):
                attention(*args)
    with kernels(finish_attention), pytest.raises(RuntimeError, match="one shape"):
        finish_attention(sink, turn, [(q, q[..., 0]), (q[:1], q[:1, :, 0])])
