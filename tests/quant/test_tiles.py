"""Weights in tiles: the same bytes whoever lays them, the way back, and what a tiled weight can do."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.errors import CheckpointError, WrongShape
from pyrosome.ops import native, toolchain
from pyrosome.ops.linear import linear
from pyrosome.quant import QuantTensor
from pyrosome.quant.tiles import TILE, TiledWeight, tile, tiled_bytes, untile
from tests.checkpoint.files import SHARD, copied, read_entries, rewrite
from tests.quant.test_formats import random_stored

KINDS = ["fp4", "fp8"]
# Whole tiles and groups; part of a strip, tile, group or word; and inputs enough that scales go through registers too.
SHAPES = [(64, 128), (1, 2), (3, 10), (16, 64), (17, 34), (33, 96), (48, 64), (65, 130), (100, 1000), (192, 256),
          (64, 4096), (83, 2210), (3, 130, 200), (2, 3, 20, 32)]  # fmt: skip
PARTS = [(2, 128, 64), (3, 132, 160), (4, 260, 34), (8, 1024, 128)]  # parts, rows, inputs: parts share blocks of scales

each_kind = pytest.mark.parametrize("kind", KINDS)
needs_a_library = pytest.mark.skipif(not native.available(), reason="there is no native library here")


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same(a: QuantTensor, b: QuantTensor) -> bool:
    """The same bytes, of the same kinds."""
    return (
        a.format == b.format
        and (a.data.dtype, a.scale.dtype) == (b.data.dtype, b.scale.dtype)
        and torch.equal(raw(a.data), raw(b.data))
        and torch.equal(raw(a.scale), raw(b.scale))
    )


@each_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_hold_what_rows_held(kind, shape):
    stored = random_stored(kind, shape)
    tiled = tile(stored)
    assert tiled.shape == stored.shape == shape
    assert tiled.data.shape == (*shape[:-2], tiled_bytes(kind, *shape[-2:]))
    assert same(untile(tiled), stored)


@each_kind
@pytest.mark.parametrize(("parts", "N", "K"), PARTS)
def test_parts_are_tiled_one_by_one(kind, parts, N, K):
    stored = random_stored(kind, (N, K))
    tiled = tile(stored, parts)
    assert tiled.shape == (N, K) and tiled.parts == parts
    assert same(untile(tiled), stored)
    values = stored.dequantize().unflatten(0, (parts, -1))
    for part, data in enumerate(tiled.data.unflatten(-1, (parts, -1))):
        alone = TiledWeight(kind, data, tiled.scale, num_rows=N // parts, num_inputs=K)
        if kind == "fp4" or N // parts % 128 == 0:  # else a part's rows begin inside a block of scales
            assert torch.equal(alone.dequantize(), values[part])


@each_kind
def test_a_word_lies_as_the_lanes_want_it(kind):
    """One output's first inputs, spelled out: pairs whose earlier input is the high half."""
    if kind == "fp4":
        data = torch.zeros(1, 16, dtype=torch.uint8)
        data[0, :4] = torch.tensor([0x10, 0x32, 0x54, 0x76])  # inputs 0 .. 7 hold codes 0 .. 7
        word = tile(QuantTensor("fp4", data.view(torch.int8), torch.full((1, 1), 9, dtype=torch.uint8))).data
        assert word[:4].tolist() == [0x31, 0x75, 0x20, 0x64]
    else:
        data = torch.zeros(1, 128, dtype=torch.uint8)
        data[0, :4] = torch.tensor([1, 2, 3, 4])
        stored = QuantTensor("fp8", data.view(torch.float8_e4m3fn), torch.full((1, 1), 9, dtype=torch.uint8))
        word = tile(stored).data
        assert word[:16].tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0]
    assert word[-32:].tolist() == [9] + 31 * [127]  # scales: of one output, and of none


@needs_a_library
@each_kind
@pytest.mark.parametrize("level", toolchain.supported())
def test_the_library_lays_the_same_tiles(kind, level):
    with native.use_level(level):
        for shape in SHAPES:
            stored = random_stored(kind, shape)
            assert torch.equal(native.tiled(stored).data, tile(stored).data), shape
        for parts, N, K in PARTS:
            stored = random_stored(kind, (N, K))
            assert torch.equal(native.tiled(stored, parts).data, tile(stored, parts).data), (parts, N, K)


@needs_a_library
@each_kind
@pytest.mark.parametrize("level", toolchain.supported())
@pytest.mark.parametrize("offset", [0, 1, 32])
def test_the_library_fills_what_it_is_given_and_nothing_beside(kind, level, offset):
    stored = random_stored(kind, (2, 3 * TILE + 5, 192))
    wanted = tile(stored).data
    room = torch.full((wanted.numel() + 128,), 77, dtype=torch.uint8)
    out = room[offset : offset + wanted.numel()].view_as(wanted)
    with native.use_level(level):
        tiled = native.tiled(stored, out=out)
    assert tiled.data is out and torch.equal(out, wanted)
    assert (room[:offset] == 77).all() and (room[offset + wanted.numel() :] == 77).all()


