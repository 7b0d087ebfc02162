"""However a sequence is cut, batched or padded, its logits are the same.

The cache starts out poisoned with NaN, so a row that is read without having been written shows at once.
"""

import pytest
import torch

from pyrosome.engine.runner import Runner
from pyrosome.model.step import Span, Step
from pyrosome.testing.shapes import tiny
from tests.networks import assert_same, build_network, network, run, tokens

CONFIG = tiny((0, 4, 128, 4))
LENGTH = 260  # past two HCA windows, and past index_topk x 4 = 64


@pytest.fixture(scope="module")
def whole():
    return run(network(CONFIG), tokens(LENGTH))


@pytest.mark.parametrize("first", range(1, LENGTH, 37))
def test_every_cut_point(whole, first):
    """Every residue mod 4 and mod 128 is among the cuts 1..259."""
    ids = tokens(LENGTH)
    for cut in range(first, min(first + 37, LENGTH)):
        assert_same(run(network(CONFIG), ids, [cut]), whole)


def test_token_by_token_and_every_length(whole):
    ids = tokens(LENGTH)
    by_token = run(network(CONFIG), ids, range(1, LENGTH))
    assert_same(by_token, whole)
    for length in range(1, LENGTH + 1):
        assert_same(run(network(CONFIG), ids[:length])[-1], by_token[length - 1])


@pytest.mark.parametrize("size", [2, 3, 5, 6, 31, 64, 127, 129])
def test_spans_of_a_fixed_size(whole, size):
    assert_same(run(network(CONFIG), tokens(LENGTH), range(size, LENGTH, size)), whole)


def test_where_top_k_begins_to_choose():
    """4,096 positions, the 512 best of up to 1,024 rows: the official top-k, at a width a test can afford."""
    ids, model = tokens(4096), network(tiny((4, 128), index_topk=512))
    whole = run(model, ids)
    assert_same(run(model, ids, [2047, 2048, 2051, 2053, 3000, *range(4080, 4096)]), whole)
    assert_same(run(model, ids[:2049])[-1], whole[2048])


def lengths_in_one_step(model, lengths, ids):
    runner = Runner(model, "f32", len(lengths), max(lengths) + 8)
    runner.pool.poison()
    sequences = [runner.open() for _ in lengths]
    starts = [ids[i : i + n] for i, n in enumerate(lengths)]
    first = runner.step(list(zip(sequences, starts, strict=True)), every_row=True)
    # then a mixed step: single tokens beside longer spans, in another order
    more = [ids[50 + i : 50 + i + (1 if i % 2 else 1 + i)] for i in range(len(lengths))]
    mixed = runner.step(list(zip(sequences, more, strict=True))[::-1], every_row=True)[::-1]
    return [(a + b, torch.cat([x, y])) for a, b, x, y in zip(starts, more, first, mixed, strict=True)]


def test_several_sequences_in_one_step_equal_each_alone():
    model, ids = network(CONFIG), tokens(600)
    for prompt, together in lengths_in_one_step(model, [1, 3, 200, 4, 5, 127, 128, 129], ids):
        assert_same(together, run(model, prompt))


def test_sequences_that_come_and_go_leave_nothing_behind():
    """A slot and pages given back are taken by the next sequence: it must not see what was there."""
    model, ids = network(CONFIG), tokens(300)
    runner = Runner(model, "f32", 2, 260)
    runner.pool.poison()
    for start, length in ((0, 250), (7, 40), (40, 259), (3, 5)):
        old, new = runner.open(), runner.open()
        runner.step([(old, ids[:200])])
        prompt = ids[start : start + length]
        assert_same(runner.step([(new, prompt)], every_row=True)[0], run(model, prompt))
        runner.close(old)
        runner.close(new)
    assert runner.pool.num_free_slots == 2


