"""`rms_norm` by Triton equals its definition, for any rows, and compiles for every architecture."""

from __future__ import annotations

import pytest
import torch

from pyrosome.ops.rms_norm import rms_norm
from tests.ops.gpu.held import DEVICE, kernels, rms, same_bits


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (1, 4096), (5, 100)])
@pytest.mark.parametrize("has_weight", [False, True])
def test_rows_of_any_width(shape, has_weight):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight = torch.randn(shape[-1], device=DEVICE) if has_weight else None
    with kernels(rms_norm):
        assert rms_norm.chosen(x, weight) == "triton"
        found = rms_norm(x, weight, 1e-6)
    assert rms(found, rms_norm.definition(x, weight, 1e-6)) < 1e-6


def test_no_rows_and_rows_apart():
    with kernels(rms_norm):
        assert rms_norm(torch.empty(0, 8, device=DEVICE), None, 1e-6).shape == (0, 8)
        x = torch.randn(6, 16, device=DEVICE)
        assert rms(rms_norm(x[::2, 1:9], None, 1e-6), rms_norm.definition(x[::2, 1:9], None, 1e-6)) < 1e-6


def test_a_row_has_the_same_bits_whatever_is_beside_it():
    x = torch.randn(9, 300, device=DEVICE)
    with kernels(rms_norm):
        together = rms_norm(x, None, 1e-6)
        for i in range(9):
            assert same_bits(rms_norm(x[i : i + 1], None, 1e-6), together[i : i + 1])
