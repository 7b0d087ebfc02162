"""Pooling by Triton: the definition's rows, whatever the cut into steps, and what a compressed row ends with."""

from __future__ import annotations

import functools
import mmap

import pytest
import torch

from pyrosome.ops.compress import Emit, compress, compressed_rows
from pyrosome.quant import round_kv, simulate_fp8, unchanged
from tests.ops.gpu.held import DEVICE, kernels, rms, same_bits

NO_RESERVE = 0x4000  # Linux: address space that no memory is set aside for
N, SPARE, PADDING = 40, 3, 2  # tokens, ring rows beyond the window, padding rows per step
# ratio, window, channels of a row
LAYERS = {
    "csa": (4, 8, 10),
    "long": (10, 20, 3),
    "hca": (8, 8, 10),
    "of one": (1, 1, 6),
    "odd": (3, 6, 7),
    "wide": (20, 20, 130),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(x):
    if isinstance(x, Emit):
        return Emit(*map(moved, x))
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def run(op, *args):
    args = [moved(a) for a in args]
    with kernels(op):
        assert op.chosen(*args) == "triton"
        return op(*args).cpu()


def by_definition(op, *args):
    return op.definition(*args)


def example(layer, seed=0):
    P, W, D = LAYERS[layer]
    E = D * W // P
    return draw(N, E, seed=seed), draw(N, E, seed=seed + 1) * 3, draw(P, E, seed=seed + 2)


def in_steps(pool, layer, cuts, slot=1):
    """Feed the sequence in spans that end at `cuts`; rings hold NaN wherever nothing was written."""
    kv, gate, bias = example(layer)
    P, W, _ = LAYERS[layer]
    R = W + SPARE
    tail_kv, tail_gate = torch.full((2, 3, R, kv.shape[1]), float("nan"))
    rows, start = [], 0
    for stop in [*cuts, N]:
        ends = [p for p in range(start, stop) if (p + 1) % P == 0]
        end = torch.tensor(ends + [-1] * PADDING)
        emit = Emit((end - start).clamp(min=0), end, torch.full_like(end, start), torch.full_like(end, slot))
        out = pool(kv[start:stop], gate[start:stop], tail_kv, tail_gate, bias, emit, W)
        assert not out[len(ends) :].any(), "a padding row must yield zeros"
        rows.append(out[: len(ends)])
        for p in range(max(start, stop - R), stop):
            tail_kv[slot, p % R], tail_gate[slot, p % R] = kv[p], gate[p]
        start = stop
    return torch.cat(rows)


@layers
def test_rows_are_the_definitions_and_do_not_depend_on_where_the_sequence_was_cut(layer):
    wanted = in_steps(functools.partial(by_definition, compress), layer, [])
    whole = in_steps(functools.partial(run, compress), layer, [])
    torch.testing.assert_close(whole, wanted, rtol=2e-6, atol=2e-6)
    for cuts in ([1], [7, 9], [20, 23], [33], range(1, N, 5)):
        assert same_bits(in_steps(functools.partial(run, compress), layer, cuts), whole), cuts


def finished(layer, F, round_nope, rows=None):
    """Arguments of `compressed_rows` for the sequence in one step, two padding rows among its own."""
    kv, gate, bias = example(layer)
    P, W, D = LAYERS[layer]
    end = torch.tensor([p for p in range(N) if (p + 1) % P == 0])
    end = torch.cat([end[:1], torch.tensor([-1]), end[1:], torch.tensor([-1])])
    emit = Emit(*((x if rows is None else x[rows]) for x in (end.clamp(min=0), end, end * 0, end * 0)))
    angle = draw(len(emit.end) if rows is None else len(end), F, seed=7) * 3
    turn = torch.complex(angle.cos(), angle.sin())
    tail = torch.full((1, W, kv.shape[1]), float("nan"))
    return (
        kv,
        gate,
        tail,
        tail,
        bias,
        emit,
        W,
        draw(D, seed=8),
        turn if rows is None else turn[rows],
        1e-6,
        round_nope,
    )


@pytest.mark.parametrize("layer", ["csa", "wide"])
@pytest.mark.parametrize("round_nope", [unchanged, round_kv, functools.partial(simulate_fp8, group=4)])
@pytest.mark.parametrize("F", [1, 4])
def test_compressed_rows(layer, round_nope, F):
    args = finished(layer, F, round_nope)
    found, wanted = run(compressed_rows, *args), compressed_rows.definition(*args)
    assert rms(found, wanted) < (2e-6 if round_nope is unchanged else 2e-3)
    assert not found[1].any() and not found[-1].any()
    if round_nope is round_kv:  # of the row that the kernel itself makes, the rounding is the definition's to the bit
        nope = found.shape[1] - 2 * F
        plain = run(compressed_rows, *finished(layer, F, unchanged))
        assert same_bits(found[:, nope:], plain[:, nope:]) and not same_bits(found, plain)
        assert same_bits(found[:, :nope].abs(), round_kv(plain[:, :nope]).abs())  # a padding row's zeros have any sign


def test_a_row_has_the_same_bits_in_any_company():
    whole = run(compressed_rows, *finished("wide", 4, round_kv))
    for m in range(len(whole)):
        assert same_bits(run(compressed_rows, *finished("wide", 4, round_kv, [m])), whole[m : m + 1])


def test_true_widths():
    """CSA and HCA rows of 512 channels, half of an HCA window in the ring."""
    for P, W, start in ((4, 8, 125), (128, 128, 64)):
        E, R = 512 * W // P, W + 2
        kv, gate, bias = draw(130, E), draw(130, E, seed=1), draw(P, E, seed=2)
        tails = torch.zeros(2, 2, R, E)
        for p in range(max(0, start - R), start):
            tails[:, 1, p % R] = torch.stack([kv[p], gate[p]])
        emit = Emit(*(torch.tensor(x) for x in ([127 - start, 0], [127, -1], [start, 0], [1, 0])))
        turn = torch.polar(torch.ones(2, 32), draw(2, 32, seed=4))
        args = (kv[start:], gate[start:], *tails, bias, emit, W, draw(512, seed=3), turn, 1e-6)
        found, wanted = run(compressed_rows, *args, unchanged), compressed_rows.definition(*args, unchanged)
        assert rms(found, wanted) < 2e-6
        assert rms(run(compressed_rows, *args, round_kv), compressed_rows.definition(*args, round_kv)) < 2e-3


def test_nothing_to_emit_and_nothing_to_read():
    kv, gate, bias = example("csa")
    nothing, tail = torch.empty(0, dtype=torch.int64), torch.zeros(1, 8, 20)
    for T in (0, N):
        assert run(compress, kv[:T], gate[:T], tail, tail, bias, Emit(*[nothing] * 4), 8).shape == (0, 10)
    none = Emit(*(torch.tensor([x]) for x in (0, -1, 0, 0)))
    assert same_bits(run(compress, kv[:0], gate[:0], tail, tail, bias, none, 8), torch.zeros(1, 10))


def test_infinities_and_nan_are_the_definitions():
    kv, gate, bias = (x.clone() for x in example("csa"))
    gate[:, 11], gate[5, 12], gate[5, 13], kv[5, 14] = float("-inf"), float("inf"), float("nan"), float("nan")
    gate[:4, 15], gate[6, 16], kv[2, 0], gate[2, 0] = float("-inf"), float("-inf"), float("inf"), float("-inf")
    end = torch.arange(3, N, 4)
    args = (kv, gate, *[torch.zeros(1, 8, 20)] * 2, bias, Emit(end, end, end * 0, end * 0), 8)
    found, wanted = run(compress, *args), compress.definition(*args)
    assert wanted.isnan().any()
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_tensors_that_lie_apart_and_at_any_address():
    kv, gate, bias = example("csa")
    both = torch.cat([kv, gate], dim=1).t().contiguous().t()
    end = torch.arange(3, N, 4).repeat_interleave(2)[::2]
    tails = draw(3, 8, 43)[1:, :, 2:22]
    emit = Emit(end, end, end * 0 + 6, end * 0 + 1)
    args = (both[:, :20], both[:, 20:], tails, tails + 1, bias.t().contiguous().t(), emit, 8)
    torch.testing.assert_close(run(compress, *args), compress.definition(*args), rtol=2e-6, atol=2e-6)


def test_what_does_not_fit_is_refused():
    kv, gate, bias = example("csa")
    tail, end = torch.zeros(1, 8, 20), torch.tensor([3, 7])
    emit = Emit(end, end, end * 0, end * 0)
    right = [kv, gate, tail, tail, bias, emit, 8]
    wrong = {
        0: kv[:, :19],
        1: gate[:30],
        2: tail[0],
        3: tail[:, :7],
        4: bias[:, :18],
        5: emit._replace(slot=end[:1]),
        6: 16,
    }
    for i, x in wrong.items():
        with pytest.raises(RuntimeError, match="need kv and gate"):
            run(compress, *right[:i], x, *right[i + 1 :])
    turn, norm = torch.ones(2, 2) + 0j, torch.ones(10)
    for norm_D, rotation in ((norm[:9], turn), (norm, turn[:1]), (norm, torch.ones(2, 6) + 0j)):
        with pytest.raises(RuntimeError, match=r"need a norm \[10\]"):
            run(compressed_rows, *right, norm_D, rotation, 1e-6)


def test_a_ring_may_lie_beyond_two_thousand_million_elements():
    P, W, E, R = 4, 4, 64, 64
    S = (1 << 31) // (R * E) + 2
    if DEVICE.type == "cpu":  # address space alone: a page is there once it is written
        held = mmap.mmap(-1, S * R * E * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        tail = torch.frombuffer(held, dtype=torch.float32).view(S, R, E)
    else:
        tail = torch.empty(S, R, E, device=DEVICE)
    tail[S - 1, :W] = draw(W, E).to(DEVICE)
    emit = Emit(*(torch.tensor([x]) for x in (0, 3, 4, S - 1)))
    fresh, bias = torch.zeros(1, E), draw(P, E, seed=1)
    found = run(compress, fresh, fresh, tail, tail, bias, emit, W)
    small = tail[S - 1 :].cpu().clone()
    wanted = compress.definition(fresh, fresh, small, small, bias, emit._replace(slot=torch.tensor([0])), W)
    assert wanted.any() and rms(found, wanted) < 2e-6
