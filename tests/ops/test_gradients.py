"""Every operation's gradients against finite differences, in float64: a new one must be entered here."""

import pytest
import torch

import pyrosome.model.deepseek_v4  # noqa: F401  (whose imports define all operations of the network)
from pyrosome.ops.compress import Emit, compress, compressed_rows
from pyrosome.ops.experts import ExpertWeights, clamped_swiglu, routed_experts, shared_expert
from pyrosome.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_in,
    hyper_connection_out,
    hyper_connection_turn,
)
from pyrosome.ops.index_topk import index_scores, index_topk
from pyrosome.ops.linear import grouped_linear, linear, linears, scaled
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.ops.rope import index_rows, norm_rope, rope
from pyrosome.ops.route import affinity, route, route_scores
from pyrosome.ops.rows import UnitedRows
from pyrosome.ops.seam import OPS
from pyrosome.ops.sparse_attention import attention, finish_attention, sparse_attention, watched_attention
from pyrosome.quant import unchanged
from tests.ops.gradients import turns

NOT_DIFFERENTIATED = {
    "rotation": "of positions, which are integers",
    "store_rows": "writes into a cache",
    "as_stored": "what a cache gives back",
    "choose_tokens": "tokens are numbers of a list",
}
T, H, C, D, J = 4, 2, 8, 6, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


TURN, SHORT = turns(T, 2, torch.complex128), turns(3, 2, torch.complex128)
INDEX = torch.tensor([[-1, -1, -1], [0, 2, -1], [1, 3, 4], [4, 0, 1]])
EMIT = Emit(torch.tensor([1, 3, 7]), torch.tensor([1, 3, 7]), *torch.zeros(2, 3, dtype=torch.long))
RING = torch.zeros(1, 1, 8, dtype=torch.float64)
HC = [draw(T, J, D), draw((2 + J) * J, J * D, seed=1), draw((2 + J) * J, seed=2), draw(3, seed=3), draw(D, seed=4)]
EXPERTS = [draw(4, 5, D, seed=1), draw(4, 5, D, seed=2), draw(4, D, 5, seed=3)]
CHOSEN = torch.tensor([[0, 2], [1, -1], [3, 0], [2, 1]])
VISIBLE, LAYOUT = torch.tensor([0, 2, 4, 5]), [(0, T)]


class Keys:
    """Rows of one span."""

    format = ""

    def __init__(self, rows):
        self.rows, self.num_rows = rows, rows.shape[0]

    def read(self, index):
        return self.rows, index.clamp(min=0)

    def span_rows(self, low, high):
        return self.rows[None, low:high]


def source(rows):
    return UnitedRows(torch.zeros(1, 0, C, dtype=torch.float64), rows)


def hyper_in(x, fn, base, scale, norm):
    return hyper_connection_in(x, fn, base, scale, 1e-6, 1e-6, 4, norm)


def bank(w1, w3, w2):
    return ExpertWeights(w1, w3, w2, unchanged)


CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), [draw(T, D), draw(D, seed=1)]),
    "linear": (linear, [draw(T, D), draw(5, D, seed=1)]),
    "linears": (
        lambda x, a, b, w: tuple(linears(x, [(a, unchanged), (b, unchanged)], w, 1e-6)),
        [draw(T, D), draw(5, D, seed=1), draw(3, D, seed=2), draw(D, seed=3)],
    ),
    "grouped_linear": (grouped_linear, [draw(T, 2, 3), draw(4, 3, seed=1)]),
    "scaled": (lambda x: scaled(x, 0.3), [draw(T, D)]),
    "rope": (lambda x: rope(x, TURN), [draw(T, H, C)]),
    "norm_rope": (lambda x, w: norm_rope(x, w, TURN, 1e-6), [draw(T, C), draw(C, seed=1)]),
    "index_rows": (lambda x: index_rows(x, TURN), [draw(T, H, C)]),
    "hyper_connection_in": (hyper_in, HC),
    "hyper_connection_out": (
        hyper_connection_out, [draw(T, J, D), draw(T, D, seed=1), draw(T, J, seed=2), draw(T, J, J, seed=3)],
    ),
    "hyper_connection_turn": (
        lambda x, out, post, comb, *rest: hyper_connection_turn(x, out, post, comb, *rest[:3], 1e-6, 1e-6, 4, rest[3]),
        [draw(T, J, D), draw(T, D, seed=5), draw(T, J, seed=6), draw(T, J, J, seed=7), *HC[1:]],
    ),
    "hyper_connection_head": (
        lambda x, fn, base, scale: hyper_connection_head(x, fn, base, scale, 1e-6, 1e-6),
        [draw(T, J, D), draw(J, J * D, seed=1), draw(J, seed=2), draw(1, seed=3)],
    ),
    "compress": (
        lambda kv, gate, bias: compress(kv, gate, RING, RING, bias, EMIT, 4),
        [draw(8, 8), draw(8, 8, seed=1), draw(2, 8, seed=2)],
    ),
    "compressed_rows": (
        lambda kv, gate, bias, norm: compressed_rows(kv, gate, RING, RING, bias, EMIT, 4, norm, SHORT, 1e-6),
        [draw(8, 8), draw(8, 8, seed=1), draw(2, 8, seed=2), draw(4, seed=3)],
    ),
    "index_scores": (index_scores, [draw(T, H, C), draw(5, C, seed=1), draw(T, H, seed=2)]),
    "index_topk": (
        lambda q, k, w: index_topk(q, Keys(k), w, VISIBLE, LAYOUT, 5)[0].nan_to_num(neginf=0.0),
        [draw(T, H, C), draw(5, C, seed=1), draw(T, H, seed=2)],
    ),
    "sparse_attention": (
        lambda q, rows: [x.nan_to_num(neginf=0.0) for x in sparse_attention(q, source(rows), INDEX)],
        [draw(T, H, C), draw(5, C, seed=1)],
    ),
    "finish_attention": (
        lambda sink, o, lse, p, m: finish_attention(sink, TURN, [(o, lse), (p, m)]),
        [draw(H), draw(T, H, C, seed=1), draw(T, H, seed=2), draw(T, H, C, seed=3), draw(T, H, seed=4)],
    ),
    "attention": (
        lambda q, a, b, sink: attention(q, [(source(a), INDEX), (source(b), INDEX.flip(0))], sink, TURN),
        [draw(T, H, C), draw(5, C, seed=1), draw(5, C, seed=2), draw(H, seed=3)],
    ),
    "watched_attention": (
        lambda q, a, b, sink: watched_attention(q, [(source(a), INDEX), (source(b), INDEX.flip(0))], sink, TURN)[0],
        [draw(T, H, C), draw(5, C, seed=1), draw(5, C, seed=2), draw(H, seed=3)],
    ),
    "affinity": (affinity, [draw(T, D)]),
    "route_scores": (route_scores, [draw(T, D), draw(5, D, seed=1)]),
    "route": (
        lambda x, w: route(x, w, CHOSEN.clamp(min=0), 2, 1.5, torch.arange(T))[1], [draw(T, D), draw(4, D, seed=1)],
    ),
    "clamped_swiglu": (lambda a, b: clamped_swiglu(3 * a, 3 * b, 2.0), [draw(T, D), draw(T, D, seed=1)]),
    "routed_experts": (
        lambda x, w, *stacks: routed_experts(x, bank(*stacks), CHOSEN, w, 1.5),
        [draw(T, D), draw(T, 2, seed=4), *EXPERTS],
    ),
    "shared_expert": (
        lambda x, onto, *w: shared_expert(x, bank(*w), 1.5, onto),
        [draw(T, D), draw(T, D, seed=4), *(draw(*w.shape[1:], seed=5 + i) for i, w in enumerate(EXPERTS))],
    ),
}  # fmt: skip


def test_no_operation_is_left_out():
    ours = {name for name, op in OPS.items() if op.definition.__module__.startswith("pyrosome.")}
    assert ours == CASES.keys() | NOT_DIFFERENTIATED.keys()


@pytest.mark.parametrize("name", CASES)
def test_finite_differences(name):
    run, leaves = CASES[name]
    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)
