"""Stored weights: detection, exact values, the way back, and formats that come from outside."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrosome.errors import UnsupportedFormat, WrongShape
from pyrosome.ops.linear import linear
from pyrosome.quant import FORMATS, QuantTensor, format_of, fp4_to_fp8, register_format
from tests.quant.oracle import E2M1, E4M3, e2m1_value, e4m3_value, rounded, scale_exponent

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Whole blocks, part blocks in either dim, less than a block, and stacks of matrices.
SHAPES = [(128, 128), (256, 384), (130, 128), (128, 160), (200, 96), (3, 10), (1, 2), (2, 5, 130, 66), (4, 3, 32)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-4, 4, shape, generator=draw).float())


def random_stored(name: str, shape: tuple[int, ...], seed: int = 0) -> QuantTensor:
    """Any finite codes under any scale whose products are normal float32 numbers."""
    draw = torch.Generator().manual_seed(seed)
    scale_shape = FORMATS[name].scale_shape(shape)
    scale = torch.randint(20, 230, scale_shape, generator=draw, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if name == "fp4":
        packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=draw, dtype=torch.uint8)
        return QuantTensor(name, packed.view(torch.int8), scale)
    codes = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0
    return QuantTensor(name, codes.view(torch.float8_e4m3fn), scale)


def matrix_values(data: Tensor, scale: Tensor, name: str) -> list[list[float]]:
    """The values of one stored matrix, one at a time."""
    rows, columns = FORMATS[name].block
    exponents = (scale.view(torch.uint8).int() - 127).tolist()
    codes = data.view(torch.uint8).tolist()
    if name == "fp4":
        codes = [[c for byte in row for c in (byte & 15, byte >> 4)] for row in codes]
    value = e2m1_value if name == "fp4" else e4m3_value
    return [
        [value(c) * 2.0 ** exponents[n // rows][k // columns] for k, c in enumerate(row)] for n, row in enumerate(codes)
    ]


@pytest.mark.parametrize("name", ["fp8", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_values_one_by_one(name, shape):
    stored = random_stored(name, shape)
    assert stored.shape == shape
    data, scale = (x.view(-1, *x.shape[-2:]) for x in (stored.data, stored.scale))
    expected = [matrix_values(d, s, name) for d, s in zip(data, scale, strict=True)]
    assert torch.equal(stored.dequantize(torch.float64), torch.tensor(expected, dtype=torch.float64).view(shape))


@pytest.mark.parametrize("name", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (130, 66)])
def test_other_dtypes_round_the_exact_value_once(name, dtype, shape):
    stored = random_stored(name, shape)
    found = stored.dequantize(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, stored.dequantize(torch.float64).to(dtype))
    if dtype == torch.bfloat16:
        assert torch.equal(found.double(), stored.dequantize(torch.float64))


def test_dequantised_signs_of_zero_survive():
    stored = QuantTensor("fp8", torch.tensor([[0.0, -0.0]]).to(torch.float8_e4m3fn), byte_scale([[100]]))
    assert stored.dequantize().signbit().tolist() == [[False, True]]


def byte_scale(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_extreme_scales(dtype):
    data = torch.tensor([[0x33] * 16 + [0x11] * 16], dtype=torch.int8)  # 1.5 thirty-two times, then 0.5
    found = QuantTensor("fp4", data, byte_scale([[0, 254]])).dequantize(dtype)
    assert found[0, :32].double().tolist() == [1.5 * 2.0**-127] * 32
    assert found[0, 32:].double().tolist() == [0.5 * 2.0**127] * 32


def test_a_nan_scale_makes_its_block_nan_and_no_other():
    stored = random_stored("fp4", (2, 64))
    scale = stored.scale.view(torch.uint8).clone()
    scale[1, 0] = 255
    found = QuantTensor("fp4", stored.data, scale.view(torch.float8_e8m0fnu)).dequantize()
    assert found[1, :32].isnan().all()
    assert found.isnan().sum() == 32


def test_dequantise_does_not_touch_what_is_stored():
    for name in ("fp8", "fp4"):
        stored = random_stored(name, (128, 128))
        data, scale = stored.data.view(torch.uint8).clone(), stored.scale.view(torch.uint8).clone()
        stored.dequantize().fill_(0)
        assert torch.equal(stored.data.view(torch.uint8), data)
        assert torch.equal(stored.scale.view(torch.uint8), scale)


class TestQuantize:
    @pytest.mark.parametrize("shape", [(2, 64), (3, 40), (5, 2)])
    def test_fp4_is_the_nearest_under_the_least_scale(self, shape):
        weight = noise(*shape)
        found = QuantTensor("fp4", *FORMATS["fp4"].quantize(weight)).dequantize()
        for row, found_row in zip(weight.tolist(), found.tolist(), strict=True):
            for g in range(0, shape[1], 32):
                scale = 2.0 ** scale_exponent(row[g : g + 32], 6.0, 6 * 2.0**-126)
                assert found_row[g : g + 32] == [rounded(v / scale, E2M1) * scale for v in row[g : g + 32]]

    def test_fp8_is_the_nearest_under_the_least_scale(self):
        weight = noise(130, 129)
        data, scale = FORMATS["fp8"].quantize(weight)
        assert (data.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float8_e8m0fnu, (2, 2))
        found = QuantTensor("fp8", data, scale).dequantize()
        for rows in (slice(0, 128), slice(128, 130)):
            for columns in (slice(0, 128), slice(128, 129)):
                block = weight[rows, columns].flatten().tolist()
                factor = 2.0 ** scale_exponent(block, 448.0, 2.0**-120)
                expected = [rounded(v / factor, E4M3) * factor for v in block]
                assert found[rows, columns].flatten().tolist() == expected

    @pytest.mark.parametrize("name", ["fp8", "fp4"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_quantised_bytes_survive_a_round_trip(self, name, shape):
        first = QuantTensor(name, *FORMATS[name].quantize(noise(*shape)))
        # A largest value that rounded down onto the scale's lower edge is stored under half the scale from then on.
        second = QuantTensor(name, *FORMATS[name].quantize(first.dequantize()))
        third = QuantTensor(name, *FORMATS[name].quantize(second.dequantize()))
        assert torch.equal(second.dequantize(), first.dequantize())
        assert torch.equal(third.data.view(torch.uint8), second.data.view(torch.uint8))
        assert torch.equal(third.scale.view(torch.uint8), second.scale.view(torch.uint8))

    @given(st.integers(0, 2**32 - 1), st.integers(2, 250))
    @settings(max_examples=50, deadline=None)
    def test_canonical_fp4_bytes_come_back(self, seed, byte):
        """Canonical: some magnitude is 4 or 6, so that no smaller scale would do."""
        draw = torch.Generator().manual_seed(seed)
        data = torch.randint(0, 256, (3, 32), generator=draw, dtype=torch.uint8)
        data[:, 0::16] |= 0x60
        scale = torch.full((3, 2), byte, dtype=torch.uint8)
        values = QuantTensor("fp4", data.view(torch.int8), scale.view(torch.float8_e8m0fnu)).dequantize()
        again, again_scale = FORMATS["fp4"].quantize(values)
        assert torch.equal(again.view(torch.uint8), data)
        assert torch.equal(again_scale.view(torch.uint8), scale)

    @given(st.integers(0, 2**32 - 1), st.integers(15, 240), st.sampled_from([240.0, 448.0, -256.0]))
    @settings(max_examples=50, deadline=None)
    def test_canonical_fp8_bytes_come_back(self, seed, byte, largest):
        """Canonical: some magnitude is above 224, so that no smaller scale would do."""
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (128, 256), generator=draw, dtype=torch.uint8)
        codes[codes & 127 == 127] = 0
        data = codes.view(torch.float8_e4m3fn)
        data[5, 7::128] = largest
        scale = torch.full((1, 2), byte, dtype=torch.uint8)
        values = QuantTensor("fp8", data, scale.view(torch.float8_e8m0fnu)).dequantize()
        again, again_scale = FORMATS["fp8"].quantize(values)
        assert torch.equal(again.view(torch.uint8), codes)
        assert torch.equal(again_scale.view(torch.uint8), scale)

    @pytest.mark.parametrize("name", ["fp8", "fp4"])
    def test_zeros_have_a_finite_scale(self, name):
        data, scale = FORMATS[name].quantize(torch.zeros(4, 64))
        assert (scale.view(torch.uint8) == 1).all()
        assert torch.equal(QuantTensor(name, data, scale).dequantize(), torch.zeros(4, 64))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", ["fp8", "fp4"])
    def test_takes_any_float_dtype_and_parameters(self, name, dtype):
        weight = noise(16, 64).to(dtype)
        expected = FORMATS[name].quantize(weight.float())
        found = FORMATS[name].quantize(torch.nn.Parameter(weight))
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))

    def test_an_odd_number_of_inputs_does_not_pack(self):
        with pytest.raises(WrongShape, match=r"33 inputs.*FP4"):
            FORMATS["fp4"].quantize(torch.zeros(2, 33))


class TestDetection:
    @pytest.mark.parametrize("name", ["fp8", "fp4"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_what_quantize_makes(self, name, shape):
        data, scale = FORMATS[name].quantize(noise(*shape))
        assert format_of(data, scale) is FORMATS[name]
        assert format_of(data, scale.view(torch.uint8)) is FORMATS[name]  # files without an E8M0 dtype

    @pytest.mark.parametrize(
        ("data", "scale"),
        [
            (torch.zeros(128, 128, dtype=torch.float8_e4m3fn), torch.zeros(2, 1, dtype=torch.float8_e8m0fnu)),
            (torch.zeros(128, 128, dtype=torch.float8_e4m3fn), torch.zeros(1, 1)),
            (torch.zeros(128, 128, dtype=torch.float8_e5m2), torch.zeros(1, 1, dtype=torch.float8_e8m0fnu)),
            (torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 1, dtype=torch.float8_e8m0fnu)),
            (torch.zeros(128, dtype=torch.float8_e4m3fn), torch.zeros(1, dtype=torch.float8_e8m0fnu)),
        ],
    )
    def test_anything_else_is_refused_by_what_it_is(self, data, scale):
        with pytest.raises(UnsupportedFormat, match=r"none of the known weight formats \(fp8, fp4\)") as error:
            format_of(data, scale)
        assert str(tuple(data.shape)) in str(error.value)
        assert str(scale.dtype) in str(error.value)

    def test_no_scale_no_format(self):
        with pytest.raises(UnsupportedFormat, match="no scale"):
            format_of(torch.zeros(4, 4), None)


class TestQuantTensor:
    @pytest.mark.parametrize(("name", "shape", "num_bytes"), [("fp8", (256, 384), 98310), ("fp4", (256, 384), 52224)])
    def test_bytes(self, name, shape, num_bytes):
        assert random_stored(name, shape).nbytes == num_bytes

    @pytest.mark.parametrize("name", ["fp8", "fp4"])
    def test_picking_from_a_stack(self, name):
        stack = random_stored(name, (5, 6, 64))
        picked = stack.index_select(torch.tensor([3, 0, 3]))
        assert (picked.format, picked.shape) == (name, (3, 6, 64))
        assert (picked.data.dtype, picked.scale.dtype) == (stack.data.dtype, stack.scale.dtype)
        assert torch.equal(picked.dequantize(), stack.dequantize()[[3, 0, 3]])

    def test_moving_keeps_the_bytes(self):
        stored = random_stored("fp8", (64, 64))
        moved = stored.to("cpu")
        assert moved.device == torch.device("cpu")
        assert torch.equal(moved.data.view(torch.uint8), stored.data.view(torch.uint8))

    def test_a_format_nobody_registered(self):
        with pytest.raises(UnsupportedFormat, match="'fp3' is unknown; registered are fp8, fp4"):
            QuantTensor("fp3", torch.zeros(2, 2), torch.zeros(1))

    def test_a_scale_of_another_shape(self):
        with pytest.raises(WrongShape, match=r"\(2, 1\).*\(1, 1\)"):
            QuantTensor("fp8", torch.zeros(64, 64, dtype=torch.float8_e4m3fn), byte_scale([[1], [1]]))


class TestFP4ToFP8:
    @pytest.mark.parametrize("shape", [(256, 256), (130, 96), (3, 40, 64)])
    def test_the_values_are_the_same(self, shape):
        draw = torch.Generator().manual_seed(0)
        stored = random_stored("fp4", shape)
        scale = torch.randint(110, 125, tuple(stored.scale.shape), generator=draw, dtype=torch.uint8)
        stored = QuantTensor("fp4", stored.data, scale.view(torch.float8_e8m0fnu))
        found = fp4_to_fp8(stored)
        assert (found.format, found.shape) == ("fp8", shape)
        assert torch.equal(found.dequantize(), stored.dequantize())

    def test_a_block_scale_is_its_largest_group_scale_by_64(self):
        stored = random_stored("fp4", (128, 128))
        scale = stored.scale.view(torch.uint8).clone().fill_(120)
        scale[77, 2] = 126
        found = fp4_to_fp8(QuantTensor("fp4", stored.data, scale.view(torch.float8_e8m0fnu)))
        assert found.scale.view(torch.uint8).tolist() == [[120]]

    @pytest.mark.parametrize(("span", "fits"), [(0, True), (6, True), (14, True), (15, False), (40, False)])
    def test_it_fits_up_to_a_span_of_fourteen_binades(self, span, fits):
        data = torch.full((1, 32), 0x31, dtype=torch.int8)  # 0.5 and 1.5: what is lost first
        stored = QuantTensor("fp4", data, byte_scale([[150, 150 - span]]))
        if fits:
            assert torch.equal(fp4_to_fp8(stored).dequantize(), stored.dequantize())
        else:
            with pytest.raises(UnsupportedFormat, match=r"32 of 64 values would be rounded.*2\^14.*keep it in FP4"):
                fp4_to_fp8(stored)

    def test_only_fp4_has_it(self):
        with pytest.raises(UnsupportedFormat, match="is in fp8"):
            fp4_to_fp8(random_stored("fp8", (4, 4)))


@dataclasses.dataclass(frozen=True)
class Int4Groups:
    """Symmetric integers -7..7, two to a byte, with a float32 scale per 128 inputs: a format of somebody else's."""

    name: str = "int4"
    block: tuple[int, int] = (1, 128)

    def detect(self, data_dtype, scale_dtype, data_shape, scale_shape):
        return (data_dtype, scale_dtype) == (torch.uint8, torch.float32) and scale_shape == self.scale_shape(
            self.logical_shape(data_shape)
        )

    def logical_shape(self, data_shape):
        return (*data_shape[:-1], 2 * data_shape[-1])

    def scale_shape(self, logical_shape):
        return (*logical_shape[:-1], math.ceil(logical_shape[-1] / 128))

    def dequantize(self, data, scale, dtype):
        signed = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2).to(dtype) - 8
        return signed * scale.to(dtype).repeat_interleave(128, -1)[..., : signed.shape[-1]]

    def quantize(self, weight):
        scale = torch.stack([g.abs().amax(-1) for g in weight.split(128, -1)], dim=-1) / 7
        codes = (weight / scale.repeat_interleave(128, -1)[..., : weight.shape[-1]]).round() + 8
        codes = codes.to(torch.uint8)
        return codes[..., 0::2] | codes[..., 1::2] << 4, scale


