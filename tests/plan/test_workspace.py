"""Planned workspaces are what a step has alive: tensors to 2%, the native library's scratch chunk by chunk."""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading

import pytest
import torch

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.config import ModelConfig
from pyrosome.dist import Mesh
from pyrosome.engine import graphs
from pyrosome.engine.runner import Runner
from pyrosome.errors import CheckpointError, PlanError, RequestError
from pyrosome.model import numerics
from pyrosome.model.build import Network, fill
from pyrosome.model.numerics import numerics_named
from pyrosome.ops import index_topk, native, workspace
from pyrosome.plan import walk
from pyrosome.plan.scratch import Arena, arenas, scratch_bytes
from pyrosome.plan.walk import LEAST_LENT, Memory, Walk
from pyrosome.plan.workspace import (
    CONTEXT_GRAIN,
    NUMERICS,
    Spans,
    captured_bytes,
    decode_step,
    prompt_step,
    step_workspace,
)
from pyrosome.testing.checkpoints import random_tensors
from pyrosome.testing.live_bytes import LiveBytes, heap_bytes
from pyrosome.testing.shapes import tiny
from tests.golden.vectors import GOLDEN
from tests.plan.test_allocated import SHAPES

CONTEXT = 4096
FLASH = ModelConfig.preset("flash")
KV_FORMATS = {"exact": "f32", "trained": "fp8"}
needs_library = pytest.mark.skipif(not native.available(), reason="no native library here")


class Echo(Mesh):
    """A rank whose peers have the same parts as it: exchanges take the memory they take, and wait for nobody."""

    def all_gather(self, tensor):
        out = tensor.new_empty(self.size, *tensor.shape)
        out.copy_(tensor)
        return out


def runner(shape: str, numerics: str, kv_format: str, form: str, *, ranks: int = 1, **more) -> Runner:
    return Runner(network(shape, numerics, form, ranks), kv_format, 4, CONTEXT, **more)


@functools.cache
def network(shape: str, numerics: str, form: str, ranks: int) -> Network:
    layout = "bf16" if form == "float32" else "fp8fp4"
    if shape == "golden":
        index = open_checkpoint(GOLDEN / layout)
        config, tensors, drafts = index.config, read_tensors(index), index.has_drafts
    else:
        config, drafts = SHAPES[shape], True
        tensors = random_tensors(config, 0, layout)
    model = Network(config, numerics_named(numerics), drafts=drafts)
    if ranks > 1:
        model.bank.share(Echo(0, ranks))
    fill(model, tensors, unpack=form == "float32")
    return model.eval()


def measured(run: Runner, spans, **more) -> int:
    """The most that was alive while a step ran, and then a second like it, on a thread without kept blocks."""
    sequences = []
    for _ in range(2):
        group = [run.open() for _ in spans]
        sequences.append(group)
        for sequence, (start, _) in zip(group, spans, strict=True):
            if start:
                run.step([(sequence, [1] * start)])
    workspace.give_back()
    with LiveBytes() as live:
        for group in sequences:
            run.step([(s, [2] * tokens) for s, (_, tokens) in zip(group, spans, strict=True)], **more)
    return live.peak


def asked(run: Runner, spans, numerics: str, kv_format: str, form: str, **more) -> Spans:
    more = {"has_drafts": run.has_drafts, "is_drafting": False} | more
    return Spans(run.model.config, tuple(spans), CONTEXT, kv_format, numerics, form, **more)


PROMPT, MIXED = [(0, 200)], [(140, 1), (130, 40)]


