"""Pooling with gradients: the kernel against the definition, and this against finite differences."""

import pytest
import torch

from pyrosome.ops import native
from pyrosome.ops.compress import Emit, compress, compressed_rows
from pyrosome.ops.rope import norm_rope
from pyrosome.quant import round_kv
from tests.ops.gradients import assert_as_defined, draw, results, turns

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no native library")
windows = pytest.mark.parametrize(("P", "width"), [(4, 8), (4, 4), (8, 8)])


def case(spans, P, width, D):
    """Step of spans (start, tokens), each in a slot of its own: arguments of `compress`, rings filled with junk."""
    E, rows, first = D * width // P, [], 0
    for slot, (start, count) in enumerate(spans):
        ends = [p for p in range(start, start + count) if (p + 1) % P == 0]
        rows += [(first + p - start, p, start, slot) for p in ends]
        rows.append((0, -1, 0, 0))  # padding
        first += count
    emit = Emit(*torch.tensor(rows).t().contiguous())
    tails = (draw(len(spans), width + 3, E, seed=s).detach() for s in (3, 4))
    return draw(first, E), draw(first, E, seed=1), *tails, draw(P, E, seed=2), emit, width


@windows
@pytest.mark.parametrize("D", [16, 24, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_and_gradients(P, width, D, threads, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: threads)
    for spans in ([(0, 41)], [(0, 3), (0, 17), (0, 8)], [(7, 21), (0, 9)]):  # the last begins amid a window
        args = case(spans, P, width, D)
        leaves = [args[0], args[1], args[4]]
        assert_as_defined([compress], lambda args=args: compress(*args), leaves)
        norm, turn = draw(D, seed=5), turns(len(args[5].end), 2)
        assert_as_defined(
            [compress, compressed_rows, norm_rope],
            lambda args=args, norm=norm, turn=turn: compressed_rows(*args, norm, turn, 1e-6, round_kv),
            [*leaves, norm],
        )


def test_the_kernel_is_chosen():
    assert compress.chosen(torch.zeros(1, 2)) == compressed_rows.chosen(torch.zeros(1, 2)) == "cpu-train"


@windows
def test_padding_and_tokens_of_no_row_have_no_gradient(P, width):
    args = case([(0, 2 * P + 1)], P, width, 16)
    _, dkv, dgate, _ = results("cpu-train", [compress], lambda: compress(*args), [args[0], args[1], args[4]])
    assert not dkv[2 * P :].any()
    assert not dgate[2 * P :].any()
    nothing = args[5]._replace(end=torch.full_like(args[5].end, -1))
    found = results("cpu-train", [compress], lambda: compress(*args[:5], nothing, width), [args[0], args[1], args[4]])
    assert not any(x.any() for x in found)


def test_only_what_wants_a_gradient_gets_one():
    kv, gate, *rest = case([(0, 17)], 4, 8, 16)
    bias = rest[2]
    for wanted in ([kv], [gate], [bias], [kv, bias]):
        given = [x if any(x is w for w in wanted) else x.detach() for x in (kv, gate, bias)]
        assert_as_defined([compress], lambda given=given: compress(*given[:2], *rest[:2], given[2], *rest[3:]), wanted)


def test_a_ring_that_learns_and_no_rows_run_by_the_definition():
    args = list(case([(7, 21)], 4, 8, 16))
    args[2].requires_grad_()
    assert_as_defined([compress], lambda: compress(*args), [args[0], args[2]])
    args[5] = Emit(*(x[:0] for x in args[5]))
    assert compress(*args).shape == (0, 16)


@windows
def test_the_definition_by_finite_differences(P, width):
    kv, gate, tail_kv, tail_gate, bias, *rest = case([(0, 9), (5, 8)], P, width, 3)
    wide = [x.detach().double() for x in (kv, gate, tail_kv, tail_gate, bias)]
    leaves = [wide[i].requires_grad_() for i in (0, 1, 4)]
    assert torch.autograd.gradcheck(lambda a, b, c: compress(a, b, *wide[2:4], c, *rest), leaves)
