"""Rows stored by Triton: the definition's bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyrosome.errors import CacheInvariantBroken
from pyrosome.ops.store import as_stored, store_rows
from pyrosome.quant.rows import FloatRows, FP4IndexRows, FP8KVRows
from tests.ops.gpu.held import DEVICE, kernels
from tests.ops.gpu.watched import meeting

FORMATS = {
    "f32": (FloatRows("f32", torch.float32), 40),
    "bf16": (FloatRows("bf16", torch.bfloat16), 37),
    "f16": (FloatRows("f16", torch.float16), 24),  # not one of the kernels': by the definition
    "fp8": (FP8KVRows(448, 64), 512),
    "fp8, two groups": (FP8KVRows(128, 6), 134),
    "fp8, ten groups": (FP8KVRows(640, 8), 648),
    "fp8, not turned": (FP8KVRows(64, 0), 64),
    "fp8, all turned": (FP8KVRows(0, 10), 10),
    "fp4": (FP4IndexRows(128), 128),
    "fp4, one group": (FP4IndexRows(32), 32),
    "fp4, three groups": (FP4IndexRows(96), 96),
}
each_format = pytest.mark.parametrize("name", FORMATS)


def rows_of(M, C, seed=0):
    """Rows of many sizes, with zeros, ties, subnormals and the largest numbers among them."""
    rows = torch.randn(M, C, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-8, 6, M)[:, None]
    if M > 4:
        rows[1] = 0
        rows[2] = torch.arange(C) * 0.25 - C * 0.125  # ties of every format
        rows[3, : C // 2] *= -1e-37
        rows[4, -1] = 3e38
    return rows


def empty_planes(row_format, C, places):
    return tuple(torch.zeros(places, n, dtype=dtype, device=DEVICE) for dtype, n in row_format.planes(C))


def store(rows, planes, row_format, place):
    with kernels(store_rows):
        assert store_rows.chosen(rows.to(DEVICE), planes) == "triton"
        store_rows(rows.to(DEVICE), planes, row_format, place.to(DEVICE))


def held(planes):
    """Bytes of planes, on the CPU."""
    return [p.cpu().contiguous().view(torch.uint8) for p in planes]


def same(found, wanted):
    return all(torch.equal(x, y) for x, y in zip(held(found), held(wanted), strict=True))


@each_format
@pytest.mark.parametrize("M", [0, 1, 9])
def test_the_bytes_are_the_definitions(name, M):
    row_format, C = FORMATS[name]
    rows, place = rows_of(M, C), (torch.arange(M) * 5 + 3) % 11
    ours = empty_planes(row_format, C, 11)
    for plane in ours:
        plane.view(torch.uint8).fill_(0xA5)  # what is not written stays
    theirs = tuple(p.cpu().clone() for p in ours)
    store(rows, ours, row_format, place)
    store_rows.definition(rows, theirs, row_format, place)
    assert same(ours, theirs)


@pytest.mark.parametrize(
    ("name", "group", "most", "least"), [("fp8", 64, 448.0, 1e-4), ("fp4", 32, 6.0, 6 * 2.0**-126)]
)
def test_scales_at_every_power_of_two_and_beside_it(name, group, most, least):
    row_format, C = FORMATS[name]
    powers = torch.cat([most * torch.exp2(torch.arange(-126.0, 120.0)), torch.tensor([least])])
    tops = torch.cat([powers, powers.nextafter(powers * 2), powers.nextafter(powers * 0)])
    tops = torch.nn.functional.pad(tops, (0, -len(tops) % (C // group)))
    rows = torch.zeros(len(tops) // (C // group), C)
    held_channels = rows[:, : C // group * group].view(len(rows), -1, group)
    held_channels[..., 5] = -tops[: len(rows) * held_channels.shape[1]].view(len(rows), -1)
    planes = empty_planes(row_format, C, len(rows))
    store(rows, planes, row_format, torch.arange(len(rows)))
    assert same(planes, row_format.encode(rows))


@each_format
@pytest.mark.parametrize("shape", [(0,), (1,), (9,), (2, 3)])
def test_rows_as_they_are_read_back_are_the_definitions(name, shape):
    row_format, C = FORMATS[name]
    rows = rows_of(9, C)[: max(1, torch.Size(shape).numel())][: torch.Size(shape).numel()].view(*shape, C)
    with kernels(as_stored):
        assert as_stored.chosen(rows.to(DEVICE)) == "triton"
        found = as_stored(rows.to(DEVICE), row_format).cpu()
    wanted = as_stored.definition(rows, row_format)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(found.view(torch.int32), wanted.contiguous().view(torch.int32))


@each_format
def test_what_is_stored_is_what_is_read_back(name):
    row_format, C = FORMATS[name]
    rows, planes = rows_of(9, C), empty_planes(row_format, C, 9)
    store(rows, planes, row_format, torch.arange(9))
    with kernels(as_stored):
        assert torch.equal(
            row_format.decode(tuple(p.cpu() for p in planes)), as_stored(rows.to(DEVICE), row_format).cpu()
        )


@each_format
def test_nan_and_infinity_reach_whoever_reads(name):
    row_format, C = FORMATS[name]
    rows, planes = rows_of(3, C), empty_planes(row_format, C, 3)
    rows[0, 1], rows[1, C - 1], rows[2, 0] = float("nan"), float("nan"), float("inf")
    store(rows, planes, row_format, torch.arange(3))
    wanted = as_stored.definition(rows, row_format)
    with kernels(as_stored):
        back = as_stored(rows.to(DEVICE), row_format).cpu()
    for found in (row_format.decode(tuple(p.cpu() for p in planes)), back):
        assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().any()
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@each_format
def test_planes_in_a_larger_pool_and_rows_that_lie_apart(name):
    row_format, C = FORMATS[name]
    rows = rows_of(18, 2 * C)[::2, 1::2]
    pool = [torch.zeros(22, n + 3, dtype=dtype, device=DEVICE) for dtype, n in row_format.planes(C)]
    ours = tuple(p[1::2, 1 : 1 + n] for p, (_, n) in zip(pool, row_format.planes(C), strict=True))
    place = torch.stack([torch.arange(9).flip(0), torch.zeros(9, dtype=torch.int64)], dim=1)[:, 0]
    store(rows, ours, row_format, place)
    theirs = tuple(torch.zeros(p.shape, dtype=p.dtype) for p in ours)
    store_rows.definition(rows.contiguous(), theirs, row_format, place)
    assert same(ours, theirs)
    assert all(int((p.view(torch.uint8) != 0).sum()) == int((o.contiguous().view(torch.uint8) != 0).sum())
               for p, o in zip(pool, ours, strict=True)), "something was written beside the planes"  # fmt: skip
    # Elements that lie apart are the definition's to write.
    sparse = tuple(torch.zeros(9, 2 * n, dtype=dtype, device=DEVICE)[:, ::2] for dtype, n in row_format.planes(C))
    store(rows.contiguous(), sparse, row_format, place)
    assert same(sparse, [t[:9] for t in theirs])


@pytest.mark.parametrize("name", ["f32", "bf16", "fp8", "fp4"])
def test_a_place_that_several_rows_share_holds_one_of_them_and_places_outside_hold_none(name):
    row_format, C = FORMATS[name]
    rows, planes = rows_of(6, C, seed=1), empty_planes(row_format, C, 4)
    rows[:] = rows[5]
    with meeting("_store_floats", "_store_fp8", "_store_fp4"):
        store(rows, planes, row_format, torch.tensor([2, 2, 2, -1, 4, 1 << 40]))
    wanted = row_format.encode(rows[:1])
    for plane, encoded in zip(planes, wanted, strict=True):
        assert same([plane[2:3]], [encoded])
        assert not plane[[0, 1, 3]].any()


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp4"])
def test_places_beyond_two_thousand_million_bytes(name):
    row_format, C = FORMATS[name]
    kinds = row_format.planes(C)
    if name == "bf16":  # a pool of wide rows, of which the planes are the first elements
        last = (1 << 31) // 4096 + 1
        planes = (torch.empty(last + 1, 4096, dtype=torch.bfloat16, device=DEVICE)[:, :C],)
    else:
        last = (1 << 31) // kinds[0][1] + 1
        planes = tuple(torch.empty(last + 1, n, dtype=dtype, device=DEVICE) for dtype, n in kinds)
    rows = rows_of(6, C)[5:]
    store(rows, planes, row_format, torch.tensor([last]))
    assert same([p[last:] for p in planes], row_format.encode(rows))


def test_what_does_not_fit_is_refused():
    row_format, C = FORMATS["fp8"]
    rows, place, (data, scale) = rows_of(3, C), torch.arange(3), empty_planes(row_format, C, 5)
    wrong = [
        (rows, (data, scale), place[:2]),
        (rows, (data[:, :-1], scale), place),
        (rows, (data, scale[:4]), place),
        (rows, (data,), place),
        (rows, (data.view(torch.int8), scale), place),
        (rows, (data.view(5, 1, -1), scale), place),
    ]
    for r, planes, p in wrong:
        with pytest.raises(RuntimeError, match="go to places"):
            store(r, planes, row_format, p)
    for op in (
        lambda: store(rows[:, :-1], (data, scale), row_format, place),
        lambda: as_stored(rows[:, :-1], row_format),
    ):
        with kernels(as_stored), pytest.raises(CacheInvariantBroken, match="channels"):
            op()
    assert not data.any() and not scale.any()


def test_a_format_of_somebody_elses_is_stored_by_the_definition():
    @dataclasses.dataclass(frozen=True)
    class Negated:
        name: str = "negated"

        def planes(self, width):
            return ((torch.float32, width),)

        def encode(self, rows):
            return (-rows,)

        def decode(self, planes):
            return -planes[0]

        def round_trip(self, rows):
            return rows + 1

    rows, planes = rows_of(2, 6), (torch.zeros(3, 6, device=DEVICE),)
    store(rows, planes, Negated(), torch.tensor([2, 0]))
    assert torch.equal(planes[0].cpu()[[2, 0]], -rows)
    with kernels(as_stored):
        assert torch.equal(as_stored(rows.to(DEVICE), Negated()).cpu(), rows + 1)
