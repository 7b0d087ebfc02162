"""Quantisation points: scales at their boundaries, floors, gradients, and the Hadamard rotation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrosome.errors import UnsupportedFormat
from pyrosome.quant import e8m0_to_float, hadamard, quantize_activation, simulate_fp4, simulate_fp8
from pyrosome.quant.activation import straight_through
from tests.quant.oracle import E2M1, E4M3, rounded, scale_exponent

FP8_FLOOR, FP4_FLOOR = 1e-4, 6 * 2.0**-126
INF = torch.tensor(math.inf)


def rough(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values over many binades, so that scales differ and small ones fall among the subnormal codes."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-8, 8, shape, generator=draw).float())


def expected_fp8(group: list[float]) -> list[float]:
    scale = 2.0 ** scale_exponent(group, 448.0, FP8_FLOOR)
    return [rounded(v / scale, E4M3) * scale for v in group]


def expected_fp4(group: list[float]) -> list[float]:
    scale = 2.0 ** scale_exponent(group, 6.0, FP4_FLOOR)
    return [rounded(v / scale, E2M1) * scale for v in group]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**40), max_value=2.0**40)


@given(st.lists(floats, min_size=8, max_size=8))
@settings(deadline=None)
def test_fp8_is_the_definition(group):
    assert simulate_fp8(torch.tensor(group), 8).tolist() == expected_fp8(group)


@given(st.lists(floats, min_size=8, max_size=8))
@settings(deadline=None)
def test_fp4_is_the_definition(group):
    assert simulate_fp4(torch.tensor(group), 8).tolist() == expected_fp4(group)


@pytest.mark.parametrize("exponent", range(-20, 40, 5))
@pytest.mark.parametrize(
    ("largest", "simulate", "half_doubled"), [(448.0, simulate_fp8, 0.5), (6.0, simulate_fp4, 0.0)]
)
def test_a_largest_value_on_the_boundary_keeps_its_scale(exponent, largest, simulate, half_doubled):
    """largest x 2^e is represented exactly; the float above it doubles the scale, and with it the least FP4 step."""
    at = torch.tensor([largest * 2.0**exponent, 0.5 * 2.0**exponent])
    assert simulate(at, 2).tolist() == at.tolist()
    below = at.clone()
    below[0] = at[0].nextafter(torch.tensor(0.0))
    assert simulate(below, 2).tolist() == at.tolist()
    above = at.clone()
    above[0] = at[0].nextafter(INF)
    assert simulate(above, 2).tolist() == [at[0].item(), half_doubled * 2.0**exponent]


@pytest.mark.parametrize("exponent", range(-9, 40, 7))
def test_the_scale_byte_steps_exactly_at_the_boundary(exponent):
    at = torch.tensor(448.0 * 2.0**exponent)
    amax = torch.stack([at.nextafter(torch.tensor(0.0)), at, at.nextafter(INF)])
    _, scale = quantize_activation(amax[:, None], 1)
    assert scale.view(torch.uint8)[:, 0].tolist() == [127 + exponent, 127 + exponent, 128 + exponent]


def test_codes_and_scales_multiply_to_the_simulated_values():
    x = rough(3, 5, 256)
    codes, scale = quantize_activation(x, 128)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, (3, 5, 256))
    assert (scale.dtype, scale.shape) == (torch.float8_e8m0fnu, (3, 5, 2))
    values = codes.float() * e8m0_to_float(scale).repeat_interleave(128, -1)
    assert torch.equal(values, simulate_fp8(x, 128))


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_a_short_last_group_is_scaled_by_what_it_has(width):
    x = rough(2, width)
    codes, scale = quantize_activation(x, 64)
    assert codes.shape == (2, width)
    assert scale.shape == (2, math.ceil(width / 64))
    for row, found in zip(x.tolist(), simulate_fp8(x, 64).tolist(), strict=True):
        assert found == [v for g in range(0, width, 64) for v in expected_fp8(row[g : g + 64])]
    for row, found in zip(x.tolist(), simulate_fp4(x, 32).tolist(), strict=True):
        assert found == [v for g in range(0, width, 32) for v in expected_fp4(row[g : g + 32])]


def test_fp8_floor():
    """Groups below 1e-4 share the scale of 1e-4, 2^-22: their steps do not shrink with them."""
    _, scale = quantize_activation(torch.tensor([[0.0], [1e-30], [1e-4], [1.1e-4]]), 1)
    assert scale.view(torch.uint8)[:, 0].tolist() == [105, 105, 105, 106]
    assert simulate_fp8(torch.tensor([2.0**-32]), 64).item() == 0.0  # half of the least step, 2^-9 x 2^-22
    assert simulate_fp8(torch.tensor([2.0**-31]), 64).item() == 2.0**-31


def test_fp4_floor():
    assert simulate_fp4(torch.tensor([FP4_FLOOR])).item() == FP4_FLOOR
    assert simulate_fp4(torch.tensor([2.0**-127])).item() == 2.0**-127  # 0.5 of the least scale
    assert simulate_fp4(torch.tensor([2.0**-128])).item() == 0.0


@pytest.mark.parametrize("simulate", [lambda x: simulate_fp8(x, 64), simulate_fp4])
def test_zeros_stay_zero_with_their_signs(simulate):
    found = simulate(torch.tensor([0.0, -0.0]).repeat(64))
    assert (found == 0).all()
    assert found.signbit().tolist() == [False, True] * 64


@pytest.mark.parametrize("simulate", [lambda x: simulate_fp8(x, 64), simulate_fp4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_fault_shows_in_its_whole_group_and_nowhere_else(simulate, bad):
    x = rough(128)
    x[70] = bad
    found = simulate(x)
    assert found[64:96].isnan().all()
    assert torch.equal(found[:64], simulate(x[:64]))


@pytest.mark.parametrize("simulate", [lambda x: simulate_fp8(x, 64), simulate_fp4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
class TestSimulation:
    def test_keeps_dtype_and_input(self, simulate, dtype):
        x = rough(3, 128).to(dtype)
        before = x.clone()
        found = simulate(x)
        assert found.dtype == dtype
        assert torch.equal(x, before)
        assert torch.equal(found.float(), simulate(x.float()))

    def test_twice_is_once(self, simulate, dtype):
        once = simulate(rough(64, 128).to(dtype))
        assert torch.equal(simulate(once), once)

    def test_the_gradient_passes_straight_through(self, simulate, dtype):
        x = rough(3, 128).to(dtype).requires_grad_()
        weight = rough(3, 128, seed=1).to(dtype)
        (simulate(x) * weight).sum().backward()
        assert torch.equal(x.grad, weight)

    def test_rows_do_not_depend_on_their_company(self, simulate, dtype):
        x = rough(7, 128).to(dtype)
        assert torch.equal(simulate(x), torch.stack([simulate(row) for row in x]))

    def test_no_rows(self, simulate, dtype):
        assert simulate(torch.empty(0, 128, dtype=dtype)).shape == (0, 128)

    def test_strided_input(self, simulate, dtype):
        x = rough(128, 6).to(dtype).t()
        assert torch.equal(simulate(x), simulate(x.contiguous()))


@pytest.mark.parametrize("simulate", [lambda x: simulate_fp8(x, 4), lambda x: simulate_fp4(x, 4)])
def test_gradients_agree_with_differences_of_what_stands_for_the_rounding(simulate):
    """Through a chain of smooth functions, the gradient is that of the chain with the rounding's output put in."""
    x = rough(4, 4).double().requires_grad_()
    offset = (simulate(x) - x).detach()
    found = torch.autograd.grad(simulate(x).sin().sum(), x)[0]
    assert torch.equal(found, (x + offset).cos())


