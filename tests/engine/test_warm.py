"""Warming up runs steps of every size, and leaves nothing behind."""

from __future__ import annotations

import pytest

from pyrosome.engine.warm import warm_up
from pyrosome.testing.shapes import tiny
from tests.golden.vectors import ids, model


@pytest.mark.parametrize("name", ["bf16", "fp8fp4"])
def test_the_cache_and_what_is_computed_are_as_before(name):
    runner = model(name).runner(3, 300)
    free = runner.pool.num_free_slots, {r: runner.pool.num_free_pages(r) for r in runner.pool.ratios}
    before = step(runner, ids(name)[:40])
    sizes = []
    run = runner.forward
    runner.forward = lambda spans, *rest, **kw: (sizes.append([len(i) for _, i in spans]), run(spans, *rest, **kw))[1]
    assert warm_up(runner, 200) > 0
    assert sizes == [[1], [2], [4], [8], [16], [32], [64], [128], [200], [1, 1, 1]]
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
