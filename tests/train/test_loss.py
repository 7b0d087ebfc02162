"""The parts of the loss, and who learns from which."""

import pytest
import torch

from pyrosome.model.deepseek_v4 import Choice, Gate
from pyrosome.testing.shapes import tiny
from pyrosome.train.batch import pack
from pyrosome.train.loss import balance_loss, indexer_loss, losses, rebalance, watched_gates
from pyrosome.train.network import Masters, initial_tensors, parameters_of, trainable_network
from pyrosome.train.recipe import LossRecipe
from pyrosome.train.samples import Encoded

CONFIG = tiny((0, 4, 8), sliding_window=8, vocab_size=50)
WEIGHTS = LossRecipe()


def network(quantized=False):
    masters = Masters(CONFIG, dict(initial_tensors(CONFIG, 1)))
    model = trainable_network(masters, quantized=quantized)
    return model, parameters_of(model, masters), masters


def sample(length, seed, weights=None):
    ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    weight = weights or [0.0] + [1.0] * (length - 1)
    return Encoded(ids, weight, [w == 1.0 for w in weight], "test")


def gradients(model, parameters, batch, weights=WEIGHTS, mtp=0.3):
    losses(model, batch, weights, mtp).total.backward()
    found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return found


def test_packed_losses_are_the_sums_of_those_alone():
    """Borders reset windows and compressors: a sample's loss and gradients do not depend on its company."""
    model, parameters, _ = network()
    samples = [sample(n, seed) for seed, n in enumerate((33, 64, 18, 5))]
    together = losses(model, pack(samples), WEIGHTS, 0.3)
    alone = [losses(model, pack([s]), WEIGHTS, 0.3) for s in samples]
    counts = [len(s.ids) - 1 for s in samples]
    for part, of in (("lm", counts), ("mtp", [n - 1 for n in counts])):
        mean = sum(getattr(a, part) * n for a, n in zip(alone, of, strict=True)) / sum(of)
        assert float(getattr(together, part).detach()) == pytest.approx(float(mean.detach()), abs=1e-5), part
    plain = LossRecipe(indexer=0.0, balance=0.0)
    packed = gradients(model, parameters, pack(samples), plain, 0.0)
    each = [gradients(model, parameters, pack([s]), plain, 0.0) for s in samples]
    for name, grad in packed.items():
        total = sum(e.get(name, torch.zeros(())) * n for e, n in zip(each, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(grad, total, rtol=1e-3, atol=1e-5 + 1e-3 * float(total.abs().max()))


def test_only_weighted_tokens_count():
    model, _, _ = network()
    weights = [0.0] * 20
    weights[7], weights[11] = 1.0, 0.5
    s = sample(20, 3, weights)
    batch = pack([s])
    assert batch.row.tolist() == [6, 10] and batch.target.tolist() == [s.ids[7], s.ids[11]]
    assert batch.draft_row.tolist() == [5, 9]
    logits = model.logits(model(batch.step).streams).log_softmax(-1)
    expected = -(1.0 * logits[6, s.ids[7]] + 0.5 * logits[10, s.ids[11]]) / 1.5
    found = losses(model, batch, WEIGHTS, 0.3).lm
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_the_indexer_learns_from_its_loss_alone_and_teaches_nobody():
    model, parameters, _ = network()
    batch = pack([sample(60, 1), sample(41, 2)])
    without = gradients(model, parameters, batch, LossRecipe(indexer=0.0, balance=0.0))
    with_it = gradients(model, parameters, batch, LossRecipe(indexer=1.0, balance=0.0))
    changed = {n for n in with_it if n not in without or not torch.equal(with_it[n], without[n])}
    assert changed == {n for n in parameters if ".indexer." in n}
    assert not {n for n in without if ".indexer." in n and without[n].any()}


def test_the_indexers_loss_is_zero_where_it_foresees_the_mass():
    mass = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.3, 0.0, 0.0]])
    rows = torch.tensor([[0, 1, 2, -1], [0, 1, -1, -1]])
    score = mass.clamp(min=1e-30).log() + 7.0  # a shift changes nothing
    right = Choice(score.masked_fill(rows < 0, float("-inf")), rows, 3 * mass)
    assert float(indexer_loss([right])) == pytest.approx(0.0, abs=1e-6)
    wrong = Choice(torch.zeros(2, 4).masked_fill(rows < 0, float("-inf")), rows, mass)
    p = [torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.75])]
    kl = sum((q * (q * len(q)).log()).sum() for q in p) / 2
    assert float(indexer_loss([wrong])) == pytest.approx(float(kl), abs=1e-6)


def test_the_indexers_loss_has_finite_gradients_where_no_row_is_visible():
    score = torch.full((3, 4), float("-inf"), requires_grad=True)
    loss = indexer_loss([Choice(score, torch.full((3, 4), -1), torch.zeros(3, 4))])
    loss.backward()
    assert float(loss) == 0 and torch.isfinite(score.grad).all()


def test_balance_is_one_where_experts_are_alike_and_more_where_one_is_preferred():
    model, _, _ = network()
    batch = pack([sample(48, 5), sample(16, 6)])
    with watched_gates(model) as calls:
        model(batch.step)
    call = next(c for c in calls if not c.gate.hashed)
    with torch.no_grad():
        call.gate.weight.zero_()  # all affinities alike
    E, K = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
    T = len(batch.step.ids_T)
    turns = (torch.arange(T)[:, None] * K + torch.arange(K)) % E
    call.expert_TK = turns
    assert float(balance_loss(call, batch)) == pytest.approx(1.0, abs=1e-4)
    with torch.no_grad():
        call.gate.weight[:] = torch.linspace(-1, 1, E)[:, None] * call.x_TD.mean(0)
    call.expert_TK = torch.arange(E - K, E).expand(T, K)
    assert float(balance_loss(call, batch)) > 1.0


def test_biases_move_towards_balance():
    model, _, masters = network()
    name = next(n for n, m in model.named_modules() if isinstance(m, Gate) and not m.hashed)
    load = torch.arange(CONFIG.n_routed_experts)
    before = masters.fixed[f"{name}.bias"].clone()
    rebalance(masters.fixed, model, {name: load}, 0.25)
    moved = masters.fixed[f"{name}.bias"] - before
    assert moved[0] == 0.25 and moved[-1] == -0.25
    assert torch.equal(model.get_submodule(name).bias, masters.fixed[f"{name}.bias"])


def test_no_later_token_changes_an_earlier_loss():
    model, _, _ = network()
    s = sample(50, 9)
    early = [0.0] + [1.0] * 29 + [0.0] * 20
    first = losses(model, pack([s._replace(weight=early)]), WEIGHTS, 0.3)
    other = s._replace(ids=[*s.ids[:31], *sample(50, 10).ids[31:]], weight=early)
    second = losses(model, pack([other]), WEIGHTS, 0.3)
    assert float(first.lm) == float(second.lm)
    assert float(first.mtp) == pytest.approx(float(second.mtp), abs=0)
