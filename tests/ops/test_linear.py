"""Products with stored weights, against sums written out."""

import math

import pytest
import torch

from pyrosome.errors import UnsupportedFormat
from pyrosome.ops.linear import dense, dense_rows, grouped_linear, linear, linears
from pyrosome.quant import FORMATS, QuantTensor, round_activation, unchanged

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stored(name, *shape, seed=1):
    return QuantTensor(name, *FORMATS[name].quantize(draw(*shape, seed=seed)))


def product(x, weight):
    """x [T, K] and weight [N, K], both any dtype -> float64 [T, N], one sum at a time."""
    x, weight = x.double().tolist(), weight.double().tolist()
    return torch.tensor(
        [[math.fsum(a * b for a, b in zip(row, w, strict=True)) for w in weight] for row in x], dtype=torch.float64
    ).reshape(len(x), len(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_the_sum_over_inputs(dtype):
    x, weight = draw(5, 7, dtype=dtype), draw(3, 7, seed=1)
    out = linear(x, weight)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), product(x, weight), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)])
def test_linear_keeps_leading_dims(lead):
    x, weight = draw(*lead, 7), draw(3, 7, seed=1)
    out = linear(x, weight)
    assert out.shape == (*lead, 3)
    torch.testing.assert_close(out.reshape(-1, 3).double(), product(x.reshape(-1, 7), weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [linear, lambda x, w: grouped_linear(x[:, None], w)[:, 0]], ids=["linear", "grouped"])
def test_a_bfloat16_input_is_multiplied_and_summed_in_float32(op):
    """In bfloat16 neither 256 + 1 nor 1 + 2^-10 would be anything but its first term."""
    x = torch.tensor([[256.0, 1.0, -256.0], [0.0, -1.0, 1.0]], dtype=torch.bfloat16)
    assert op(x, torch.tensor([[1.0, 1.0, 1.0 + 2**-10]])).tolist() == [[0.75], [2**-10]]


@pytest.mark.parametrize("name", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(5, 34), (130, 260)])
def test_a_stored_weight_is_its_own_exact_values(name, dtype, N, K):
    x, weight = draw(4, K, dtype=dtype), stored(name, N, K)
    values = weight.dequantize(torch.float64)
    assert torch.equal(linear(x, weight), linear(x, values.float()))
    torch.testing.assert_close(linear(x.double(), weight), x.double() @ values.t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fp8", "fp4"])
def test_a_stored_weight_passes_gradients_to_its_input(name):
    x, weight = draw(3, 34).requires_grad_(), stored(name, 5, 34)
    linear(x, weight).square().sum().backward()
    found, x.grad = x.grad, None
    linear(x, weight.dequantize()).square().sum().backward()
    assert found.abs().any()
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_linear_is_one_product_per_block_of_rows(dtype, groups):
    T, outs, K = 4, 2, 5
    x, weight = draw(T, groups, K, dtype=dtype), draw(groups * outs, K, seed=1)
    out = grouped_linear(x, weight)
    assert out.shape == (T, groups, outs)
    assert out.dtype == dtype
    for g in range(groups):
        expected = product(x[:, g], weight[g * outs : (g + 1) * outs])
        torch.testing.assert_close(out[:, g].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_groups_do_not_mix():
    x, weight = draw(3, 2, 5), draw(8, 5, seed=1)
    before = grouped_linear(x, weight)
    x[:, 1] = float("nan")
    after = grouped_linear(x, weight)
    assert torch.equal(after[:, 0], before[:, 0])
    assert after[:, 1].isnan().all()


@pytest.mark.parametrize("name", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_of_a_stored_weight(name, dtype):
    x, weight = draw(4, 2, 64, dtype=dtype), stored(name, 6, 64)
    assert torch.equal(grouped_linear(x, weight), grouped_linear(x, weight.dequantize()))


def test_no_tokens():
    assert linear(draw(0, 4), draw(3, 4)).shape == (0, 3)
    assert grouped_linear(draw(0, 2, 4), draw(6, 4)).shape == (0, 2, 3)


def test_gradients():
    x, weight = draw(3, 4, dtype=torch.float64), draw(2, 4, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), weight.requires_grad_()))
    x = draw(3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(grouped_linear, (x.requires_grad_(), weight))


def test_dense_copies_nothing_that_is_dense_already():
    weight = draw(3, 4)
    assert dense(weight, torch.float32) is weight
    assert dense(weight, torch.float64).dtype == torch.float64
    packed = stored("fp4", 3, 32)
    assert torch.equal(dense(packed, torch.float32), packed.dequantize())


def test_rows_are_read_from_plain_tables_only():
    table = draw(5, 4)
    assert torch.equal(dense_rows(table, torch.tensor([4, 0, 4])), torch.stack([table[4], table[0], table[4]]))
    with pytest.raises(UnsupportedFormat, match="fp8"):
        dense_rows(stored("fp8", 5, 4), torch.tensor([0]))


@pytest.mark.parametrize("T", [1, 40])
@torch.inference_mode()
def test_an_unpacked_weight_is_given_the_rounded_inputs_that_its_format_asked_for(T):
    x, packed = draw(T, 256), stored("fp8", 128, 256)
    plain = packed.dequantize()
    wanted = linear.definition(x, plain, round_activation)
    torch.testing.assert_close(linear(x, plain, round_activation), wanted, rtol=1e-5, atol=1e-4)
    assert (linear(x, plain) - wanted).abs().max() > 1e-2
    other = draw(64, 256, seed=5)
    for weights in (
        ((plain, round_activation), (other, unchanged)),
        ((plain, round_activation), (packed, round_activation)),
    ):
        for out, (w, prepare) in zip(linears(x, weights), weights, strict=True):
            torch.testing.assert_close(out, linear.definition(x, w, prepare), rtol=1e-5, atol=1e-4)
