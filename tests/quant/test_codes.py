"""e4m3 and e2m1: every code, every tie, both zeros."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrosome.quant.codes import e2m1_values, e4m3_values, pack_e2m1, round_e2m1
from tests.quant.oracle import E2M1, e2m1_value, e4m3_value, nearest, rounded

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BYTES = torch.arange(256, dtype=torch.uint8)
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, and equal signs of zero."""
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_e4m3_code(dtype):
    finite = [code for code in range(256) if code & 127 != 127]
    found = e4m3_values(BYTES, dtype)
    assert found.dtype == dtype
    assert same_bits(found[finite], torch.tensor([e4m3_value(code) for code in finite], dtype=dtype))
    assert found[[127, 255]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_e2m1_codes_low_nibble_first(dtype):
    found = e2m1_values(BYTES.view(16, 16), dtype)
    expected = [v for byte in range(256) for v in (e2m1_value(byte & 15), e2m1_value(byte >> 4))]
    assert found.dtype == dtype
    assert same_bits(found, torch.tensor(expected, dtype=dtype).view(16, 32))


def test_packing_undoes_unpacking_for_every_byte():
    assert torch.equal(pack_e2m1(e2m1_values(BYTES, torch.float32)), BYTES)


@pytest.mark.parametrize(("tie", "even"), TIES.items())
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_go_to_the_even_mantissa(tie, even, sign):
    x = torch.tensor([sign * tie, 0.0])
    assert round_e2m1(x).tolist() == [sign * even, 0.0]
    assert e2m1_values(pack_e2m1(x), torch.float32).tolist() == [sign * even, 0.0]


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("towards", [0.0, 6.0])
def test_beside_a_tie_the_nearer_value_wins(tie, towards):
    x = torch.tensor([tie]).nextafter(torch.tensor([towards]))
    neighbours = [v for v in E2M1 if abs(v - tie) == min(abs(w - tie) for w in E2M1)]
    assert round_e2m1(x).item() == (min(neighbours) if towards == 0.0 else max(neighbours))


@given(st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=8).filter(lambda x: len(x) % 2 == 0))
@settings(deadline=None)
def test_codes_and_values_are_the_nearest(x):
    wide = torch.tensor(x)
    assert same_bits(round_e2m1(wide), torch.tensor([rounded(v, E2M1) for v in x]))
    codes = [nearest(v, E2M1) | (8 if math.copysign(1.0, v) < 0 else 0) for v in x]
    assert pack_e2m1(wide).tolist() == [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)]


def test_rounding_leaves_its_input_alone():
    x = torch.tensor([0.3, -2.6, 5.5, 0.0])
    before = x.clone()
    round_e2m1(x)
    pack_e2m1(x)
    assert torch.equal(x, before)
