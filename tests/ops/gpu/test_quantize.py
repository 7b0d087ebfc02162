"""Rows rounded by Triton have the bits of `quantize_activation`; split into parts they lose nothing."""

from __future__ import annotations

import pytest
import torch

from pyrosome.ops.linear.quantize import padded, prepared_rows
from pyrosome.quant import e8m0_to_float, quantize_activation, round_activation
from tests.ops.gpu.held import DEVICE, rms, same_bits

EDGES = [0.0, -0.0, 1e-4, -1e-4, 9.9e-5, 448.0, 448.00003, -448.0, 2.0**-149, 2.0**-126, 3e38, -3e38, 447.9, 1.0]


def drawn(M: int, K: int, seed: int = 0) -> torch.Tensor:
    """Rows of magnitudes from 2^-40 to 2^40."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(M, K, generator=generator)
        * torch.exp2(torch.randint(-40, 40, (M, K // 16 + 1), generator=generator).float()).repeat_interleave(16, 1)[
            :, :K
        ]
    )


def quantized_rows(x: torch.Tensor, norm: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    rows = prepared_rows(x, norm, codes=True)
    assert rows.codes_MP is not None and rows.scale_MG is not None
    return rows.codes_MP, rows.scale_MG


def rounded_rows(x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
    rows = prepared_rows(x, norm, rounded=True)
    assert rows.rounded_MP is not None
    return rows.rounded_MP


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What the kernel itself makes of rows and norm."""
    found = prepared_rows(x, weight, eps, plain=True).plain_MP
    assert found is not None
    return found[:, : x.shape[1]]


