"""What a network reads while a part of it is taken away, and that nothing of it is left afterwards."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyrosome.engine.runner import Runner
from pyrosome.errors import RequestError
from pyrosome.evals.ablate import ABLATIONS, ablated, random_rows
from pyrosome.model.deepseek_v4 import Attention, Indexer
from pyrosome.model.step import Span, Step
from pyrosome.testing.shapes import tiny
from tests.networks import build_network, run, tokens

LENGTH = 150  # 37 rows, of which 16 are read


@pytest.fixture(scope="module")
def model():
    return build_network(tiny((0, 4, 128, 4)))


def choices(model, ids=None):
    """(score, rows) [T, K] of each indexer over one whole sequence."""
    with torch.inference_mode():
        return [c[:2] for c in model(Step.of([Span(0, 0, ids or tokens(LENGTH))])).scores]


def state(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    parts = [
        m.topk if isinstance(m, Indexer) else m.ratio for m in model.modules() if isinstance(m, Indexer | Attention)
    ]
    return hooks, parts


def row_sets(rows_TK):
    return [[r for r in rows if r >= 0] for rows in rows_TK.tolist()]


def test_none_changes_nothing(model):
    before = state(model)
    with ablated(model, "none"):
        assert state(model) == before


def test_dense_reads_every_row_there_is(model):
    with ablated(model, "dense"):
        found = choices(model)
    assert len(found) == 2
    for _, rows in found:
        assert row_sets(rows) == [list(range((t + 1) // 4)) for t in range(LENGTH)]


def test_half_reads_the_better_half(model):
    score, rows = choices(model)[0]  # later layers read what is after the first
    with ablated(model, "half"):
        half = choices(model)[0][1]
    assert half.shape[1] == 8
    best = [sorted(rows[t][score[t].topk(8).indices].tolist()) for t in range(100, LENGTH)]
    assert row_sets(half)[100:] == best


@pytest.mark.parametrize("seed", [0, -3, 2**70])
def test_random_reads_as_many_rows_of_those_there_are(model, seed):
    with ablated(model, "random", seed):
        found = choices(model)
    for (score, rows), (_, chosen) in zip(found, choices(model), strict=True):
        assert rows.shape == chosen.shape and rows.dtype == chosen.dtype
        for t, drawn in enumerate(row_sets(rows)):
            assert len(drawn) == min(16, (t + 1) // 4) == len(set(drawn))
            assert drawn == sorted(drawn) == rows[t][: len(drawn)].tolist()
            assert all(r < (t + 1) // 4 for r in drawn)
        assert torch.equal(score == 0, rows >= 0)
        assert not torch.equal(rows, chosen)
    assert not torch.equal(found[0][1], found[1][1])  # each layer draws its own


def test_random_rows_are_the_seeds_alone_and_even_over_all_rows():
    ids = tokens(3000)
    whole = Step.of([Span(0, 0, ids)])
    rows = random_rows(whole, 16, 7)
    assert torch.equal(rows, random_rows(whole, 16, 7))
    assert not torch.equal(rows[1000:], random_rows(whole, 16, 8)[1000:])
    parts = Step.of([Span(2, 100, tokens(30, seed=3)), Span(1, 1500, ids[1500:1700])])
    assert torch.equal(random_rows(parts, 16, 7)[30:], rows[1500:1700])
    late = rows[-400:].flatten()  # of some 700 rows
    counts = torch.bincount(late * 10 // 750, minlength=9)[:9].float()
    assert (counts / counts.mean() - 1).abs().max() < 0.2


def test_random_rows_where_there_are_none():
    assert random_rows(Step.of([Span(0, 0, [1, 2])]), 0, 0).shape == (2, 0)


def test_window_reads_no_row_and_what_makes_rows_does_not_matter(model):
    own = build_network(tiny((0, 4, 128, 4)))
    ids = tokens(LENGTH)
    with ablated(own, "window"):
        before = run(own, ids)
        for module in own.modules():
            if isinstance(module, Attention) and hasattr(module, "compressor"):
                module.compressor.norm.weight.data.mul_(-2)
        assert choices(own) == []
        assert torch.equal(run(own, ids), before)
    assert not torch.equal(run(own, ids), run(model, ids))
    # Where the window reaches all, the first tokens cannot tell: no row is finished before the fourth.
    plain = run(model, ids)
    assert torch.equal(plain[:3], before[:3]) and not torch.equal(plain[3:], before[3:])


@pytest.mark.parametrize("kind", ABLATIONS)
@pytest.mark.parametrize("kv_format", ["f32", "bf16"])
def test_whole_and_in_parts_are_the_same_through_a_cache(model, kind, kv_format):
    ids = tokens(LENGTH)
    with ablated(model, kind, 1):  # a poisoned cache: what is not written is not read
        whole = run(model, ids, kv_format=kv_format)
        parts = run(model, ids, (1, 2, 64, 130, *range(131, LENGTH)), kv_format=kv_format)
    assert torch.isfinite(whole).all() and (whole - parts).abs().max() < 1e-3


def test_each_ablation_gives_other_logits(model):
    found = {}
    for kind in ABLATIONS:
        with ablated(model, kind):
            found[kind] = run(model, tokens(LENGTH))[-1]
    for a, b in itertools.combinations(found.values(), 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_all_is_as_before_also_after_an_error(model, kind):
    before, logits = state(model), run(model, tokens(LENGTH))
    with ablated(model, kind):
        pass
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), ablated(model, kind):
        raise ZeroDivisionError
    assert state(model) == before and torch.equal(run(model, tokens(LENGTH)), logits)


@pytest.fixture(scope="module")
def captured():
    """A network whose decode steps are captured, which needs index keys in FP4, and a runner that has captured some."""
    shape = tiny((0, 4, 128), head_dim=128, qk_rope_head_dim=64, index_head_dim=64)
    runner = Runner(build_network(shape, "trained"), "fp8", 1, 512)
    sequence = runner.open()
    runner.step([(sequence, tokens(60))])
    if runner.graphs is None:
        pytest.skip("steps are not captured here")
    return runner, sequence


@pytest.mark.parametrize("kind", [k for k in ABLATIONS if k != "none"])
def test_no_captured_step_is_run_or_made_within(captured, kind):
    runner, sequence = captured

    def steps():
        for token in tokens(12):
            runner.step([(sequence, [token])])
        return runner.graphs.num_run, list(runner.graphs.kept)

    before = steps()
    assert before[0] > 0
    with ablated(runner.model, kind):
        assert steps() == before
    assert steps()[0] > before[0]


def test_refusals(model):
    with (
        pytest.raises(RequestError, match=r"'sparse' was asked for; there are none, dense, half"),
        ablated(model, "sparse"),
    ):
        pass
    plain = build_network(tiny((0, 128)))
    with pytest.raises(RequestError, match="has no indexer; only window"), ablated(plain, "random"):
        pass
    with ablated(plain, "window"):
        assert torch.isfinite(run(plain, tokens(140))).all()
