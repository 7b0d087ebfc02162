"""Muon and AdamW from masters: what a step is."""

import pytest
import torch

from pyrosome.train.muon import Tuner, orthogonalized


def tuner(masters, adamw=(), parts=None, **changes):
    values = {"momentum": 0.95, "betas": (0.9, 0.95), "weight_decay": 0.0, "update_rms": 0.18}
    return Tuner(masters, adamw, parts or {}, **{**values, **changes})


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 40), (2, 40, 8), (5, 1, 9)])
def test_singular_values_are_brought_to_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = torch.linalg.svdvals(orthogonalized(x))
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=0.02)


def test_the_directions_stay():
    """U V^T of the matrix itself: nothing is turned."""
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonalized(x[None])[0], U @ V, rtol=0, atol=0.02)


def test_bfloat16_is_near():
    x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(3))
    found = torch.linalg.svdvals(orthogonalized(x, torch.bfloat16))
    assert (found - 1).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (4, 16, 32)])
def test_an_update_has_the_rms_asked_for(shape):
    g = torch.Generator().manual_seed(4)
    masters = {"w": torch.zeros(shape)}
    tuner(masters).step({"w": torch.randn(shape, generator=g)}, muon_lr=0.5, adamw_lr=9.0)
    smaller = min(shape[-2:])  # an orthogonal n x m matrix has n entries of one spread over n m places
    expected = 0.5 * 0.18 * (smaller / min(shape[-2:])) ** 0.5
    assert float(masters["w"].square().mean().sqrt()) == pytest.approx(expected, rel=0.02)


def test_experts_and_groups_are_matrices_of_their_own():
    """A stack steps as each of its matrices alone would; so do the groups of rows of one."""
    g = torch.Generator().manual_seed(5)
    grad = torch.randn(3, 8, 12, generator=g)
    stack = {"e": torch.zeros(3, 8, 12)}
    tuner(stack).step({"e": grad}, 1.0, 1.0)
    groups = {"e": torch.zeros(24, 12)}
    tuner(groups, parts={"e": 3}).step({"e": grad.flatten(0, 1)}, 1.0, 1.0)
    for e in range(3):
        alone = {"e": torch.zeros(8, 12)}
        tuner(alone).step({"e": grad[e]}, 1.0, 1.0)
        torch.testing.assert_close(stack["e"][e], alone["e"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(groups["e"][8 * e : 8 * e + 8], alone["e"], rtol=1e-4, atol=1e-5)


def test_matrices_of_one_shape_are_stepped_together_as_alone():
    g = torch.Generator().manual_seed(6)
    grads = {"a": torch.randn(8, 12, generator=g), "b": torch.randn(12, 8, generator=g)}
    both = {n: torch.zeros_like(x) for n, x in grads.items()}
    tuner(both).step(grads, 1.0, 1.0)
    for n, grad in grads.items():
        alone = {n: torch.zeros_like(grad)}
        tuner(alone).step({n: grad}, 1.0, 1.0)
        torch.testing.assert_close(both[n], alone[n], rtol=1e-4, atol=1e-5)


def test_adamw_is_the_one_of_torch():
    g = torch.Generator().manual_seed(7)
    start = torch.randn(10, generator=g)
    ours = {"v": start.clone()}
    ours_tuner = tuner(ours, ["v"], weight_decay=0.1)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
    for _ in range(5):
        grad = torch.randn(10, generator=g)
        ours_tuner.step({"v": grad}, 1.0, 0.01)
        theirs.grad = grad
        optimizer.step()
    torch.testing.assert_close(ours["v"], theirs.data)


def test_momentum_looks_ahead():
    """Nesterov: the second step of opposite gradients still moves, and by mu m + g."""
    g0 = torch.eye(4)
    masters = {"w": torch.zeros(4, 4)}
    t = tuner(masters)
    t.step({"w": g0}, 1.0, 1.0)
    before = masters["w"].clone()
    t.step({"w": -0.5 * g0}, 1.0, 1.0)
    # m = 0.95 - 0.5 = 0.45; mu m + g = -0.0725: the step turns round, where plain momentum would not.
    assert ((masters["w"] - before).diagonal() > 0).all()


def test_what_is_frozen_stays():
    masters = {"w": torch.ones(4, 4), "v": torch.ones(4)}
    t = tuner(masters, ["v"], weight_decay=0.1)
    t.step({"w": torch.ones(4, 4), "v": torch.ones(4)}, 1.0, 1.0, frozen=["w", "v"])
    assert (masters["w"] == 1).all() and (masters["v"] == 1).all()
    assert (t.first["w"] == 0).all()
