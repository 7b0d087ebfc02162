"""`compress`: the definition against the whole-sequence formula, kernels against the definition."""

import pytest
import torch

from pyrosome.errors import KernelUnavailable
from pyrosome.ops.compress import Emit, compress
from pyrosome.ops.seam import use

D, N, SPARE, PADDING = 8, 40, 3, 2  # channels, tokens, ring rows beyond the window, padding rows per step


def whole_sequence(kv, gate, bias, overlap):
    """The model's formula for a full sequence at once: no cache, no steps."""
    P = bias.shape[0]
    kv, gate = (x[: len(x) // P * P].unflatten(0, (-1, P)) for x in (kv, gate))
    gate = gate + bias
    if overlap:

        def older(x, fill):
            return torch.cat([x.new_full((1, P, D), fill), x[:-1, :, :D]])

        kv = torch.cat([older(kv, 0.0), kv[..., D:]], dim=1)
        gate = torch.cat([older(gate, float("-inf")), gate[..., D:]], dim=1)
    return (kv * gate.softmax(1)).sum(1)


def in_steps(kv, gate, bias, width, cuts, drafts=0):
    """Feed the sequence in spans that end at `cuts`, writing `drafts` rejected tokens after each."""
    P, R = bias.shape[0], width + SPARE
    tail_kv, tail_gate = torch.full((2, 3, R, kv.shape[1]), float("nan"))  # poison: every read must be justified
    rows, start = [], 0
    for stop in [*cuts, len(kv)]:
        ends = [p for p in range(start, stop) if (p + 1) % P == 0]
        end = torch.tensor(ends + [-1] * PADDING)
        emit = Emit((end - start).clamp(min=0), end, torch.full_like(end, start), torch.full_like(end, 1))
        out = compress(kv[start:stop], gate[start:stop], tail_kv, tail_gate, bias, emit, width)
        assert not out[len(ends) :].any(), "a padding row must yield zeros"
        rows.append(out[: len(ends)])
        for p in range(max(start, stop - R), stop + drafts):
            tail_kv[1, p % R], tail_gate[1, p % R] = (kv[p], gate[p]) if p < stop else (999.0, 999.0)
        start = stop
    return torch.cat(rows)


def example(P, overlap):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, D * (1 + overlap), generator=g) for n in (N, N, P)]


layers = pytest.mark.parametrize(("P", "overlap"), [(4, True), (8, False)], ids=["csa", "hca"])


@layers
def test_rows_do_not_depend_on_where_the_sequence_was_cut(P, overlap):
    kv, gate, bias = example(P, overlap)
    expected = whole_sequence(kv, gate, bias, overlap)
    with use(compress, "torch"):
        assert compress.chosen(kv) == "torch"
        for cut in range(1, N):
            torch.testing.assert_close(in_steps(kv, gate, bias, P * (1 + overlap), [cut]), expected)


@layers
def test_one_step_and_token_by_token_agree_to_the_bit(P, overlap):
    kv, gate, bias = example(P, overlap)
    with use(compress, "torch"):
        once, by_token = (in_steps(kv, gate, bias, P * (1 + overlap), cuts) for cuts in ([], range(1, N)))
    assert torch.equal(once, by_token)


@layers
@pytest.mark.parametrize("drafts", range(SPARE + 3))
def test_a_ring_of_window_plus_drafts_minus_one_rows_survives_rejection(P, overlap, drafts):
    kv, gate, bias = example(P, overlap)
    expected = whole_sequence(kv, gate, bias, overlap)
    with use(compress, "torch"):
        survived = all(
            torch.allclose(in_steps(kv, gate, bias, P * (1 + overlap), [cut], drafts), expected, atol=1e-5)
            for cut in range(1, N)
        )
    assert survived == (drafts - 1 <= SPARE)


def test_a_kernel_asked_for_by_name_that_cannot_run_is_an_error():
    kv, gate, bias = example(4, True)
    with use(compress, "no such kernel"), pytest.raises(KernelUnavailable, match="was asked for"):
        in_steps(kv, gate, bias, 8, [])
