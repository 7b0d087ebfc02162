"""Warming up runs steps of every size and context, and leaves nothing behind."""

from __future__ import annotations

import pytest

from pyrosome.engine import warm
from pyrosome.engine.warm import warm_up
from pyrosome.testing.shapes import tiny
from tests.golden.vectors import ids, model


@pytest.mark.parametrize("name", ["bf16", "fp8fp4"])
def test_the_cache_and_what_is_computed_are_as_before(name, monkeypatch):
    runner = model(name).runner(3, 300)
    free = runner.pool.num_free_slots, {r: runner.pool.num_free_pages(r) for r in runner.pool.ratios}
    before = step(runner, ids(name)[:40])
    steps, drawn = [], []
    run = runner.forward
    runner.forward = lambda spans, *rest, **kw: (
        steps.append([(s.length, len(i)) for s, i in spans]),
        run(spans, *rest, **kw),
    )[1]
    monkeypatch.setattr(warm, "choose_all", lambda rows: drawn.extend(r.state.params for r in rows))
    assert warm_up(runner, 100) > 0
    sizes = [1, 2, 4, 8, 16, 32, 64, 100]
    far = [(127, 1), (64, 64), (255, 1), (192, 64), (299, 1), (236, 64)]
    assert steps == [*([(0, n)] for n in sizes), [(0, 1)] * 3, *([step] for step in far)]
    assert len({(p.temperature, p.top_k, p.top_p, p.min_p) for p in drawn}) == 9
    del runner.forward
    assert (runner.pool.num_free_slots, {r: runner.pool.num_free_pages(r) for r in runner.pool.ratios}) == free
    assert (step(runner, ids(name)[:40]) == before).all()


def test_sizes_that_the_cache_has_no_room_for_are_left_out():
    assert tiny().max_position_embeddings > 64
    runner = model("bf16").runner(1, 64)
    warm_up(runner, 10_000)
    assert runner.pool.num_free_slots == 1


def step(runner, tokens):
    sequence = runner.open()
    (last,) = runner.step([(sequence, tokens)])
    runner.close(sequence)
    return last