@pytest.fixture
def int4():
    yield register_format(Int4Groups())
    del FORMATS["int4"]


class TestAThirdFormat:
    def test_is_found_read_and_multiplied_like_the_others(self, int4):
        weight = torch.randint(-7, 8, (2, 6, 200), generator=torch.Generator().manual_seed(0)).float()
        weight[..., 0], weight[..., 128] = 7, -7
        weight[..., 128:] *= 0.25
        data, scale = int4.quantize(weight)
        assert format_of(data, scale) is int4
        stored = QuantTensor("int4", data, scale)
        assert (stored.shape, stored.nbytes) == ((2, 6, 200), 2 * 6 * (100 + 2 * 4))
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert torch.equal(stored.dequantize(dtype), weight.to(dtype))
        picked = stored.index_select(torch.tensor([1]))
        assert torch.equal(picked.dequantize(), weight[1:])
        x = torch.eye(200)[:3]
        one = QuantTensor("int4", data[0], scale[0])
        assert torch.equal(linear(x, one), weight[0, :, :3].T)

    def test_leaves_the_others_as_they_were(self, int4):
        for name in ("fp8", "fp4"):
            assert format_of(*FORMATS[name].quantize(noise(4, 64))).name == name

    def test_a_taken_name_is_refused(self, int4):
        with pytest.raises(UnsupportedFormat, match="'int4' is registered already"):
            register_format(Int4Groups())
