"""Hyper-connections by Triton equal their definitions, and a token's bits depend on nothing beside it."""

from __future__ import annotations

import pytest
import torch

from pyrosome.ops import gpu
from pyrosome.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_in,
    hyper_connection_out,
    hyper_connection_turn,
    triton,
)
from pyrosome.ops.hyper_connection.triton import VARIANTS
from tests.ops.gpu.held import CAPABILITIES, DEVICE, kernels, rms, same_bits

EPS = 1e-6
NUMBERS = EPS, EPS, 20
OPS = hyper_connection_in, hyper_connection_out, hyper_connection_turn, hyper_connection_head
# Tokens, streams, channels: one stream and eight; tails of a chunk, of a segment and of a tile of tokens.
SHAPES = [(1, 4, 256), (5, 4, 3), (3, 3, 130), (2, 1, 64), (17, 2, 33), (1, 8, 20), (33, 4, 32), (1, 4, 1)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def example(op, T, J, D, with_norm=True):
    """Arguments of an op, with weights that mix by about one."""
    head = op is hyper_connection_head
    rows = J if head else (2 + J) * J
    weights = draw(rows, J * D, seed=1) / (J * D) ** 0.5, draw(rows, seed=2), draw(1 if head else 3, seed=3)
    norm = (draw(D, seed=4),) if with_norm else ()
    out = draw(T, D, seed=5), draw(T, J, seed=6), draw(T, J, J, seed=7).softmax(1)
    rest = {
        "hyper_connection_in": (*weights, *NUMBERS, *norm),
        "hyper_connection_turn": (*out, *weights, *NUMBERS, *norm),
        "hyper_connection_out": out,
        "hyper_connection_head": (*weights, EPS, EPS),
    }
    return 3 * draw(T, J, D), *rest[op.name]


def run(op, *args, **variants):
    """What the kernel makes, as a tuple."""
    with kernels(op), gpu.forced(**variants):
        assert op.chosen(*args) == "triton"
        made = op(*args)
    return made if isinstance(made, tuple) else (made,)


def defined(op, *args):
    made = op.definition(*args)
    return made if isinstance(made, tuple) else (made,)


def agree(found, wanted, within=2e-6):
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and (not a.numel() or rms(a, b) < within)
        for a, b in zip(found, wanted, strict=True)
    )


def alike(found, wanted):
    """The same bits; in the interpreter products of tiles are numpy's, whose order of sums follows the tile's shape."""
    return same_bits(found, wanted) if DEVICE.type == "cuda" else agree((found,), (wanted,), 1e-6)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_definition(op, shape):
    args = example(op, *shape)
    assert agree(run(op, *args), defined(op, *args))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_branch_is_of_an_architecture(capability):
    args = example(hyper_connection_turn, 2, 4, 40)
    with kernels(hyper_connection_turn, capability):
        assert agree(hyper_connection_turn(*args), defined(hyper_connection_turn, *args))


@pytest.mark.parametrize("iters", [1, 2, 3])
@pytest.mark.parametrize(("norm_eps", "hc_eps"), [(0.5, EPS), (EPS, 0.05), (EPS, 0.0)])
@pytest.mark.parametrize("with_norm", [True, False])
def test_each_eps_and_iteration_is_where_it_belongs(iters, norm_eps, hc_eps, with_norm):
    streams, fn, base, scale, *_, norm = example(hyper_connection_in, 2, 4, 8)
    args = streams, fn, base, scale, norm_eps, hc_eps, iters, norm if with_norm else None
    assert agree(run(hyper_connection_in, *args), defined(hyper_connection_in, *args))
    head = streams, fn[:4], base[:4], scale[:1], norm_eps, hc_eps
    assert agree(run(hyper_connection_head, *head), defined(hyper_connection_head, *head))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_tokens(op):
    args = example(op, 0, 4, 8)
    assert agree(run(op, *args), defined(op, *args))


