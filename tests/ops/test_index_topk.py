"""`index_topk` against a brute-force statement of what it means."""

import pytest
import torch

import pyrosome.ops.index_topk as module
from pyrosome.ops.index_topk import index_topk, rank_index, rank_key, rank_score
from pyrosome.ops.rows import UnitedRows


class Keys:
    """Rows of every span, given as they are."""

    format = ""

    def __init__(self, rows_BNC, span_T):
        self.rows, self.span_T, self.num_rows = rows_BNC, span_T, rows_BNC.shape[1]

    def span_rows(self, low, high):
        return self.rows[:, low:high]

    def read(self, index_TK):
        flat = self.span_T[:, None] * self.num_rows + index_TK.clamp(min=0)
        return self.rows.flatten(0, 1), flat


def example(levels, T=24, N=50, H=3, C=8, seed=0):
    """Values on a coarse grid tie often, exactly, and sum exactly in any order."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-levels, levels + 1, shape, generator=g).float()

    span = torch.tensor([0] * 10 + [1] * (T - 10))
    visible = torch.randint(0, N + 1, (T,), generator=g)
    visible[:3] = torch.tensor([0, 1, N])
    return draw(T, H, C), Keys(draw(2, N, C), span), draw(T, H), visible, [(0, 10), (10, T)]


def brute_force(q, keys, w, visible, k):
    out = []
    for t in range(len(q)):
        score = (w[t][:, None] * (q[t] @ keys.rows[keys.span_T[t]].T).relu()).sum(0)
        order = sorted(range(int(visible[t])), key=lambda i: (-float(score[i]), i))[:k]
        out.append(sorted(order))
    return out


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("k", [1, 5, 16, 49, 50, 64])
@pytest.mark.parametrize("tile_rows", [7, 16, 8192])
def test_against_brute_force_with_many_ties(monkeypatch, levels, k, tile_rows):
    monkeypatch.setattr(module, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(module, "TILE_ELEMENTS", 200)
    q, keys, w, visible, layout = example(levels)
    with torch.no_grad():
        score, index = index_topk(q, keys, w, visible, layout, k)
    assert index.shape == (24, min(k, 50))
    assert [[i for i in row if i >= 0] for row in index.tolist()] == brute_force(q, keys, w, visible, k)
    assert torch.equal(index < 0, score == float("-inf"))
    dense = torch.einsum("th,thn->tn", w, torch.einsum("thc,tnc->thn", q, keys.rows[keys.span_T]).relu())
    assert torch.equal(score[index >= 0], dense.gather(1, index.clamp(min=0))[index >= 0])


def test_scores_carry_gradients_and_the_same_values():
    q, keys, w, visible, layout = example(3)
    with torch.no_grad():
        plain = index_topk(q, keys, w, visible, layout, 8)
    q.requires_grad_(True)
    score, index = index_topk(q, keys, w, visible, layout, 8)
    assert torch.equal(index, plain[1])
    assert torch.equal(score.detach(), plain[0])
    score[index >= 0].sum().backward()
    assert q.grad.abs().any()


def test_no_rows_and_no_tokens():
    keys = UnitedRows(torch.zeros(1, 0, 4), torch.zeros(0, 4))
    keys.num_rows = 0
    none_visible = torch.zeros(3, dtype=torch.int64)
    score, index = index_topk(torch.ones(3, 2, 4), keys, torch.ones(3, 2), none_visible, [(0, 3)], 5)
    assert score.shape == index.shape == (3, 0)


def test_rank_key_orders_floats_exactly():
    values = torch.tensor([float("-inf"), -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3e38])
    keys = rank_key(values, torch.zeros(10, dtype=torch.int64))
    assert torch.equal(keys.argsort(stable=True), torch.arange(10))
    assert keys[4] == keys[5]
    assert (keys >= 0).all()
    assert torch.equal(rank_score(keys), values)
    assert torch.equal(rank_index(rank_key(values, torch.arange(10))), torch.arange(10))
    tied = rank_key(torch.zeros(3), torch.tensor([2, 0, 1]))
    assert tied.argsort(descending=True).tolist() == [1, 2, 0]