@needs_library
@pytest.mark.parametrize("spans", [PROMPT, MIXED], ids=["prompt", "mixed"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", ["tiles", "float32"])
@pytest.mark.parametrize("numerics", KV_FORMATS)
@pytest.mark.parametrize("shape", ["tiny", "narrow", "golden"])
def test_a_step_has_alive_what_was_planned(shape, numerics, form, ranks, spans):
    kv_format = KV_FORMATS[numerics]
    run = runner(shape, numerics, kv_format, form, ranks=ranks)
    planned = step_workspace(asked(run, spans, numerics, kv_format, form, ranks=ranks))
    assert planned.tensor_bytes == pytest.approx(measured(run, spans), rel=0.02)


@needs_library
@pytest.mark.parametrize(
    ("kv_format", "spans", "num_drafts", "every_row"),
    [
        ("bf16", [(300, 200)], 0, False),
        ("bf16", [(200, 1), (130, 1)], 0, False),
        ("fp8", [(300, 4), (17, 4)], 3, True),
        ("fp8", [(0, 200)], 0, True),
    ],
)
def test_other_rows_drafts_and_logits_of_every_token_are_planned(kv_format, spans, num_drafts, every_row):
    run = runner("narrow", "trained", kv_format, "tiles", num_drafts=num_drafts)
    more = {"every_row": every_row}
    planned = step_workspace(asked(run, spans, "trained", kv_format, "tiles", num_drafts=num_drafts, **more))
    assert planned.tensor_bytes == pytest.approx(measured(run, spans, **more), rel=0.02)


@needs_library
@pytest.mark.parametrize(
    ("phase", "spans", "every_row", "fields"),
    [
        ("indexer", [(1500, 60)], False, {}),
        ("attention", [(300, 1), (200, 1)], False, {"index_topk": 400}),
        ("check", [(0, 100)], True, {"vocab_size": 9000}),  # logits are there, and streams are looked at
    ],
)
def test_each_phase_that_may_need_most_is_planned(phase, spans, every_row, fields):
    """In float32 rows, read by the definitions."""
    config = dataclasses.replace(SHAPES["tiny"], **fields)
    model = Network(config, numerics_named("exact"), drafts=False)
    fill(model, random_tensors(config, 0, "bf16", num_stages=0))
    run = Runner(model.eval(), "f32", 4, CONTEXT)
    group = [run.open() for _ in spans]
    for sequence, (start, _) in zip(group, spans, strict=True):
        if start:
            run.step([(sequence, [1] * start)])
    workspace.give_back()
    with LiveBytes() as live:
        run.step([(s, [2] * tokens) for s, (_, tokens) in zip(group, spans, strict=True)], every_row=every_row)
    asked_of = asked(run, spans, "exact", "f32", "tiles", quantised=False, every_row=every_row)
    planned = step_workspace(asked_of)
    assert planned.tensor_bytes == pytest.approx(live.peak, rel=0.02)
    assert planned.peak == phase


@needs_library
def test_blocks_that_are_lent_again_are_counted_once():
    run = runner("narrow", "trained", "fp8", "tiles")
    spans = [(0, 1500)]  # queries of 12 MB, index queries of 6
    planned = step_workspace(asked(run, spans, "trained", "fp8", "tiles"))
    assert LEAST_LENT < 4 * 1500 * 4 * 512
    assert planned.tensor_bytes == pytest.approx(measured(run, spans), rel=0.02)


@needs_library
@pytest.mark.parametrize("tokens", [60, 1200])
@pytest.mark.parametrize("numerics", KV_FORMATS)
def test_a_draft_stage_behind_a_step_is_planned(numerics, tokens):
    kv_format, config = KV_FORMATS[numerics], tiny((0, 0))
    model = Network(config, numerics_named(numerics), drafts=True)
    fill(model, random_tensors(config, 0, "bf16"))
    run = Runner(model.eval(), kv_format, 1, CONTEXT, num_drafts=2)
    sequence, ids = run.open(), [2] * tokens
    run.step([(sequence, [1] * 9)])
    workspace.give_back()
    with LiveBytes() as live:
        _, _, forward = run.forward([(sequence, ids)], [1])
        run.draft(forward, [(sequence, 8, ids)])
    more = {"num_drafts": 2, "is_drafting": True, "quantised": False}
    spans = asked(run, [(9, tokens)], numerics, kv_format, "tiles", **more)
    planned = step_workspace(spans)
    assert planned.tensor_bytes == pytest.approx(live.peak, rel=0.02)
    assert planned.peak.startswith("draft stage")
    assert planned.tensor_bytes > 1.1 * step_workspace(dataclasses.replace(spans, is_drafting=False)).tensor_bytes


@needs_library
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_captured_step_keeps_what_was_planned(sequences):
    run = runner("narrow", "trained", "fp8", "tiles")
    open_ones = [run.open() for _ in range(sequences)]
    for sequence in open_ones:
        run.step([(sequence, [1] * 300)])
    run.step([(s, [2]) for s in open_ones])
    kept_before = len(run.graphs.kept)
    with LiveBytes() as live:
        run.step([(s, [3]) for s in open_ones])
    assert len(run.graphs.kept) == kept_before and live.now
    spans = asked(run, [(301, 1)] * sequences, "trained", "fp8", "tiles")
    assert captured_bytes(spans) == pytest.approx(live.now, rel=0.02)


@needs_library
@pytest.mark.skipif(heap_bytes() is None, reason="this C library does not tell what it gave out")
@pytest.mark.parametrize(
    ("shape", "numerics", "form", "tokens"),
    [
        ("tiny", "trained", "tiles", 300),
        ("narrow", "trained", "tiles", 64),
        ("narrow", "trained", "tiles", 700),
        ("narrow", "exact", "tiles", 500),
        ("golden", "exact", "float32", 700),
    ],
)
def test_scratch_grows_chunk_by_chunk_as_planned(shape, numerics, form, tokens):
    kv_format = KV_FORMATS[numerics]
    run = runner(shape, numerics, kv_format, form)
    before, grown = torch.get_num_threads(), []

    def in_a_new_thread():  # whose scratch is empty
        torch.set_num_threads(1)
        gc.collect()
        workspace.give_back()
        sequence, heap = run.open(), heap_bytes()
        run.step([(sequence, [2] * tokens)])
        workspace.give_back()
        grown.append(heap_bytes() - heap)

    thread = threading.Thread(target=in_a_new_thread)
    try:
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    caller, _ = arenas(asked(run, [(0, tokens)], numerics, kv_format, form))
    assert caller.touched_bytes <= caller.held_bytes
    assert 0 <= grown[0] - caller.held_bytes < 1 << 18  # beside them are Python's own objects


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_sum_over_ranks_has_every_part_and_half_as_many_sums(ranks):
    part = torch.ones(40, FLASH.hidden_size)
    with torch.inference_mode(), LiveBytes() as live:
        total = Echo(0, ranks).sum(part)
    assert (total == ranks).all()
    memory = Memory()
    left = Walk(Spans(FLASH, ((0, 40),), 64, ranks=ranks), memory)._sum_of_ranks(memory.make(40, FLASH.hidden_size))
    assert memory.peak - part.nbytes == live.peak
    assert memory.now == left.num_bytes == part.nbytes


def test_live_bytes_are_of_storages_until_their_last_view_is_gone():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        view = x[10:].view(90, 11)
        y = torch.tensor([1.0, 2.0])
        assert live.now == 4008
        del x
        assert live.now == 4008
        view.add_(1)
        del view
        assert (live.now, live.peak, live.made) == (8, 4008, 4008)
        z = y + torch.ones(2)
        assert (live.now, live.peak) == (16, 4008) and z[1] == 3
        workspace.give_back()
        lent = workspace.empty(3 << 19, like=y)
        assert live.now == 16 + (6 << 20) and lent.view(-1, 2).shape[0] == 3 << 18
        del lent
        assert live.now == 16 + (6 << 20)  # kept for the next
    workspace.give_back()
    assert live.now == 16


def test_an_arena_takes_the_first_chunk_with_room_and_grows_by_doubling():
    arena = Arena()
    with arena.block():
        arena.take(1000)
        with arena.block():
            arena.take(1 << 20)  # not beside what is there: a chunk of twice the first
            arena.take(100)
        arena.take(10)
    with arena.block():
        arena.take(3 << 20)
    assert arena.rooms == [1 << 20, 2 << 20, 4 << 20]
    assert arena.touched == [1024 + 64, (1 << 20) + 128, 3 << 20]
    assert (arena.held_bytes, arena.touched_bytes) == (7 << 20, 1088 + (1 << 20) + 128 + (3 << 20))


def test_memory_lends_the_smallest_block_that_fits():
    memory = Memory()
    small, large = memory.lend(1 << 20), memory.lend(3 << 20)
    assert (small.room, large.room) == (4 << 20, 12 << 20)
    memory.drop(small, large)
    assert memory.now == 16 << 20  # kept
    again = memory.lend((9 << 20) // 4)
    assert again.room == 12 << 20 and memory.now == 16 << 20
    other = memory.lend((9 << 20) // 4 + 1)  # no block: a new one, rounded up to a sixteenth
    assert other.room == (9 << 20) + (1 << 20) and memory.peak == 26 << 20
    memory.drop(memory.make(5))
    assert memory.now == 26 << 20


def test_sizes_that_decide_are_those_of_the_code():
    assert LEAST_LENT == workspace.LEAST_BYTES
    assert (walk.INDEX_ROWS, walk.INDEX_ELEMENTS) == (index_topk.TILE_ROWS, index_topk.TILE_ELEMENTS)
    assert CONTEXT_GRAIN == graphs.CONTEXT_GRAIN
    assert tuple(numerics.NUMERICS) == NUMERICS


def test_every_further_thread_adds_its_own_scratch():
    one, many = (Spans(FLASH, ((0, 512),), 512, threads=n) for n in (1, 9))
    _, worker = arenas(many)
    vectors = scratch_bytes(many) - arenas(many)[0].touched_bytes - 8 * worker.touched_bytes
    assert vectors == 0 and worker.touched_bytes > 1 << 17
    assert arenas(one)[1].touched_bytes >= worker.touched_bytes
    exact = dataclasses.replace(many, numerics="exact", kv_format="f32")
    assert scratch_bytes(exact) > arenas(exact)[0].touched_bytes + 8 * arenas(exact)[1].touched_bytes


def test_a_prompt_of_flash_takes_what_its_widths_say():
    planned = prompt_step(FLASH, 2048, 1 << 20, has_drafts=True)
    queries = 2048 * 64 * 512 * 4
    assert planned.total_bytes == planned.tensor_bytes + planned.scratch_bytes
    assert 2 * queries < planned.tensor_bytes < 8 * queries
    assert planned.scratch_bytes > 2048 * 6 * (2048 + 4096) * 4  # what routed pairs make of their inputs
    assert planned.peak in planned.phases and planned.phases["attention"] > 2 * queries
    shorter = prompt_step(FLASH, 2048, 131_072, has_drafts=True)
    assert shorter.tensor_bytes < planned.tensor_bytes  # each token has a list of all HCA rows
    assert decode_step(FLASH, 8, 1 << 20).total_bytes < 64 << 20 < planned.total_bytes
    assert prompt_step(FLASH, 2048, 100) == prompt_step(FLASH, 100, 100)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: Spans(FLASH, (), 64), RequestError, "a step without spans was to be planned"),
        (lambda: Spans(FLASH, ((0, 0),), 64), RequestError, "a span's tokens is 0; a whole number of at least 1"),
        (lambda: Spans(FLASH, ((-1, 5),), 64), RequestError, "a span's first position is -1"),
        (lambda: Spans(FLASH, ((0, 65),), 64), RequestError, "a span of 65 tokens at position 0 .* the context has 64"),
        (lambda: Spans(FLASH, ((0, 5),), 0), RequestError, "max_context is 0"),
        (lambda: Spans(FLASH, ((0, 5),), 64, threads=float("nan")), RequestError, "threads is nan"),
        (lambda: Spans(FLASH, ((0, 5),), 64, num_drafts=-1), RequestError, "num_drafts is -1"),
        (lambda: Spans(FLASH, ((0, 5),), 64, ranks=True), RequestError, "ranks is True"),
        (lambda: Spans(FLASH, ((0, 5),), 64, "fp4"), CheckpointError, "kv_format 'fp4' is unknown"),
        (lambda: Spans(FLASH, ((0, 5),), 64, numerics="fast"), PlanError, "numerics 'fast' was asked for"),
        (lambda: Spans(FLASH, ((0, 5),), 64, form="stored"), PlanError, "form 'stored' .*: on other devices measure"),
        (lambda: prompt_step(FLASH, 0, 64), RequestError, "tokens is 0"),
        (lambda: decode_step(FLASH, 2, -4), RequestError, "context is -4"),
    ],
)
def test_nonsense_is_refused_with_what_was_expected(ask, error, message):
    with pytest.raises(error, match=message):
        ask()
