"""Rotation by Triton, and what stands beside a turn, against the definitions."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from pyrosome.ops import gpu
from pyrosome.ops.rope import frequencies, index_rows, norm_rope, rope, rotation
from pyrosome.quant import round_index, round_kv, simulate_fp4, simulate_fp8, unchanged
from tests.ops.gpu.held import DEVICE, kernels, rms, same_bits

CPU = DEVICE.type == "cpu"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turns(T, F, seed=0):
    angle = draw(T, F, seed=seed + 100) * 3
    return torch.complex(angle.cos(), angle.sin())


def run(op, *args, **options):
    """What the kernel says, on the CPU, and that it was the kernel."""
    args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    with kernels(op):
        assert op.chosen(*args) == "triton"
        out = op(*args, **options)
    assert out.device.type == DEVICE.type
    return out.cpu()


@pytest.mark.parametrize("position", [0, 1, 65_535, 999_999, 1_048_575])
def test_angles_are_float32_products_and_their_cosines_are_exact_at_a_million_tokens(position):
    f = frequencies(160000.0, 64, None)
    turn = run(rotation, f, torch.tensor([3, position]))
    assert turn.dtype == torch.complex64 and turn.shape == (2, 32)
    for t, p in enumerate((3, position)):
        angle = [float(np.float32(p) * np.float32(v)) for v in f.tolist()]
        assert turn[t].real.tolist() == pytest.approx([math.cos(a) for a in angle], abs=2e-7)
        assert turn[t].imag.tolist() == pytest.approx([math.sin(a) for a in angle], abs=2e-7)


@pytest.mark.parametrize(("T", "F"), [(0, 4), (1, 1), (3, 5), (40, 9)])
def test_rotations_of_any_number_of_positions(T, F):
    f, position = draw(F, seed=2).abs(), torch.arange(2 * T)[::2] * 7919 - 1
    turn = run(rotation, f, position)
    assert (turn - rotation.definition(f, position)).abs().max() < 1e-6 if T else turn.shape == (0, F)


def test_padding_is_not_turned_and_shapes_are_checked():
    assert torch.equal(run(rotation, frequencies(1e4, 8, None), torch.tensor([-1, 0])), torch.ones(2, 4) + 0j)
    with pytest.raises(RuntimeError, match=r"frequencies \[F\]"):
        run(rotation, torch.ones(2, 2), torch.arange(3))


SHAPES = [(1, 2), (0, 10), (5, 10), (4, 3, 10), (2, 0, 8), (3, 2, 14), (2, 82), (2, 2, 512), (1, 700), (2, 1026)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rope(shape, inverse):
    x, turn = draw(*shape), turns(shape[0], min(3, shape[-1] // 2))
    found, wanted = run(rope, x, turn, inverse), rope.definition(x, turn, inverse)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    nope = shape[-1] - 2 * turn.shape[1]
    assert same_bits(found[..., :nope], x[..., :nope])


def test_channels_that_do_not_turn_keep_every_bit():
    x = draw(4, 2, 10)
    x[0, 0, 0], x[1, 1, 3], x[2, 0, 1], x[3, 1, 2] = float("inf"), 1e-40, -0.0, float("nan")
    assert same_bits(run(rope, x, turns(4, 3))[..., :4], x[..., :4])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (1, 2)])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("round_nope", [unchanged, round_kv, functools.partial(simulate_fp8, group=4)])
def test_norm_rope(shape, has_weight, round_nope):
    x, turn = draw(*shape), turns(shape[0], min(3, shape[-1] // 2))
    weight = draw(shape[-1], seed=1) if has_weight else None
    found, wanted = (
        f(x, weight, turn, 1e-6, round_nope) for f in (functools.partial(run, norm_rope), norm_rope.definition)
    )
    assert found.shape == wanted.shape
    assert rms(found, wanted) < (1e-6 if round_nope is unchanged else 2e-3)


@pytest.mark.parametrize("nope", [0, 2, 40, 64, 66, 448])
def test_rounding_is_the_definitions_to_the_bit(nope):
    """By `norm_rope`'s own normalised rows, so that no difference of a last bit can flip a rounding."""
    x, turn = draw(6, nope + 64) * torch.logspace(-6, 3, 6)[:, None], turns(6, 32)
    x[1, :nope] = 0
    plain, rounded = (run(norm_rope, x, None, turn, 1e-6, r) for r in (unchanged, round_kv))
    assert same_bits(rounded[:, nope:], plain[:, nope:])
    assert same_bits(rounded[:, :nope], round_kv(plain[:, :nope]))


def test_a_group_with_a_nan_or_an_infinity_is_nan():
    x, turn = draw(2, 192), turns(2, 32)
    x[0, 70], x[1, 3] = float("nan"), float("inf")
    found, wanted = run(norm_rope, x, None, turn, 1e-6, round_kv), norm_rope.definition(x, None, turn, 1e-6, round_kv)
    assert torch.equal(found.isnan(), wanted.isnan()) and found.isnan().any()