def test_second_derivatives_pass_too():
    x = torch.tensor([1.5, 2.0, -0.25, 0.5], dtype=torch.float64, requires_grad=True)  # all e4m3 values: no rounding
    assert torch.autograd.gradgradcheck(lambda x: straight_through(x, torch.clone).pow(3), x)
    (first,) = torch.autograd.grad(simulate_fp8(x, 4).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 6 * x)


def sylvester(dim: int) -> torch.Tensor:
    """Entry (i, j) is (-1)^popcount(i & j) / sqrt(dim)."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    return torch.tensor(rows, dtype=torch.float64) * dim**-0.5


@pytest.mark.parametrize("dim", [1, 2, 4, 32, 128])
def test_hadamard_is_the_matrix(dim):
    x = torch.randn(3, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard(x), x @ sylvester(dim), atol=1e-14, rtol=0)
    torch.testing.assert_close(hadamard(x.float()), (x @ sylvester(dim)).float(), atol=1e-6, rtol=0)


def test_hadamard_rows_do_not_depend_on_their_company():
    x = rough(64, 128)
    whole = hadamard(x)
    for count in (1, 2, 3, 63):
        assert torch.equal(hadamard(x[:count]), whole[:count])


def test_hadamard_undoes_itself_and_leaves_its_input_alone():
    x = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    torch.testing.assert_close(hadamard(hadamard(x)), before, atol=1e-14, rtol=0)
    assert torch.equal(x, before)


def test_hadamard_gradients():
    x = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, x)
    assert torch.autograd.gradgradcheck(hadamard, x)


def test_hadamard_of_no_rows():
    assert hadamard(torch.empty(0, 3, 32)).shape == (0, 3, 32)


@pytest.mark.parametrize("dim", [0, 3, 96])
def test_hadamard_says_which_widths_it_has(dim):
    with pytest.raises(UnsupportedFormat, match=rf"{dim} channels.*powers of two"):
        hadamard(torch.empty(2, dim))