@needs_a_library
@each_kind
def test_threads_change_no_byte(kind, monkeypatch):
    stored = random_stored(kind, (3, 200, 640))
    monkeypatch.setattr(native, "threads", lambda: 3)
    set_grain = native.library().pyrosome_set_grain
    set_grain(ctypes.c_int64(1))
    try:
        assert torch.equal(native.tiled(stored).data, tile(stored).data)
    finally:
        set_grain(ctypes.c_int64(0))


@each_kind
def test_rows_that_are_not_contiguous_are_tiled_as_well(kind):
    whole = random_stored(kind, (4, 70, 128))
    every_other = QuantTensor(kind, whole.data[::2], whole.scale[::2])
    assert torch.equal(native.tiled(every_other).data, tile(every_other).data)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_those_of_the_rows(kind, dtype):
    stored = random_stored(kind, (2, 70, 160))
    assert torch.equal(native.tiled(stored).dequantize(dtype), stored.dequantize(dtype))


@each_kind
def test_what_a_tiled_weight_says_of_itself(kind):
    stored = random_stored(kind, (5, 96, 256))
    tiled = native.tiled(stored)
    assert tiled.shape == (5, 96, 256) and tiled.device == torch.device("cpu")
    assert tiled.nbytes == 5 * tiled_bytes(kind, 96, 256) == tiled.data.nbytes
    assert tiled_bytes(kind, 96, 256) == 96 * (256 // 2 + 256 // 32 if kind == "fp4" else 256 + 256 // 128)


@each_kind
def test_some_of_a_stack(kind):
    stored = random_stored(kind, (5, 40, 96))
    index = torch.tensor([3, 0, 3])
    some = native.tiled(stored).index_select(index)
    assert isinstance(some, TiledWeight) and some.shape == (3, 40, 96)
    assert same(untile(some), stored.index_select(index))


@each_kind
def test_another_device_gets_rows(kind):
    """Tiles are the CPU's: elsewhere the kernels read rows."""
    stored = random_stored(kind, (40, 96))
    moved = native.tiled(stored).to("cpu")
    assert not isinstance(moved, TiledWeight) and same(moved, stored)
    assert native.tiled(stored).to("meta").shape == (40, 96)


@each_kind
def test_a_wrong_number_of_bytes_is_refused(kind):
    tiled = tile(random_stored(kind, (40, 96)))
    for data in (tiled.data[:-1], torch.cat([tiled.data, tiled.data])):
        with pytest.raises(WrongShape, match=rf"{len(data)} bytes were given .* 40 x 96 in 1 parts, which takes"):
            TiledWeight(kind, data, tiled.scale, num_rows=40, num_inputs=96)
    with pytest.raises(WrongShape, match="in 4 parts"):
        TiledWeight(kind, tiled.data, tiled.scale, num_rows=40, num_inputs=96, parts=4)


def saved_and_loaded(weight: TiledWeight) -> TiledWeight:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_kind
def test_copies_of_a_weight_in_use_are_whole_and_apart(kind):
    """A product leaves addresses beside the weight: a copy must not take them along."""
    tiled = tile(random_stored(kind, (70, 128)))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = linear(x, tiled)
        apart = [copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled)), saved_and_loaded(tiled)]
        for c in (copy.copy(tiled), *apart):
            assert isinstance(c, TiledWeight) and (c.shape, c.parts) == (tiled.shape, 1)
            assert same(untile(c), untile(tiled))
        assert all(c.data.data_ptr() != tiled.data.data_ptr() for c in apart)
        tiled.data.zero_()  # whoever still read the first would give zeros now
        for c in apart:
            assert torch.equal(linear(x, c), wanted)


def test_a_scale_that_is_not_a_number_is_refused_by_the_loader(tmp_path: Path):
    """Packing carries any byte: there it would cost time for every load, and the loader has looked already."""
    stored = random_stored("fp4", (40, 96))
    stored.scale.view(torch.uint8)[7, 1] = 255
    assert same(untile(native.tiled(stored)), stored)

    path, name = copied(tmp_path), "layers.1.ffn.experts.0.w1.scale"
    dtype, shape, data = read_entries(path / SHARD)[name]
    rewrite(path, {name: (dtype, shape, b"\xff" + data[1:])})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN \(byte 255\) at \(0, 0\), 1 in all"):
        list(read_tensors(open_checkpoint(path)))
