"""The indexer with gradients: the kernel against the definition, and this against finite differences."""

import pytest
import torch

from pyrosome.ops import native
from pyrosome.ops.index_topk import index_topk
from pyrosome.ops.seam import use
from tests.ops.gradients import assert_as_defined, draw
from tests.ops.test_index_topk import Keys

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no native library")


def case(T, N, H, C, split):
    """Two spans of tokens, cut at `split`; some see nothing, some everything."""
    span = (torch.arange(T) >= split).long()
    visible = torch.randint(0, N + 1, (T,), generator=torch.Generator().manual_seed(3))
    visible[:3] = torch.tensor([0, 1, N])
    return draw(T, H, C), draw(2, N, C, seed=1), draw(T, H, seed=2), span, visible, [(0, split), (split, T)]


@pytest.mark.parametrize(("N", "H", "C"), [(50, 3, 16), (33, 4, 64), (7, 6, 48), (20, 2, 8), (2500, 1, 16)])
@pytest.mark.parametrize("k", [1, 5, 16, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_scores_and_gradients(N, H, C, k, threads, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: threads)
    q, rows, weight, span, visible, layout = case(24, N, H, C, 10)
    run = lambda: index_topk(q, Keys(rows, span), weight, visible, layout, k)  # noqa: E731
    assert_as_defined([index_topk], lambda: run()[0], [q, rows, weight])
    indices = []
    for version in ("cpu-train", "torch"):
        with use(index_topk, version):
            indices.append(run()[1])
    assert torch.equal(*indices)


@pytest.mark.parametrize("k", [1, 5, 16, 49, 50])
def test_ties_go_to_the_lowest_index(k):
    q, rows, weight, span, visible, layout = case(24, 50, 3, 16, 10)
    coarse = [x.detach().round().clamp(-1, 1) for x in (q, rows, weight)]
    found = []
    for version in ("cpu-train", "torch"):
        with use(index_topk, version):
            found.append(index_topk(coarse[0], Keys(coarse[1], span), coarse[2], visible, layout, k))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_nothing_visible_is_no_gradient_whatever_is_asked():
    q, rows, weight, span, visible, layout = case(24, 9, 3, 16, 10)
    score, index = index_topk(q, Keys(rows, span), weight, torch.zeros_like(visible), layout, 4)
    assert torch.equal(score, torch.full_like(score, float("-inf")))
    assert (index == -1).all()
    gradients = torch.autograd.grad(score, [q, rows, weight], torch.full_like(score, float("nan")))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize(("T", "N"), [(0, 5), (4, 0)])
def test_no_tokens_or_no_rows(T, N):
    q, rows, weight = draw(T, 2, 16), draw(1, N, 16, seed=1), draw(T, 2, seed=2)
    keys = Keys(rows, torch.zeros(T, dtype=torch.int64))
    score, index = index_topk(q, keys, weight, torch.zeros(T, dtype=torch.int64), [(0, T)], 3)
    assert score.shape == index.shape == (T, min(3, N))


def test_keys_without_gradients():
    q, rows, weight, span, visible, layout = case(24, 50, 3, 16, 10)
    keys = Keys(rows.detach(), span)
    assert_as_defined([index_topk], lambda: index_topk(q, keys, weight, visible, layout, 5)[0], [q, weight])


def test_the_definition_by_finite_differences():
    q, rows, weight, span, visible, layout = case(9, 12, 2, 4, 5)
    leaves = [x.detach().double().requires_grad_() for x in (q, rows, weight)]

    def scores(a, b, c):
        score, index = index_topk(a, Keys(b, span), c, visible, layout, 3)
        return score[index >= 0]

    assert torch.autograd.gradcheck(scores, leaves)


def test_the_kernel_is_chosen():
    q = draw(2, 1, 16)
    assert index_topk.chosen(q) == "cpu-train"
