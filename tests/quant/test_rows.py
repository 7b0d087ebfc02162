"""Stored cache rows: byte sizes, layout, values, and that reading back changes nothing twice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pyrosome.errors import CacheInvariantBroken, CheckpointError
from pyrosome.quant import index_rows, kv_rows, simulate_fp4, simulate_fp8
from tests.quant.oracle import e2m1_value, e4m3_value

FORMATS = {
    "kv f32": (kv_rows("f32", 80, 16), 80),
    "kv bf16": (kv_rows("bf16", 80, 16), 80),
    "kv fp8": (kv_rows("fp8", 80, 16), 80),
    "kv fp8, two groups": (kv_rows("fp8", 160, 32), 160),
    "index f32": (index_rows("f32", 64), 64),
    "index bf16": (index_rows("bf16", 64), 64),
    "index fp8": (index_rows("fp8", 64), 64),
}
each_format = pytest.mark.parametrize(("row_format", "width"), FORMATS.values(), ids=FORMATS)


def rough(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-8, 8, shape, generator=draw).float())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def row_bytes(planes: tuple[tuple[torch.dtype, int], ...]) -> int:
    return sum(dtype.itemsize * count for dtype, count in planes)


@pytest.mark.parametrize(
    ("kv_format", "head_dim", "rope_dim", "num_bytes"),
    [
        ("fp8", 512, 64, 584),
        ("fp8", 80, 16, 104),
        ("fp8", 96, 32, 136),
        ("bf16", 512, 64, 1024),
        ("f32", 512, 64, 2048),
    ],
)
def test_bytes_of_a_kv_row(kv_format, head_dim, rope_dim, num_bytes):
    row_format = kv_rows(kv_format, head_dim, rope_dim)
    assert row_format.name == kv_format
    assert row_bytes(row_format.planes(head_dim)) == num_bytes
    assert sum(plane.nbytes for plane in row_format.encode(torch.zeros(head_dim))) == num_bytes


@pytest.mark.parametrize(
    ("kv_format", "dim", "num_bytes"), [("fp8", 128, 68), ("fp8", 32, 17), ("bf16", 128, 256), ("f32", 128, 512)]
)
def test_bytes_of_an_index_row(kv_format, dim, num_bytes):
    row_format = index_rows(kv_format, dim)
    assert row_format.name == kv_format
    assert row_bytes(row_format.planes(dim)) == num_bytes
    assert sum(plane.nbytes for plane in row_format.encode(torch.zeros(dim))) == num_bytes


def test_the_published_bytes_per_token():
    """Flash: 21 CSA layers (a KV and an index row per 4 tokens) and 20 HCA layers (a KV row per 128)."""
    for kv_format, per_token in (("fp8", 3514.25), ("bf16", 6880)):
        kv = row_bytes(kv_rows(kv_format, 512, 64).planes(512))
        index = row_bytes(index_rows(kv_format, 128).planes(128))
        assert 21 * (kv + index) / 4 + 20 * kv / 128 == per_token


def test_planes_are_what_the_layout_says():
    assert kv_rows("fp8", 512, 64).planes(512) == ((torch.uint8, 576), (torch.uint8, 8))
    assert index_rows("fp8", 128).planes(128) == ((torch.uint8, 64), (torch.uint8, 4))
    assert kv_rows("bf16", 512, 64).planes(512) == ((torch.bfloat16, 512),)


@each_format
def test_encode_fills_exactly_its_planes(row_format, width):
    planes = row_format.encode(rough(2, 3, width))
    assert tuple((p.dtype, p.shape[-1]) for p in planes) == row_format.planes(width)
    assert all(p.shape[:-1] == (2, 3) for p in planes)


class TestLayout:
    def test_kv_codes_then_rotated_channels_then_scales(self):
        """Decoded by hand, byte by byte, from the layout's own words."""
        head_dim, rope_dim = 512, 64
        row = rough(head_dim)
        data, scale = (plane.tolist() for plane in kv_rows("fp8", head_dim, rope_dim).encode(row))
        flat = [e4m3_value(data[c]) * 2.0 ** (scale[c // 64] - 127) for c in range(448)]
        assert flat == simulate_fp8(row[:448], 64).tolist()
        rotated = torch.tensor(data[448:], dtype=torch.uint8).view(torch.bfloat16)
        assert torch.equal(rotated, row[448:].to(torch.bfloat16))
        assert scale[7:] == [0]

    def test_index_codes_then_scales(self):
        row = rough(128)
        data, scale = (plane.tolist() for plane in index_rows("fp8", 128).encode(row))
        values = [v for byte in data for v in (e2m1_value(byte & 15), e2m1_value(byte >> 4))]
        assert [v * 2.0 ** (scale[c // 32] - 127) for c, v in enumerate(values)] == simulate_fp4(row).tolist()

    def test_a_power_of_two_is_stored_as_itself(self):
        row = torch.full((80,), 256.0)
        data, scale = kv_rows("fp8", 80, 16).encode(row)
        assert scale.tolist() == [127, 0, 0, 0, 0, 0, 0, 0]
        assert data[:64].tolist() == [0x78] * 64
        assert data[64:].tolist() == [0x80, 0x43] * 16


@each_format
class TestEveryFormat:
    def test_reads_back_what_the_simulation_says(self, row_format, width):
        rows = rough(5, width)
        expected = {
            "f32": lambda: rows,
            "bf16": lambda: rows.to(torch.bfloat16).float(),
            "fp8": lambda: simulate_fp4(rows) if width == 64 else kv_simulated(rows, width),
        }[row_format.name]()
        assert same_bits(row_format.decode(row_format.encode(rows)), expected)

    def test_round_trip_is_decode_of_encode(self, row_format, width):
        rows = rough(5, width)
        before = rows.clone()
        assert same_bits(row_format.round_trip(rows), row_format.decode(row_format.encode(rows)))
        assert same_bits(rows, before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_round_trip_keeps_the_dtype(self, row_format, width, dtype):
        rows = rough(5, width).to(dtype)
        assert same_bits(row_format.round_trip(rows), row_format.round_trip(rows.float()).to(dtype))

    def test_the_gradient_passes_straight_through(self, row_format, width):
        rows = rough(5, width).requires_grad_()
        weight = rough(5, width, seed=1)
        (row_format.round_trip(rows) * weight).sum().backward()
        assert torch.equal(rows.grad, weight)

    def test_encode_and_decode_are_outside_the_graph(self, row_format, width):
        planes = row_format.encode(rough(5, width).requires_grad_())
        assert not any(plane.requires_grad for plane in planes)
        assert not row_format.decode(planes).requires_grad

    def test_rows_do_not_depend_on_their_company(self, row_format, width):
        rows = rough(2, 3, width)
        alone = torch.stack([torch.stack([row_format.round_trip(row) for row in block]) for block in rows])
        assert same_bits(row_format.round_trip(rows), alone)

    def test_no_rows(self, row_format, width):
        planes = row_format.encode(torch.empty(0, 4, width))
        assert row_format.decode(planes).shape == (0, 4, width)

    def test_reads_rows_gathered_from_larger_planes(self, row_format, width):
        rows = rough(6, width)
        pools = [torch.zeros(2, 9, n, dtype=dtype) for dtype, n in row_format.planes(width)]
        for pool, plane in zip(pools, row_format.encode(rows), strict=True):
            pool[1, 2:8] = plane
        found = row_format.decode(tuple(pool[:, 2:8] for pool in pools))  # strided views
        assert same_bits(found[1], row_format.round_trip(rows))
        assert same_bits(
            row_format.decode(tuple(pool[1, [7, 2]] for pool in pools)), row_format.round_trip(rows)[[5, 0]]
        )

    def test_strided_rows_are_stored_alike(self, row_format, width):
        rows = rough(width, 3).t()
        assert same_bits(row_format.round_trip(rows), row_format.round_trip(rows.contiguous()))

    def test_a_fault_shows(self, row_format, width):
        rows = rough(2, width)
        rows[1, 3] = math.nan
        found = row_format.round_trip(rows)
        assert found[1, 3].isnan()
        assert not found[0].isnan().any()

    @pytest.mark.parametrize("fill", [255, 0])
    def test_poison_reads_as_nan_and_zeros_as_zero(self, row_format, width, fill):
        planes = [torch.full((2, n * dtype.itemsize), fill, dtype=torch.uint8) for dtype, n in row_format.planes(width)]
        found = row_format.decode(
            tuple(p.view(dtype) for p, (dtype, _) in zip(planes, row_format.planes(width), strict=True))
        )
        assert found.isnan().all() if fill else (found == 0).all()


def kv_simulated(rows: Tensor, width: int) -> Tensor:
    rope = {80: 16, 160: 32}[width]
    rotated = rows[:, width - rope :].to(torch.bfloat16).float()
    return torch.cat([simulate_fp8(rows[:, : width - rope], 64), rotated], dim=-1)


WIDE = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
NEAR = st.floats(width=32, min_value=-8, max_value=8)


@pytest.mark.parametrize(("row_format", "width"), FORMATS.values(), ids=FORMATS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_read_back_and_stored_again_reads_the_same(row_format, width, data):
    """Idempotence: copying, forking and restoring a row changes no value."""
    elements = data.draw(st.sampled_from([WIDE, NEAR]))
    row = torch.from_numpy(data.draw(arrays("float32", width, elements=elements)))
    once = row_format.round_trip(row)
    assert same_bits(row_format.round_trip(once), once)


def test_every_stored_kv_group_reads_the_same_after_storing_it_again():
    """Exhaustive over codes: beside each largest code, every finite code of no greater magnitude."""
    row_format = kv_rows("fp8", 64, 0)
    finite = [c for c in range(256) if c & 127 != 127]
    groups = torch.zeros(127, 5, 64, dtype=torch.uint8)
    groups[..., :63] = torch.tensor(finite + [0] * (5 * 63 - len(finite)), dtype=torch.uint8).view(5, 63)
    groups[..., 63] = torch.arange(127, dtype=torch.uint8)[:, None]
    groups = torch.where(groups & 127 > groups[..., 63:], 0, groups)
    scales = torch.zeros(127, 5, 8, dtype=torch.uint8)
    for scale in (105, 106, 127, 200):  # 105 is the floor's
        scales[..., 0] = scale
        once = row_format.decode((groups, scales))
        assert same_bits(row_format.round_trip(once), once)


def test_every_stored_index_group_reads_the_same_after_storing_it_again():
    """Exhaustive over pairs of e2m1 codes in one group, and over scales."""
    row_format = index_rows("fp8", 32)
    data = torch.zeros(254, 256, 16, dtype=torch.uint8)
    data[..., 3] = torch.arange(256, dtype=torch.uint8)
    scales = torch.arange(1, 255, dtype=torch.uint8)[:, None, None].expand(254, 256, 1)
    once = row_format.decode((data, scales))
    finite = once.isfinite().all(-1)  # 4 and 6 under the two largest scales are beyond float32
    assert finite[:252].all()
    assert same_bits(row_format.round_trip(once)[finite], once[finite])


class TestRefusals:
    @pytest.mark.parametrize(("head_dim", "rope_dim", "nope"), [(100, 16, 84), (64, 16, 48)])
    def test_kv_shapes_that_fp8_rows_cannot_hold(self, head_dim, rope_dim, nope):
        with pytest.raises(CheckpointError, match=rf"{nope} unrotated channels.*groups of 64.*'f32' or 'bf16'"):
            kv_rows("fp8", head_dim, rope_dim)
        for kv_format in ("f32", "bf16"):
            rows = torch.ones(2, head_dim)
            assert same_bits(kv_rows(kv_format, head_dim, rope_dim).round_trip(rows), rows)

    @pytest.mark.parametrize("dim", [16, 48])
    def test_index_shapes_that_fp4_rows_cannot_hold(self, dim):
        with pytest.raises(CheckpointError, match=rf"{dim} index channels.*groups of 32.*'f32' or 'bf16'"):
            index_rows("fp8", dim)
        assert index_rows("bf16", dim).planes(dim) == ((torch.bfloat16, dim),)

    def test_formats_nobody_knows(self):
        with pytest.raises(CheckpointError, match="'fp16' is unknown; it is one of f32, bf16, fp8"):
            kv_rows("fp16", 512, 64)
        with pytest.raises(CheckpointError, match="'int8' is unknown"):
            index_rows("int8", 128)

    def test_planes_of_another_width(self):
        with pytest.raises(CacheInvariantBroken, match=r"a 512-channel row.*80 channels"):
            kv_rows("fp8", 80, 16).planes(512)
        with pytest.raises(CacheInvariantBroken, match=r"a 128-channel row.*64 channels"):
            index_rows("fp8", 64).planes(128)
