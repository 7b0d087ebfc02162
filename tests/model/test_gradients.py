"""The forward that serves also trains: gradients reach every weight, and are right."""

import pytest
import torch

from pyrosome.model.step import Span, Step
from pyrosome.testing.shapes import tiny
from tests.networks import build_network, tokens

SMALL = {
    "hidden_size": 16, "num_attention_heads": 2, "head_dim": 12, "qk_rope_head_dim": 4, "q_lora_rank": 8,
    "o_lora_rank": 4,
    "sliding_window": 5, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 3, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "vocab_size": 20, "hc_sinkhorn_iters": 4,
}  # fmt: skip


def trainable(config, numerics="exact", dtype=torch.float32):
    model = build_network(config, numerics).to(dtype)
    for p in model.parameters():
        p.requires_grad_(True)
    return model


@pytest.mark.parametrize("numerics", ["exact", "trained"])
def test_every_weight_gets_a_gradient(numerics):
    model = trainable(tiny((0, 4, 128)), numerics)
    ids, other = tokens(280), tokens(90, seed=2)
    step = Step.of([Span(0, 0, ids), Span(0, 0, other)])
    out = model(step)
    loss = model.logits(out.streams).square().mean()
    draft_step = Step.of([Span(0, 0, [*ids[1:], 0]), Span(0, 0, [*other[1:], 0])])
    loss = loss + model.draft_stage.draft(model, draft_step, out.streams)[0].square().mean()
    # The choice of rows is made of integers: the indexer learns through its scores, by a loss of its own.
    loss = loss + sum(c.score[c.rows >= 0].square().mean() for c in out.scores)
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()}
    assert without == {n for n, _ in model.named_parameters() if n.endswith("gate.bias")}  # balanced, not learned
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_indexer_learns_from_its_scores_alone():
    model = trainable(tiny((0, 4)))
    out = model(Step.of([Span(0, 0, tokens(150))]))
    model.logits(out.streams).sum().backward(retain_graph=True)
    indexer = model.layers[1].attn.indexer
    assert all(p.grad is None for p in indexer.parameters())
    (out.scores[0].score.clamp(min=-1e9).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().any() for p in indexer.parameters())


@pytest.mark.parametrize("ratio", [0, 4, 8])
def test_gradients_against_finite_differences(ratio):
    """float64, one layer of each kind: directional derivatives along random directions, and along single weights."""
    model = trainable(tiny((ratio,), **SMALL, num_hash_layers=0), dtype=torch.float64)
    step = Step.of([Span(0, 0, tokens(21, 20)), Span(0, 0, tokens(9, 20, seed=5))])
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 20, generator=g, dtype=torch.float64)

    def loss():
        return (model.logits(model(step).streams) * weight).sum()

    loss().backward()
    checked = 0
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
        direction /= direction.norm()
        eps = 1e-6
        with torch.no_grad():
            p += eps * direction
            above = loss().item()
            p -= 2 * eps * direction
            below = loss().item()
            p += eps * direction
        numeric, analytic = (above - below) / (2 * eps), (p.grad * direction).sum().item()
        assert numeric == pytest.approx(analytic, rel=2e-4, abs=2e-6), name
        checked += 1
    assert checked > 20


def test_packed_sequences_do_not_touch():
    """Two sequences in one step have the gradients of each alone, added up."""
    config, a, b = tiny((0, 4, 8)), tokens(70), tokens(33, seed=3)

    def gradients(*spans):
        model = trainable(config)
        for group in spans:
            out = model(Step.of([Span(0, 0, ids) for ids in group]))
            model.logits(out.streams).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    together, apart = gradients((a, b)), gradients((a,), (b,))
    assert together.keys() == apart.keys()
    for name, grad in together.items():
        torch.testing.assert_close(grad, apart[name], rtol=1e-3, atol=1e-3 * float(apart[name].abs().max()) + 1e-6)


def test_later_tokens_get_no_gradient_from_earlier_logits():
    model = trainable(tiny((0, 4, 8)))
    ids = tokens(60)
    streams = model.embed_ids(torch.tensor(ids))[:, None].expand(-1, 4, -1).detach().requires_grad_(True)
    out = model(Step.of([Span(0, 0, ids)]), streams=streams)
    model.logits(out.streams)[:41].sum().backward()
    assert streams.grad[:41].abs().sum() > 0
    assert not streams.grad[41:].any()