@pytest.mark.parametrize(("spans", "length", "context"), [(1, 0, 260), (4, 0, 64), (3, 50, 0), (5, 200, 260)])
def test_padding_changes_nothing(spans, length, context):
    model, ids = network(CONFIG), tokens(200)
    runner = Runner(model, "f32", 2, 260)
    runner.pool.poison()
    with torch.inference_mode():
        holdings = [runner.pool.open() for _ in range(2)]
        for a, b in ((0, 37), (37, 38), (38, 87)):
            pieces = []
            for holding, shift in zip(holdings, (0, 100), strict=True):
                runner.pool.prepare(holding, a, b)
                pieces.append(Span(holding.slot, a, ids[shift + a : shift + b]))
            step = Step.of(pieces, pad_spans_to=spans, pad_lengths_to=length, context=context)
            assert (step.position_T < 0).any() == (len(step.ids_T) > 2 * (b - a))
            logits = model.logits(model(step, cache=runner.pool.layers(step)).streams)
            for n, shift in ((0, 0), (1, 100)):
                first = step.layout[n][0]
                assert_same(logits[first : first + b - a], run(model, ids[shift : shift + b])[a:])
            assert torch.equal(step.last_token_B()[:2], torch.tensor([x + b - a - 1 for x, _ in step.layout[:2]]))


@pytest.mark.parametrize("layer", ["window", "csa", "hca"])
def test_later_tokens_never_change_earlier_logits(layer):
    ratio = {"window": 0, "csa": 4, "hca": 128}[layer]
    model, ids = network(tiny((ratio, ratio))), tokens(LENGTH)
    before = run(model, ids)
    for change in (1, 3, 4, 100, 127, 128, 200, 255, 259):
        after = run(model, ids[:change] + [(t + 1) % 160 for t in ids[change:]])
        assert torch.equal(after[:change], before[:change])
        assert not torch.equal(after[change], before[change])


@pytest.mark.parametrize("drafts", [1, 2, 4, 7])
def test_rejected_drafts_are_a_length_set_back(whole, drafts):
    """A ring of window + drafts - 1 rows survives rejection, and one row fewer does not."""
    ids = tokens(LENGTH)

    def with_rejections(ring_for):
        runner = Runner(network(CONFIG), "f32", 1, LENGTH + drafts, num_drafts=ring_for)
        runner.pool.poison()
        sequence, rows = runner.open(), []
        rows += list(runner.step([(sequence, ids[:140])], every_row=True)[0])
        for p in range(140, LENGTH):
            wrong = [(t + 1 + p) % 160 for t in ids[:drafts]]
            rows.append(runner.step([(sequence, [ids[p], *wrong])], every_row=True)[0][0])
            sequence.length = p + 1
        return torch.stack(rows)

    assert_same(with_rejections(drafts), whole)
    if drafts > 1:
        assert (with_rejections(drafts - 1) - whole).abs().max() > 1e-3


def test_a_network_full_of_ties():
    """Index weights of zero make every score equal: the lowest rows must win, on every route."""
    model = build_network(CONFIG)
    for block in model.layers:
        if block.ratio == 4:
            block.attn.indexer.weights_proj.value.data.zero_()
    ids = tokens(200)
    whole = run(model, ids)
    assert_same(run(model, ids, range(1, 200)), whole)
    assert_same(run(model, ids, [65, 130, 131]), whole)
    chosen = model(Step.of([Span(0, 0, ids)])).scores[0].rows
    assert torch.equal(chosen[-1], torch.arange(16))


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_stored_rows_are_seen_by_their_own_span_as_by_later_ones(kv_format):
    """With rounded rows, a route that read its own rows unrounded would drift by whole units.

    Rounding makes tiny random networks chaotic: the last bits of a sum may flip a code.  So a window-only network
    with one layer, whose rows do not depend on other rows.
    """
    model, ids = network(tiny((0,))), tokens(120)
    whole = run(model, ids, kv_format=kv_format)
    assert (run(model, ids, range(1, 120), kv_format=kv_format) - whole).abs().median() < 1e-5
    assert (run(model, ids) - whole).abs().median() > 1e-4  # the rounding is there
