"""Steps: what is refused changes nothing, and a step that failed never leads to a wrong answer."""

from __future__ import annotations

import pytest
import torch

from pyrosome.engine.runner import Runner, check_ids
from pyrosome.errors import ContextTooLong, DoesNotFit, EngineError, RequestError
from pyrosome.testing.shapes import tiny
from tests.networks import assert_same, build_network, network, run, tokens

CONFIG = tiny((0, 4, 128))
IDS = tokens(200)


@pytest.fixture(scope="module")
def whole():
    return run(network(CONFIG), IDS)


def opened(length: int = 50, max_sequences: int = 2, max_context: int = 200):
    """A runner with one sequence of some tokens."""
    runner = Runner(network(CONFIG), "f32", max_sequences, max_context)
    runner.pool.poison()
    sequence = runner.open()
    runner.step([(sequence, IDS[:length])])
    return runner, sequence


def goes_on(runner, sequence, whole, length: int = 50) -> None:
    """The sequence still has its length, and the logits that follow are right."""
    assert sequence.length == length
    assert_same(runner.step([(sequence, IDS[length:120])], every_row=True)[0], whole[length:120])


def test_a_step_gives_the_last_row_of_each_span_or_all(whole):
    runner = Runner(network(CONFIG), "f32", 2, 200)
    a, b = runner.open(), runner.open()
    rows = runner.step([(a, IDS[:7]), (b, IDS[:30])])
    assert [tuple(r.shape) for r in rows] == [(160,), (160,)]
    assert_same(torch.stack(rows), whole[[6, 29]])
    assert (a.length, b.length) == (7, 30)
    rows = runner.step([(b, IDS[30:31]), (a, IDS[7:12])], every_row=True)
    assert_same(torch.cat(rows), torch.cat([whole[30:31], whole[7:12]]))
    assert (a.length, b.length) == (12, 31)
    assert all(r.dtype == torch.float32 and not r.requires_grad for r in rows)


WRONG = [[], [160], [-1], [5, 160], [5, True], [1.0], ["5"], [None], [2**70]]


@pytest.mark.parametrize("ids", WRONG, ids=repr)
def test_wrong_ids_are_refused_and_change_nothing(whole, ids):
    runner, sequence = opened()
    with pytest.raises(RequestError):
        runner.step([(sequence, ids)])
    with pytest.raises(RequestError):
        runner.step_with_drafts(sequence, ids)
    goes_on(runner, sequence, whole)


@pytest.mark.parametrize("ids", WRONG, ids=repr)
def test_one_wrong_span_refuses_the_whole_step(whole, ids):
    runner, sequence = opened()
    other = runner.open()
    for spans in ([(sequence, IDS[50:52]), (other, ids)], [(other, ids), (sequence, IDS[50:52])]):
        with pytest.raises(RequestError):
            runner.step(spans)
        assert other.length == 0
    goes_on(runner, sequence, whole)
    assert_same(runner.step([(other, IDS[:9])])[0], whole[8])


def test_a_wrong_id_is_named_with_its_position_and_the_vocabulary():
    with pytest.raises(RequestError, match=r"token 160 at position 2 .* \(integers 0 to 159\)"):
        check_ids([0, 159, 160], 160)
    with pytest.raises(RequestError, match="empty prompt"):
        check_ids([], 160)
    check_ids([0, 159], 160)


def test_one_sequence_twice_and_no_sequence_are_refused(whole):
    runner, sequence = opened()
    with pytest.raises(RequestError, match=r"each sequence once.*2 spans"):
        runner.step([(sequence, IDS[50:51]), (sequence, IDS[51:52])])
    with pytest.raises(RequestError, match="at least one; 0 spans"):
        runner.step([])
    goes_on(runner, sequence, whole)


def test_a_sequence_that_would_outgrow_the_pool_is_refused_whole(whole):
    runner, sequence = opened(length=50, max_context=60)
    other = runner.open()
    with pytest.raises(ContextTooLong, match="61 tokens were asked for and the context holds 60"):
        runner.step([(other, IDS[:5]), (sequence, IDS[50:61])])
    assert (sequence.length, other.length) == (50, 0)
    assert_same(runner.step([(sequence, IDS[50:60])], every_row=True)[0], whole[50:60])
    with pytest.raises(ContextTooLong):
        runner.step([(sequence, IDS[60:61])])
    assert sequence.length == 60


def test_closing_frees_the_slot_and_the_next_sequence_starts_from_nothing(whole):
    runner, sequence = opened(length=150, max_sequences=1)
    with pytest.raises(DoesNotFit):
        runner.open()
    runner.close(sequence)
    again = runner.open()
    assert again.length == 0
    assert_same(runner.step([(again, IDS[:120])], every_row=True)[0], whole[:120])


def test_closing_twice_is_our_fault_and_not_the_caller_s():
    runner, sequence = opened()
    runner.close(sequence)
    with pytest.raises(EngineError):
        runner.close(sequence)


