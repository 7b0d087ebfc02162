"""What kernels share on the device says what it promises, at the edges of float32 too."""

from __future__ import annotations

import math

import torch
import triton.language as tl

from pyrosome.ops import device, gpu
from pyrosome.ops.gpu import Variant
from pyrosome.quant.codes import e2m1_values, e4m3_values, pack_e2m1
from pyrosome.quant.e8m0 import e8m0_to_float
from tests.ops.gpu.held import DEVICE, same_bits

ONE = Variant("one", {})
EDGES = [0.0, -0.0, 1.0, -1.5, 3.4028235e38, -3.4e38, 1e-30, 2.0**-126, float("inf"), float("-inf"), float("nan")]


@gpu.jit
def _split(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, middle, low = device.split3(tl.load(x_ptr + at, mask=at < n, other=0.0))
    tl.store(out_ptr + at, high, mask=at < n)
    tl.store(out_ptr + n + at, middle, mask=at < n)
    tl.store(out_ptr + 2 * n + at, low, mask=at < n)


@gpu.jit
def _raised(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, device.exp(tl.load(x_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@gpu.jit
def _coded(x_ptr, out_ptr, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    if WHAT == "e8m0":
        y = device.decode_e8m0(x)
    elif WHAT == "e4m3":
        y = device.decode_e4m3(x)
    elif WHAT == "e2m1":
        y = device.decode_e2m1(x)
    elif WHAT == "to e4m3":
        y = device.encode_e4m3(x)
    elif WHAT == "to e2m1":
        y = device.encode_e2m1(x)
    else:
        y = device.round_bf16(x)
    tl.store(out_ptr + at, y, mask=at < n)


def coded(x: torch.Tensor, what: str) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.int32 if what.startswith("to ") else torch.float32, device=DEVICE)
    gpu.launch(_coded, (gpu.cdiv(len(x), 4096),), x.to(DEVICE), out, len(x), WHAT=what, BLOCK=4096, variant=ONE)
    return out.cpu()


def all_nan_alike(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), torch.nan, x)


def test_every_code_has_its_value():
    byte = torch.arange(256, dtype=torch.uint8)
    assert same_bits(all_nan_alike(coded(byte, "e8m0")), e8m0_to_float(byte))
    assert same_bits(all_nan_alike(coded(byte, "e4m3")), all_nan_alike(e4m3_values(byte, torch.float32)))
    pairs = e2m1_values(byte, torch.float32).view(256, 2)
    assert same_bits(coded(byte, "e2m1"), pairs[:, 0].contiguous())  # of a byte the lowest four bits
    assert same_bits(coded(byte >> 4, "e2m1"), pairs[:, 1].contiguous())


def test_numbers_become_the_nearest_codes():
    g = torch.Generator().manual_seed(2)
    drawn = torch.randn(100_000, generator=g) * torch.exp2(torch.randint(-14, 9, (100_000,), generator=g))
    edges = torch.cat([torch.arange(-448, 448.5, 0.0625), torch.arange(-64, 64) * 2.0**-12, torch.tensor([0.0, -0.0])])
    x = torch.cat([drawn, edges]).clamp(-448, 448)
    assert torch.equal(coded(x, "to e4m3"), x.to(torch.float8_e4m3fn).view(torch.uint8).int())
    assert coded(torch.tensor([torch.nan]), "to e4m3") & 127 == 127
    x = torch.cat([3 * torch.randn(100_000, generator=g), torch.arange(-6, 6.25, 0.125), torch.tensor([0.0, -0.0])])
    x = x.clamp(-6, 6)[: len(x) // 2 * 2]
    packed = pack_e2m1(x[None])[0]
    assert torch.equal(coded(x, "to e2m1"), torch.stack([packed & 15, packed >> 4], -1).flatten().int())
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=g).to(torch.int32)
    x = bits.view(torch.float32)
    assert same_bits(all_nan_alike(coded(x, "bf16")), all_nan_alike(x.bfloat16().float()))


def test_three_parts_lose_nothing_and_an_infinity_has_one():
    drawn = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-25, 25, 2000)
    x = torch.cat([torch.tensor(EDGES), drawn]).to(DEVICE)
    out = x.new_empty(3, len(x))
    gpu.launch(_split, (1,), x, out, len(x), BLOCK=gpu.pow2(len(x)), variant=ONE)
    high, middle, low = out
    assert same_bits((high + middle + low)[2:-3], x[2:-3])  # a zero's sign is in the first
    assert not out[1:, -len(drawn) - 3 : -len(drawn)].any()
    for part, whole in zip(out, (x, None, None), strict=True):
        assert torch.equal(part.bfloat16().float().isnan(), part.isnan())
        assert same_bits(part.nan_to_num(posinf=1, neginf=-1), part.bfloat16().float().nan_to_num(posinf=1, neginf=-1))
        assert whole is None or torch.equal(part.isfinite(), whole.isfinite())


def test_exp_to_the_last_bits():
    x = torch.cat([torch.linspace(-104, 88.7, 8000), torch.tensor([-1e4, -3e38, 1e4, 0.0, *EDGES[-3:]])]).to(DEVICE)
    out = torch.empty_like(x)
    gpu.launch(_raised, (1,), x, out, len(x), BLOCK=gpu.pow2(len(x)), variant=ONE)
    for found, given in zip(out.tolist(), x.tolist(), strict=True):
        wanted = math.exp(given) if given < 700 else math.inf
        if math.isnan(given):
            assert math.isnan(found)
        else:
            assert found == wanted or abs(found - wanted) <= max(4e-7 * wanted, 2.0**-149), (given, found)
