"""Products with weights in tiles and in rows: a row of inputs has the bits it has alone, in any company and level."""

from __future__ import annotations

import pytest
import torch

from pyrosome.ops import native, toolchain
from pyrosome.ops.linear import grouped_linear, linear
from pyrosome.quant import FORMATS, QuantTensor, round_activation
from pyrosome.quant.tiles import tile

try:
    native.library()
except OSError as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)

LEVELS = toolchain.supported()
# Up to six rows are one block, up to 32 several; more share what is spread, 192 at a time.
COUNTS = (*range(1, 15), 24, 31, 32, 33, 40, 191, 192, 193, 225)
# Tiles of four strips and of two, outputs past the last; whole groups and runs, and parts of them.
SHAPES = [(64, 128), (150, 320), (80, 160), (20, 36), (100, 132), (64, 512)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiled(name, N, K):
    return tile(QuantTensor(name, *FORMATS[name].quantize(noise(N, K, seed=1) * K**-0.5)))


def by_floats(x, w):
    return grouped_linear(x[:, None], w)[:, 0]


@pytest.mark.parametrize("run", [lambda x, w: linear(x, w, round_activation), by_floats], ids=["rounded", "floats"])
@pytest.mark.parametrize("name", ["fp8", "fp4"])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_any_number_of_rows_has_the_bits_of_each_alone(run, name, N, K):
    x, weight, found = noise(max(COUNTS), K), tiled(name, N, K), []
    for level in LEVELS:
        with native.use_level(level):
            alone = torch.cat([run(row[None], weight) for row in x])
            assert all(torch.equal(run(x[:count], weight), alone[:count]) for count in COUNTS), level
            found.append(alone)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(75, 2048), (21, 4099), (7, 2050), (9, 64), (37, 320)])
def test_plain_rows_have_the_bits_of_each_alone(dtype, N, K):
    x, weight, found = noise(9, K), (noise(N, K, seed=1) * K**-0.5).to(dtype), []
    for level in LEVELS:
        with native.use_level(level):
            alone = torch.cat([linear(row[None], weight) for row in x])
            assert all(torch.equal(linear(x[:count], weight), alone[:count]) for count in range(1, 10)), level
            found.append(alone)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    torch.testing.assert_close(found[0], x @ weight.float().t(), rtol=2e-5, atol=2e-5)
