"""What kernels share on the device says what it promises, at the edges of float32 too."""

from __future__ import annotations

import math

import torch
import triton.language as tl

from pyrosome.ops import device, gpu
from pyrosome.ops.gpu import Variant
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