@pytest.mark.parametrize(("M", "K"), [(1, 128), (3, 1), (2, 200), (5, 1024), (2, 1300), (1, 4096)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rows_are_rounded_to_the_bits_of_the_definition(M, K, has_norm):
    x = drawn(M, K).to(DEVICE)
    norm = torch.randn(K, generator=torch.Generator().manual_seed(2)).to(DEVICE) if has_norm else None
    made = prepared_rows(x, norm, 1e-6, codes=True, rounded=True, plain=True)  # of one norm: two may differ by a bit
    wanted = made.plain_MP[:, :K]
    if norm is None:
        assert same_bits(wanted, x)
    codes, scale = quantize_activation(wanted)
    assert made.codes_MP.shape == (M, padded(K))
    assert torch.equal(made.codes_MP[:, :K], codes.view(torch.uint8))
    assert not made.codes_MP[:, K:].any()
    assert same_bits(made.scale_MG, e8m0_to_float(scale))
    assert made.rounded_MP.dtype == torch.bfloat16
    assert same_bits(made.rounded_MP[:, :K].float(), round_activation(wanted))
    assert not made.rounded_MP[:, K:].any()


def test_each_edge_alone_and_among_others():
    rows = torch.zeros(2 * len(EDGES), 128)
    for i, value in enumerate(EDGES):
        rows[2 * i, i] = value
        rows[2 * i + 1] = torch.tensor(EDGES[: i + 1]).repeat(128)[:128]
    codes, scale = quantized_rows(rows.to(DEVICE))
    wanted, wanted_scale = quantize_activation(rows)
    assert torch.equal(codes.cpu(), wanted.view(torch.uint8))
    assert same_bits(scale.cpu(), e8m0_to_float(wanted_scale))


def test_every_largest_magnitude_gets_the_scale_of_the_definition():
    """The steps beside 448 x 2^k and 2^k, where a quotient could be rounded across a power of two."""
    near = torch.tensor([448.0, 1.0]).view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    sizes = torch.cat([near.flatten() + (k << 23) for k in range(-20, 100, 7)]).view(torch.float32)
    rows = torch.zeros(len(sizes), 128)
    rows[:, 5] = sizes
    rows = rows.view(-1, 14 * 128)
    _, scale = quantized_rows(rows.to(DEVICE))
    assert same_bits(scale.cpu(), e8m0_to_float(quantize_activation(rows)[1]))


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_group_with_no_number_has_none_and_its_neighbours_keep_theirs(bad):
    x = torch.randn(2, 384, generator=torch.Generator().manual_seed(3))
    x[1, 130] = bad
    _, scale = quantized_rows(x.to(DEVICE))
    assert scale.isnan().tolist() == [[False] * 3, [False, True, False]]
    values = rounded_rows(x.to(DEVICE)).float().cpu()
    assert values[1, 128:256].isnan().all()
    wanted = round_activation(x)
    assert torch.equal(values.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("K", [1, 130, 1024])
def test_parts_add_up_to_the_row(K):
    x = drawn(3, K).to(DEVICE)
    x[1] = x[1].bfloat16().float()
    made = prepared_rows(x, parts=True)
    parts, deep = made.parts_3MP.double().cpu(), made.deep_M.tolist()
    assert torch.equal(parts.sum(0)[:, :K], x.double().cpu())
    assert not parts[:, :, K:].any()
    assert deep[1] == 0
    assert deep == [int(parts[1:, i].any()) for i in range(3)]


def test_what_is_infinite_stays_so_in_parts():
    x = torch.tensor([[3.4e38, float("inf"), -float("inf"), float("nan"), 3.1415927]], device=DEVICE)
    parts = prepared_rows(x, parts=True).parts_3MP.float().sum(0)[:, :5]
    assert torch.equal(parts.nan_to_num(7.0), x.nan_to_num(7.0))
    assert parts[0, 3].isnan()


def test_a_norm_is_the_definition_and_the_same_for_a_row_among_others():
    x, norm = drawn(4, 300, seed=5).to(DEVICE), torch.randn(300, device=DEVICE).bfloat16()
    wide = x.double()
    wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
    together = normed(x, norm, 1e-6)
    assert rms(together, wanted) < 1e-6
    for i in range(4):
        assert same_bits(normed(x[i : i + 1], norm, 1e-6), together[i : i + 1])


def test_every_form_at_once_is_each_form_alone():
    x = drawn(3, 260, seed=6).to(DEVICE)
    norm = torch.randn(260) if DEVICE.type == "cpu" else None  # two kernels' norms may differ by a bit on a device
    forms = {"codes": (0, 1), "rounded": (2,), "parts": (3, 4), "plain": (5,)}
    together = prepared_rows(x, norm, 1e-6, **dict.fromkeys(forms, True))
    for form, places in forms.items():
        alone = prepared_rows(x, norm, 1e-6, **{form: True})
        assert [i for i, made in enumerate(alone) if made is not None] == list(places)
        assert all(torch.equal(alone[i], together[i]) for i in places)


def test_scales_side_by_side_for_a_tile_of_tokens():
    x = drawn(17, 1300, seed=7).to(DEVICE)
    codes, scale = quantized_rows(x)
    assert torch.equal(rounded_rows(x)[:, :1300].float(), round_activation(x))
    made = prepared_rows(x, columns=True)
    assert made.scale_MG is None
    assert torch.equal(made.codes_MP, codes)
    assert made.scale_GM.shape == (11, 32)
    assert same_bits(made.scale_GM[:, :17].t(), scale)


def test_no_rows_no_channels_and_rows_apart():
    assert [t.shape for t in quantized_rows(torch.empty(0, 200, device=DEVICE))] == [(0, 256), (0, 2)]
    assert [t.shape for t in quantized_rows(torch.empty(2, 0, device=DEVICE))] == [(2, 0), (2, 0)]
    x = drawn(6, 300).to(DEVICE)
    codes, _ = quantized_rows(x[::2, 20:280])
    assert torch.equal(codes[:, :260], quantize_activation(x[::2, 20:280])[0].view(torch.uint8))


def test_a_norm_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match=r"rows of 64 channels .* norm of \(32,\)"):
        quantized_rows(torch.zeros(1, 64, device=DEVICE), torch.ones(32, device=DEVICE))
    with pytest.raises(RuntimeError, match="at most 65536"):
        rounded_rows(torch.zeros(1, 65537, device=DEVICE), torch.ones(65537, device=DEVICE))
