"""Rotation of the last channels, against complex numbers one at a time."""

import cmath
import math

import numpy as np
import pytest
import torch

from pyrosome.config import YarnScaling
from pyrosome.ops.rope import frequencies, rope, rotation

FLASH = YarnScaling(factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=65536)
FLASH_BASE, SLIDING_BASE, DIM = 160000.0, 10000.0, 64


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turned(x, angles, sign=1):
    """x [T, H, C] as float64, its last channels turned by angles[t][i], a pair of neighbours at a time."""
    out = x.double().clone()
    nope = x.shape[-1] - 2 * len(angles[0])
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i, angle in enumerate(angles[t]):
                at = nope + 2 * i
                z = complex(out[t, h, at], out[t, h, at + 1]) * cmath.exp(1j * sign * angle)
                out[t, h, at], out[t, h, at + 1] = z.real, z.imag
    return out


def plain(base, dim):
    return [base ** (-2 * i / dim) for i in range(dim // 2)]


@pytest.mark.parametrize("base", [SLIDING_BASE, FLASH_BASE])
@pytest.mark.parametrize("dim", [2, 4, DIM])
def test_frequencies_without_scaling(base, dim):
    f = frequencies(base, dim, None)
    assert f.dtype == torch.float32
    assert f.tolist() == pytest.approx(plain(base, dim), rel=3e-7)


def test_the_ramp_of_flash_lies_between_dims_15_and_25():
    f, unscaled = frequencies(FLASH_BASE, DIM, FLASH).tolist(), plain(FLASH_BASE, DIM)
    for i, value in enumerate(unscaled):
        ramp = min(max((i - 15) / (25 - 15), 0), 1)
        assert f[i] == pytest.approx(value * (1 - ramp) + value / 16 * ramp, rel=5e-7), i
    assert frequencies(FLASH_BASE, DIM, None)[15] == f[15]
    assert f[16] < unscaled[16] * 0.95
    assert f[24] > unscaled[24] / 16 * 1.05


@pytest.mark.parametrize(
    ("base", "dim", "yarn"),
    [
        (160000.0, 16, FLASH),
        (10000.0, 8, YarnScaling(4.0, 32.0, 1.0, 4096)),
        (10000.0, 8, YarnScaling(4.0, 1e9, 1e-9, 4096)),  # low and high beyond both ends
        (160000.0, 8, YarnScaling(16.0, 1.0001, 1.0, 6)),  # low and high on one dim
    ],
)
def test_the_ramp_from_its_formula(base, dim, yarn):
    def dim_of(turns):
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dim_of(yarn.beta_fast)), 0), min(math.ceil(dim_of(yarn.beta_slow)), dim - 1)
    for i, (found, value) in enumerate(zip(frequencies(base, dim, yarn).tolist(), plain(base, dim), strict=True)):
        ramp = min(max((i - low) / (high - low), 0), 1) if high != low else float(i > low)
        assert found == pytest.approx(value * (1 - ramp) + value / yarn.factor * ramp, rel=1e-6), i


