"""E8M0 scales: every byte, and the ceiling power of two at and around every power."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrosome.quant import ceil_pow2, e8m0_to_float
from tests.quant.oracle import ceil_exponent

POWERS = [2.0**e for e in range(-126, 128)]


def test_every_byte_is_its_power_of_two():
    found = e8m0_to_float(torch.arange(255, dtype=torch.uint8))
    assert found.dtype == torch.float32
    assert found.tolist() == [2.0 ** (byte - 127) for byte in range(255)]


def test_byte_255_is_nan():
    assert math.isnan(e8m0_to_float(torch.tensor([255], dtype=torch.uint8)).item())


def test_reads_the_dtype_the_container_gives():
    bytes_ = torch.tensor([[0, 1], [127, 254]], dtype=torch.uint8)
    assert torch.equal(e8m0_to_float(bytes_.view(torch.float8_e8m0fnu)), e8m0_to_float(bytes_))


def test_an_exact_power_stays():
    scale, byte = ceil_pow2(torch.tensor(POWERS))
    assert scale.tolist() == POWERS
    assert byte.tolist() == list(range(1, 255))


def test_the_float_above_a_power_goes_to_the_next():
    scale, _ = ceil_pow2(torch.tensor(POWERS[:-1]).nextafter(torch.tensor(math.inf)))
    assert scale.tolist() == POWERS[1:]


def test_the_float_below_a_power_goes_up_to_it():
    scale, _ = ceil_pow2(torch.tensor(POWERS[1:]).nextafter(torch.tensor(0.0)))
    assert scale.tolist() == POWERS[1:]


@given(st.floats(min_value=2.0**-126, max_value=2.0**127, width=32))
@settings(deadline=None)
def test_is_the_least_power_of_two_not_below(x):
    scale, byte = ceil_pow2(torch.tensor([x]))
    assert scale.item() == 2.0 ** ceil_exponent(x)
    assert byte.item() == ceil_exponent(x) + 127


@given(st.floats(min_value=2.0**-140, max_value=2.0**127, width=32, allow_subnormal=True))
@settings(deadline=None)
def test_the_byte_says_the_same_as_the_float(x):
    scale, byte = ceil_pow2(torch.tensor([x]))
    assert torch.equal(e8m0_to_float(byte), scale)


@pytest.mark.parametrize("x", [0.0, 2.0**-149, 2.0**-127, 2.0**-126])
def test_scales_are_normal_numbers(x):
    scale, byte = ceil_pow2(torch.tensor([x]))
    assert (scale.item(), byte.item()) == (2.0**-126, 1)


@pytest.mark.parametrize("x", [2.0**127 * 1.5, math.inf, math.nan, -math.nan])
def test_what_has_no_power_of_two_above_it_has_a_nan_scale(x):
    scale, byte = ceil_pow2(torch.tensor([x]))
    assert math.isnan(scale.item())
    assert byte.item() == 255