INDEX_SHAPES = [(1, 2), (0, 8), (5, 8), (3, 3, 32), (2, 64), (3, 5, 128), (2, 256)]


@pytest.mark.parametrize("shape", INDEX_SHAPES)
@pytest.mark.parametrize("round_index_by", [unchanged, round_index])
@pytest.mark.parametrize("variant", ["few", "many"])
def test_index_keys_are_the_definitions_to_the_bit(shape, round_index_by, variant):
    x = draw(*shape) * 10
    with gpu.forced(index_rows=variant):
        found = run(index_rows, x, None, round_index_by)
    assert same_bits(found, index_rows.definition(x, None, round_index_by))


@pytest.mark.parametrize("shape", INDEX_SHAPES)
@pytest.mark.parametrize("variant", ["few", "many"])
def test_index_queries(shape, variant):
    x, turn = draw(*shape), turns(shape[0], max(1, shape[-1] // 4))
    with gpu.forced(index_rows=variant):
        assert rms(run(index_rows, x, turn), index_rows.definition(x, turn)) < 1e-6
        assert rms(run(index_rows, x, turn, round_index), index_rows.definition(x, turn, round_index)) < 1e-2
        # Of the turned rows that the kernel itself makes, the rounding is the definition's to the bit.
        assert same_bits(run(index_rows, x, turn, round_index), round_index(run(index_rows, x, turn)))


def test_index_rows_of_other_roundings_and_widths():
    x = draw(3, 32)
    other = functools.partial(simulate_fp4, group=16)
    assert same_bits(run(index_rows, x, None, other), index_rows.definition(x, None, other))
    with pytest.raises(Exception, match="powers of two"):
        run(index_rows, draw(2, 24), None)
    x[1, 5] = float("nan")
    assert torch.equal(
        run(index_rows, x, None, round_index).isnan(), index_rows.definition(x, None, round_index).isnan()
    )


def test_a_row_has_the_same_bits_in_any_company_and_variant():
    x, turn, weight = draw(5, 3, 512), turns(5, 32), draw(512, seed=3)
    q = x[..., :128].contiguous()
    whole = run(norm_rope, x, weight, turn, 1e-6, round_kv)
    index = run(index_rows, q, turn, round_index)
    for t in range(5):
        one = slice(t, t + 1)
        assert same_bits(run(norm_rope, x[one], weight, turn[one], 1e-6, round_kv), whole[one])
        with gpu.forced(index_rows="many"):
            assert same_bits(run(index_rows, q[one], turn[one], round_index), index[one])
    # Its heads are rows like those of other tokens.
    assert same_bits(run(norm_rope, x[:, 1], weight, turn, 1e-6, round_kv), whole[:, 1])


def test_rows_that_lie_apart_and_at_any_address():
    x, turn = draw(12, 3, 70), turns(24, 4)[::2]
    cases = [x[:, 1:, 3:67], x.transpose(1, 2)[:, 4:7, :2], x.flatten()[1:769].view(12, 64)]
    for x in cases:
        own = x.clone(memory_format=torch.contiguous_format)  # the definition turns pairs at even addresses only
        F = min(4, x.shape[-1] // 2)
        weight = draw(2 * x.shape[-1], seed=1)[1::2]
        assert rms(run(rope, x, turn[:, :F]), rope.definition(own, turn[:, :F])) < 1e-6
        wanted = norm_rope.definition(own, weight, turn[:, :F], 1e-6)
        assert rms(run(norm_rope, x, weight, turn[:, :F], 1e-6), wanted) < 1e-6
        if x.shape[-1] & (x.shape[-1] - 1) == 0:
            assert rms(run(index_rows, x, turn[:, :F]), index_rows.definition(own, turn[:, :F])) < 1e-6


def test_what_does_not_fit_is_refused():
    for op, args in ((rope, ()), (norm_rope, (1e-6,)), (index_rows, ())):
        given = [None] if op is norm_rope else []
        with pytest.raises(RuntimeError, match=r"need rotations \[4, F\]"):
            run(op, draw(4, 8), *given, turns(3, 2), *args)
        with pytest.raises(RuntimeError, match="at most 4 pairs"):
            run(op, draw(4, 8), *given, turns(4, 5), *args)
        with pytest.raises(RuntimeError, match=r"\[T, C\] or \[T, H, C\]"):
            run(op, draw(2, 2, 2, 8), *given, turns(2, 2), *args)
    with pytest.raises(RuntimeError, match=r"need a weight \[8\]"):
        run(norm_rope, draw(4, 8), draw(7), turns(4, 2), 1e-6)