def test_no_attention_factor():
    turn = rotation(frequencies(FLASH_BASE, DIM, FLASH), torch.tensor([0, 1, 77, 65536, 1_000_000]))
    torch.testing.assert_close(turn.abs(), torch.ones(5, DIM // 2))


@pytest.mark.parametrize("position", [3, 65535, 999_999, 1_048_575])
@pytest.mark.parametrize("yarn", [None, FLASH])
def test_the_angle_is_a_float32_product(position, yarn):
    f = frequencies(FLASH_BASE, DIM, yarn)
    turn = rotation(f, torch.tensor([position]))
    assert turn.dtype == torch.complex64
    angle = [float(np.float32(position) * np.float32(v)) for v in f.tolist()]
    assert turn[0].real.tolist() == pytest.approx([math.cos(a) for a in angle], abs=2e-7)
    assert turn[0].imag.tolist() == pytest.approx([math.sin(a) for a in angle], abs=2e-7)


def test_near_a_million_tokens_the_float32_angle_is_not_the_exact_one():
    f = frequencies(FLASH_BASE, DIM, FLASH)
    turn = rotation(f, torch.tensor([999_999]))[0]
    exact = torch.tensor([cmath.exp(1j * 999_999 * v) for v in f.tolist()])
    assert 3e-3 < (turn - exact).abs().max() < 5e-2


def test_float64_frequencies_give_float64_rotations():
    turn = rotation(frequencies(FLASH_BASE, DIM, FLASH).double(), torch.tensor([999_999]))
    assert turn.dtype == torch.complex128
    expected = [cmath.exp(1j * (999_999 * v)) for v in frequencies(FLASH_BASE, DIM, FLASH).tolist()]
    assert (turn[0] - torch.tensor(expected, dtype=torch.complex128)).abs().max() < 1e-9


def test_padding_is_not_turned():
    assert torch.equal(rotation(frequencies(1e4, 8, None), torch.tensor([-1, 0])), torch.ones(2, 4) + 0j)


@pytest.mark.parametrize("nope", [0, 2, 6])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_are_turned_as_one_complex_number(nope, inverse, dtype):
    f = frequencies(1e4, 6, None).to(dtype)
    positions = [0, 1, 5, 300]
    x = draw(4, 3, nope + 6, dtype=dtype)
    out = rope(x, rotation(f, torch.tensor(positions)), inverse=inverse)
    assert out.dtype == dtype
    expected = turned(x, [[p * v for v in f.tolist()] for p in positions], -1 if inverse else 1)
    tight = 1e-12 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(out.double(), expected, rtol=tight, atol=tight)


def test_one_vector_per_token_and_several_heads_agree():
    x, turn = draw(4, 3, 10), rotation(frequencies(1e4, 6, None), torch.tensor([2, 3, 5, 7]))
    by_head = torch.stack([rope(x[:, h], turn) for h in range(3)], dim=1)
    torch.testing.assert_close(rope(x, turn), by_head, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_first_channels_are_left_alone_to_the_bit(dtype):
    x = draw(5, 2, 10, dtype=dtype)
    x[0, 0, 0], x[1, 1, 3], x[2, 0, 1] = float("inf"), 1e-38, -0.0
    out = rope(x, rotation(frequencies(1e4, 6, None), torch.arange(1, 6)))
    assert torch.equal(out[..., :4].contiguous().view(torch.uint8), x[..., :4].contiguous().view(torch.uint8))
    assert (out[..., 4:] != x[..., 4:]).any(-1).all()


def test_position_zero_changes_nothing():
    x = draw(1, 2, 10)
    assert torch.equal(rope(x, rotation(frequencies(1e4, 6, None), torch.tensor([0]))), x)


@pytest.mark.parametrize("position", [1, 4097, 1_048_575])
def test_inverse_turns_back(position):
    x, turn = draw(1, 2, 512), rotation(frequencies(FLASH_BASE, DIM, FLASH), torch.tensor([position]))
    torch.testing.assert_close(rope(rope(x, turn), turn, inverse=True), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rope(rope(x, turn, inverse=True), turn), x, rtol=1e-6, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    f = frequencies(1e4, 6, None).double()
    q, k = draw(1, 6, dtype=torch.float64), draw(1, 6, dtype=torch.float64, seed=1)

    def score(t, s):
        turn_t, turn_s = (rotation(f, torch.tensor([p])) for p in (t, s))
        return (rope(q, turn_t) * rope(k, turn_s)).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-10)
    assert score(9, 4) != pytest.approx(score(4, 9), rel=1e-2)


def test_bfloat16_is_turned_in_float32_and_rounded_once():
    x, f = draw(40, 2, 64, dtype=torch.bfloat16), frequencies(1e4, 64, None)
    out = rope(x, rotation(f, torch.arange(40))).double()
    angles = [[float(np.float32(t) * np.float32(v)) for v in f.tolist()] for t in range(40)]
    exact = turned(x, angles)
    # Half a unit in the last of bfloat16's eight bits, and a little for float32's own error.
    half_unit = torch.exp2(torch.floor(torch.log2(exact.abs()))) * 2.0**-8
    assert ((out - exact).abs() <= half_unit * (1 + 1e-3) + 1e-6).all()


def test_no_tokens():
    turn = rotation(frequencies(1e4, 6, None), torch.zeros(0, dtype=torch.int64))
    assert rope(draw(0, 2, 10), turn).shape == (0, 2, 10)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(inverse):
    turn = rotation(frequencies(1e4, 4, None).double(), torch.tensor([3, 8]))
    x = draw(2, 2, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rope(x, turn, inverse=inverse), (x,))
