"""`rms_norm` against its formula in Python floats."""

import math

import pytest
import torch

from pyrosome.ops.rms_norm import rms_norm

EPS = 1e-6


def formula(x, weight, eps):
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        rms = math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
        scale = [1.0] * len(row) if weight is None else weight.double().tolist()
        rows.append([v / rms * w for v, w in zip(row, scale, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(x.shape)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 16), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("eps", [EPS, 0.3])
def test_against_the_formula(shape, weighted, eps):
    x, weight = draw(*shape), draw(shape[-1], seed=1) if weighted else None
    torch.testing.assert_close(rms_norm(x, weight, eps).double(), formula(x, weight, eps), rtol=2e-6, atol=1e-7)


def test_each_vector_has_a_statistic_of_its_own():
    x = torch.tensor([[3.0, -4.0], [3e4, -4e4], [3e-4, -4e-4]])
    out = rms_norm(x, None, 0.0)
    expected = torch.tensor([3.0, -4.0]) / math.sqrt(12.5)
    torch.testing.assert_close(out, expected.expand(3, 2))


def test_eps_is_added_to_the_mean_square():
    x = torch.tensor([[1e-3, 1e-3]])
    torch.testing.assert_close(rms_norm(x, None, 3e-6), torch.full((1, 2), 0.5))
    assert not rms_norm(torch.zeros(2, 3), torch.ones(3), EPS).any()


def test_a_bfloat16_input_is_rounded_once_at_the_end():
    x, weight = draw(64, 32, dtype=torch.bfloat16), 1 + 0.3 * draw(32, seed=1)
    out, exact = rms_norm(x, weight, EPS), formula(x, weight, EPS)
    assert out.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's eight bits, and a little for float32's own error.
    half_unit = torch.exp2(torch.floor(torch.log2(exact.abs()))) * 2.0**-8
    assert ((out.double() - exact).abs() <= half_unit * (1 + 1e-3)).all()


def test_float64_stays_float64_in_value_too():
    x, weight = draw(3, 8, dtype=torch.float64), draw(8, dtype=torch.float64, seed=1)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, formula(x, weight, EPS), rtol=1e-14, atol=1e-15)
    assert rms_norm(x, weight.float(), EPS).dtype == torch.float64


def test_gradients():
    x, weight = draw(2, 3, 4, dtype=torch.float64), draw(4, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(rms_norm, (x.requires_grad_(), weight.requires_grad_(), EPS))
    assert torch.autograd.gradcheck(rms_norm, (x, None, EPS))


def test_the_gradient_of_a_vector_of_zeros_is_finite():
    x = torch.zeros(2, 3, requires_grad=True)
    rms_norm(x, None, EPS).sum().backward()
    assert torch.isfinite(x.grad).all()