@pytest.mark.parametrize("op", [hyper_connection_turn, hyper_connection_head])
def test_a_token_is_the_same_in_every_variant_and_alone(op):
    T, J, D = 33, 4, 160
    args = example(op, T, J, D)
    whole = {name: run(op, *args, hyper_connection_mix=name) for name in VARIANTS}
    for name in VARIANTS:
        assert agree(whole[name], defined(op, *args))
        assert all(map(alike, whole[name], whole["few"]))
        for t in (0, T - 1):
            alone = [x[t : t + 1] if isinstance(x, torch.Tensor) and x.shape[:1] == (T,) else x for x in args]
            made = run(op, *alone, hyper_connection_mix=name)
            assert all(same_bits(a, b[t : t + 1]) for a, b in zip(made, whole[name], strict=True))


def test_a_token_s_matrix_is_the_same_by_a_program_of_its_own(monkeypatch):
    args = example(hyper_connection_in, 5, 4, 200)
    with gpu.tracing(90) as launches:
        gpu.of(hyper_connection_in)(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
    assert launches[-1].grid == (2, 5)
    apart = run(hyper_connection_in, *args)
    monkeypatch.setattr(triton, "_MOST_APART", 4)
    assert all(map(same_bits, run(hyper_connection_in, *args), apart))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_turn_is_out_and_in_to_the_bit(variant):
    args = example(hyper_connection_turn, 6, 4, 200)
    streams, made = args[0], run(hyper_connection_turn, *args, hyper_connection_mix=variant)
    (new,) = run(hyper_connection_out, streams, *args[1:4])
    assert same_bits(made[0], new)
    again = run(hyper_connection_in, new, *args[4:], hyper_connection_mix=variant)
    assert all(map(same_bits, made[1:], again))


def test_larger_batches_take_larger_tiles():
    with gpu.telling() as told, gpu.tracing(90) as launches:
        for T in (1, 16, 17, 128, 129):
            args = example(hyper_connection_in, T, 1, 1)
            gpu.of(hyper_connection_in)(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
    assert [c.taken for c in told] == ["few", "few", "some", "some", "many"]
    assert len({c.key for c in told}) == 3
    assert len(launches) == 10


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_tensors_that_are_not_contiguous_or_not_aligned(op):
    args = example(op, 3, 4, 24)
    wanted = run(op, *args)

    def apart(x):
        if not isinstance(x, torch.Tensor):
            return x
        spread = x.new_empty(*x.shape, 2)
        spread[..., 0] = x
        return spread[..., 0]

    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) if isinstance(x, torch.Tensor) else x

    assert all(map(same_bits, run(op, *map(apart, args)), wanted))
    assert all(map(alike, run(op, *map(shifted, args)), wanted))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token(op, value):
    args = example(op, 3, 4, 24)
    clean = run(op, *args)
    args[0][1, 2, 5] = value
    made, wanted = run(op, *args), defined(op, *args)
    for found, want, before in zip(made, wanted, clean, strict=True):
        assert torch.equal(found.isfinite(), want.isfinite())
        assert torch.equal(found.isnan(), want.isnan())
        assert same_bits(found[::2], before[::2])


def test_shapes_that_do_not_go_together_are_told():
    streams, out, post, comb, fn, base, scale, *rest = example(hyper_connection_turn, 3, 4, 8)
    for wrong, what in (
        ((streams, out[:2], post, comb, fn, base, scale), r"out is of shape \(2, 8\).*need \(3, 8\)"),
        ((streams, out, post[:, :3], comb, fn, base, scale), "post"),
        ((streams, out, post, comb[:, :3], fn, base, scale), "comb"),
        ((streams, out, post, comb, fn[:, 1:], base, scale), r"fn is of shape \(24, 31\).*need \(24, 32\)"),
        ((streams, out, post, comb, fn[:23], base, scale), "fn"),
        ((streams, out, post, comb, fn, base[:4], scale), "base"),
        ((streams, out, post, comb, fn, base, scale[:1]), "scale"),
    ):
        with pytest.raises(RuntimeError, match=what):
            run(hyper_connection_turn, *wrong, *rest)
    with pytest.raises(RuntimeError, match="norm"):
        run(hyper_connection_in, streams, fn, base, scale, *NUMBERS, torch.ones(7, device=DEVICE))
    with pytest.raises(RuntimeError, match="fn"):
        run(hyper_connection_head, streams, fn, base[:4], scale[:1], EPS, EPS)