@pytest.mark.parametrize("taken_again", [False, True])
def test_a_closed_sequence_can_do_nothing(taken_again):
    runner, sequence = opened(max_sequences=1)
    runner.close(sequence)
    if taken_again:
        runner.step([(runner.open(), IDS[:50])])
    with pytest.raises(EngineError):
        runner.step([(sequence, IDS[50:51])])
    with pytest.raises(EngineError):
        runner.close(sequence)


# A forward that fails half-way: the layers before have written their rows already.


def fails_once(monkeypatch, runner, spans) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner.model.layers[2], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.step(spans)


def with_own_network(length: int = 50):
    runner = Runner(build_network(CONFIG), "f32", 2, 200)
    runner.pool.poison()
    sequence = runner.open()
    runner.step([(sequence, IDS[:length])])
    return runner, sequence


def test_a_single_token_whose_step_failed_can_be_tried_again(monkeypatch, whole):
    """Rings have a row to spare for exactly this: what one token overwrites, it does not read."""
    runner, sequence = with_own_network()
    other = runner.open()
    fails_once(monkeypatch, runner, [(sequence, IDS[50:51])])
    fails_once(monkeypatch, runner, [(sequence, [3]), (other, [3])])
    goes_on(runner, sequence, whole)
    assert other.length == 0


def test_a_first_span_whose_step_failed_can_be_tried_again(monkeypatch, whole):
    runner = Runner(build_network(CONFIG), "f32", 1, 200)
    sequence = runner.open()
    fails_once(monkeypatch, runner, [(sequence, IDS[:130])])
    assert sequence.length == 0
    assert_same(runner.step([(sequence, IDS[:120])], every_row=True)[0], whole[:120])


@pytest.mark.parametrize("num_tokens", [2, 10, 60])
def test_a_long_span_whose_step_failed_goes_on_rightly_or_not_at_all(monkeypatch, whole, num_tokens):
    runner, sequence = with_own_network()
    fails_once(monkeypatch, runner, [(sequence, IDS[50 : 50 + num_tokens])])
    try:
        rows = runner.step([(sequence, IDS[50:120])], every_row=True)[0]
    except EngineError:
        return
    assert_same(rows, whole[50:120])


def test_a_head_that_fails_leaves_the_length_as_it_was(monkeypatch):
    runner, sequence = with_own_network()

    def fail(streams):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner.model, "logits", fail)
    with pytest.raises(RuntimeError):
        runner.step([(sequence, IDS[50:51])])
    assert sequence.length == 50


# Drafts.


def test_draft_rows_come_for_every_position_whose_next_id_is_known():
    runner = Runner(network(CONFIG), "f32", 2, 200)
    a, b = runner.open(), runner.open()
    whole = runner.step_with_drafts(a, IDS[:60])
    assert whole.shape == (59, 160)
    pieces = [runner.step_with_drafts(b, ids) for ids in (IDS[:1], IDS[1:2], IDS[2:40], IDS[40:60])]
    assert [len(p) for p in pieces] == [0, 1, 38, 20]
    assert_same(torch.cat(pieces), whole)
    assert (a.length, b.length) == (60, 60)


def test_a_step_without_drafts_leaves_what_the_next_draft_needs():
    """The last streams are remembered by every step.  The stage's own window has a gap: only row 0 is comparable."""
    runner = Runner(network(CONFIG), "f32", 2, 200)
    a, b = runner.open(), runner.open()
    first = runner.step_with_drafts(a, IDS[:2])
    runner.step([(b, IDS[:1])])
    assert_same(runner.step_with_drafts(b, IDS[1:2]), first)


def test_a_head_that_fails_leaves_what_the_next_draft_needs(monkeypatch):
    def fail(streams):
        raise RuntimeError("out of memory")

    drafts = []
    for fails in (False, True):
        runner = Runner(build_network(CONFIG), "f32", 1, 200)
        sequence = runner.open()
        runner.step_with_drafts(sequence, IDS[:50])
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(runner.model, "logits", fail)
                with pytest.raises(RuntimeError):
                    runner.step([(sequence, [3])])
        drafts.append(runner.step_with_drafts(sequence, IDS[50:60]))
    assert_same(drafts[1], drafts[0])


def test_a_network_without_a_draft_stage_keeps_no_streams_for_it():
    model = build_network(CONFIG)
    model.mtp = torch.nn.ModuleList()
    plain, with_drafts = (Runner(m, "f32", 2, 200) for m in (model, network(CONFIG)))
    assert (plain.has_drafts, with_drafts.has_drafts) == (False, True)
    assert plain.pool.plan.state_bytes < with_drafts.pool.plan.state_bytes
    assert_same(plain.step([(plain.open(), IDS[:9])])[0], with_drafts.step([(with_drafts.open(), IDS[:9])])[0])
