"""Quantisers against the official unit vectors, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pyrosome.quant import QuantTensor, format_of, hadamard, quantize_activation, simulate_fp4, simulate_fp8
from tests.golden.vectors import GOLDEN, vectors

WEIGHTS = {
    "layers.0.attn.wq_b.weight": "fp8",
    "layers.2.attn.wo_a.weight": "fp8",
    "layers.1.ffn.experts.1.w2.weight": "fp4",
}


@functools.cache
def checkpoint() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fp8fp4" / "model-00001-of-00001.safetensors")


def golden(name: str) -> Tensor:
    return vectors("fp8fp4_vectors")[name]


def test_activation_codes_and_scales():
    codes, scale = quantize_activation(golden("actquant.x"), 128)
    assert torch.equal(codes.view(torch.uint8), golden("actquant.q"))
    assert torch.equal(scale.view(torch.uint8), golden("actquant.s"))


def test_fp8_round_trip_of_kv_groups():
    assert torch.equal(simulate_fp8(golden("actquant.x"), 64), golden("fp8sim64.y"))


def test_fp4_round_trip():
    assert torch.equal(simulate_fp4(golden("actquant.x")), golden("fp4sim.y"))


def test_hadamard():
    """The same order of additions as the official kernel's: equal to the bit, beyond the 1e-6 asked for."""
    assert torch.equal(hadamard(golden("hadamard.x")), golden("hadamard.y"))


@pytest.mark.parametrize(("name", "format_name"), WEIGHTS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dequantised_weights(name, format_name, dtype):
    data, scale = checkpoint()[name], checkpoint()[name.removesuffix("weight") + "scale"]
    assert format_of(data, scale).name == format_name
    expected = golden(f"dequant.{name}")
    found = QuantTensor(format_name, data, scale).dequantize(dtype)
    assert found.dtype == dtype
    assert torch.equal(found[:, : expected.shape[1]], expected.to(dtype))


def test_every_scaled_tensor_of_the_checkpoint_has_a_format():
    tensors = checkpoint()
    pairs = [(tensors[n.removesuffix("scale") + "weight"], t) for n, t in tensors.items() if n.endswith(".scale")]
    found = [format_of(data, scale).name for data, scale in pairs]
    num_blocks, num_experts = 3 + 1, 4  # trunk and MTP
    assert found.count("fp4") == num_blocks * num_experts * 3
    # Five attention projections and three of the shared expert per block, one indexer, e_proj and h_proj.
    assert found.count("fp8") == num_blocks * (5 + 3) + 1 + 2
    assert len(found) == found.count("fp4") + found.count("fp8")
