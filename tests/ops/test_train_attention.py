"""Attention with gradients: the kernel against the definition."""

import pytest
import torch

from pyrosome.ops import native
from pyrosome.ops.seam import use
from pyrosome.ops.sparse_attention import attention, watched_attention
from tests.ops.gradients import assert_as_defined, draw, turns

needs_native = pytest.mark.skipif(not native.available(), reason="there is no native library")
OPS = [attention, watched_attention]


class Rows:
    """Float rows, each named by its number."""

    def __init__(self, rows, name=""):
        self.rows, self.format, self.num_rows = rows, name, rows.shape[0]

    def read(self, index):
        return self.rows, index.clamp(min=0)


def chosen(T, K, N, seed):
    """K rows of N for each token, some of them none; the first token has none at all."""
    index = torch.randint(-N // 4 - 1, N, (T, K), generator=torch.Generator().manual_seed(seed)).clamp(min=-1)
    index[:1] = -1
    return index


def case(T, H, C, sizes):
    q, sink = draw(T, H, C), draw(H, seed=1)
    rows = [draw(N, C, seed=2 + i) for i, (_, N) in enumerate(sizes)]
    parts = [(Rows(r), chosen(T, K, N, i)) for i, (r, (K, N)) in enumerate(zip(rows, sizes, strict=True))]
    return q, parts, sink, [q, sink, *rows]


@needs_native
@pytest.mark.parametrize(("H", "C", "F"), [(4, 128, 32), (3, 48, 8), (6, 80, 8), (1, 16, 4), (8, 144, 8)])
@pytest.mark.parametrize("sizes", [[(5, 9)], [(7, 30), (16, 12)], [(3, 8), (1, 4), (33, 40)]], ids=len)
@pytest.mark.parametrize("threads", [1, 3])
def test_values_and_gradients(H, C, F, sizes, threads, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: threads)
    q, parts, sink, leaves = case(11, H, C, sizes)
    turn = turns(11, F)
    assert_as_defined(OPS, lambda: attention(q, parts, sink, turn), leaves)
    assert_as_defined(OPS, lambda: watched_attention(q, parts, sink, turn)[0], leaves)


@needs_native
@pytest.mark.parametrize("sizes", [[(5, 9)], [(7, 30), (16, 12)]], ids=len)
def test_the_mass_of_each_row(sizes):
    """Heads' shares of the last part's rows, added up: as one softmax over everything gives them."""
    q, parts, sink, _ = case(6, 2, 32, sizes)
    q = q * 3
    expected = torch.zeros_like(parts[-1][1], dtype=torch.float32)
    for t in range(6):
        for h in range(2):
            scores = [sink[h]]
            for source, index in parts:
                scores += [q[t, h] @ source.rows[i] * 32**-0.5 if i >= 0 else -torch.inf for i in index[t]]
            shares = torch.stack([torch.as_tensor(s) for s in scores]).softmax(0)
            expected[t] += shares[-expected.shape[1] :].detach()
    for version in ("torch", "cpu-train"):
        with use(watched_attention, version), use(attention, version):
            mass = watched_attention(q, parts, sink, turns(6, 4))[1]
        torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)
        assert not mass.requires_grad


@needs_native
def test_the_training_version_runs_only_while_gradients_are_on():
    q, parts, _, _ = case(4, 2, 32, [(3, 5)])
    assert attention.chosen(q, parts) == watched_attention.chosen(q, parts) == "cpu-train"
    with torch.no_grad():
        assert attention.chosen(q, parts) == "cpu"
        assert watched_attention.chosen(q, parts) == "torch"


@needs_native
def test_rows_that_are_rounded_for_take_the_definition():
    q, parts, sink, leaves = case(5, 2, 32, [(3, 5)])
    narrow = [(Rows(s.rows, "bf16"), i) for s, i in parts]
    assert_as_defined(OPS, lambda: attention(q, narrow, sink, turns(5, 4)), leaves)


@needs_native
@pytest.mark.parametrize(("T", "K"), [(0, 4), (5, 0)])
def test_no_tokens_or_no_rows(T, K):
    q, parts, sink, leaves = case(T, 2, 32, [(3, 5), (K, 6)])
    out, mass = watched_attention(q, parts, sink, turns(T, 4))
    assert out.shape == (T, 2, 32) and mass.shape == (T, K)
    assert_as_defined(OPS, lambda: attention(q, parts, sink, turns(T, 4)), leaves)
