"""State cut back, copied, moved and rebuilt: what follows has the bits of a sequence that only ever grew."""

from __future__ import annotations

import pytest
import torch

from pyrosome.cache.streams import BLOCK_TOKENS, pages_for
from pyrosome.engine.runner import Runner, Sequence
from pyrosome.testing.shapes import tiny
from tests.networks import network, run, tokens

CONFIG = tiny((0, 4, 128, 4))
IDS = tokens(460)
ARITHMETICS = {"exact": "f32", "trained": "fp8"}
on_both = pytest.mark.parametrize("numerics", ARITHMETICS)
WRONG = [(t + 1) % 160 for t in IDS]


@pytest.fixture(scope="module")
def whole():
    return {n: run(network(CONFIG, n), IDS, kv_format=f) for n, f in ARITHMETICS.items()}


def runner_of(numerics: str, num_drafts: int = 3, sequences: int = 4) -> Runner:
    runner = Runner(network(CONFIG, numerics), ARITHMETICS[numerics], sequences, len(IDS) + 8, num_drafts=num_drafts)
    runner.pool.poison()
    return runner


def grown(runner: Runner, length: int) -> Sequence:
    sequence = runner.open()
    if length:
        runner.step([(sequence, IDS[:length])])
    return sequence


def goes_on(runner: Runner, sequence: Sequence, whole, until: int | None = None) -> bool:
    """Whether a few single tokens and then a span, past the next blocks, give the bits of the whole."""
    start = sequence.length
    until = until or min(len(IDS), start + 140)
    rows = [runner.step([(sequence, [IDS[at]])]) for at in range(start, min(start + 3, until))]
    rows += [runner.step([(sequence, IDS[start + len(rows) : until])], every_row=True)[0]] if until > start + 3 else []
    got = torch.cat([r[0][None] if isinstance(r, list) else r for r in rows])
    return torch.equal(got, whole[start:until])


@on_both
@pytest.mark.parametrize("num_drafts", range(1, 9))
def test_any_number_of_drafts_accepted_leaves_the_state_of_as_many_single_tokens(whole, numerics, num_drafts):
    runner = runner_of(numerics, num_drafts, 1)
    for length in (124, 127, 129, 255):
        for accepted in range(num_drafts + 1):
            sequence = grown(runner, length)
            drafts = IDS[length + 1 : length + 1 + accepted] + WRONG[length + 1 + accepted : length + 1 + num_drafts]
            rows = runner.step([(sequence, [IDS[length], *drafts])], every_row=True)[0]
            assert torch.equal(rows[: accepted + 1], whole[numerics][length : length + accepted + 1])
            sequence.length = length + 1 + accepted
            assert goes_on(runner, sequence, whole[numerics], sequence.length + 12), (length, accepted)
            runner.close(sequence)


@on_both
@pytest.mark.parametrize("num_drafts", [1, 3, 8])
def test_a_length_that_can_be_cut_back_to_goes_on_and_one_less_cannot(whole, numerics, num_drafts):
    runner = runner_of(numerics, num_drafts, 1)
    for length in (1, 5, 128, 259):
        sequence = grown(runner, length)
        possible = [n for n in range(length + 1) if runner.can_rewind(sequence, n)]
        assert possible == list(range(max(0, length - num_drafts), length + 1))
        assert not runner.can_rewind(sequence, length + 1) and not runner.can_rewind(sequence, -1)
        runner.close(sequence)
        for target in possible:
            sequence = grown(runner, length)
            sequence.length = target
            assert goes_on(runner, sequence, whole[numerics], target + 12), (length, target)
            runner.close(sequence)


def adopted(runner: Runner, sequence: Sequence, length: int) -> Sequence:
    """A sequence without state that has the pages of another's first tokens."""
    pages = {r: held[: pages_for(length, r)] for r, held in sequence.holding.pages.items()}
    return Sequence(runner.pool.adopt(pages))


def moved(runner: Runner, sequence: Sequence, snapshot) -> Sequence:
    """A sequence that has the whole blocks' pages of another, and a state."""
    twin = adopted(runner, sequence, snapshot.length // BLOCK_TOKENS * BLOCK_TOKENS)
    runner.restore(twin, snapshot)
    return twin


LENGTHS = (1, 2, 3, 4, 5, 126, 127, 128, 129, 130, 131, 255, 256, 257, 300)


@on_both
def test_a_copy_of_the_state_at_any_length_goes_on_in_another_place(whole, numerics):
    runner = runner_of(numerics)
    for length in LENGTHS:
        sequence = grown(runner, length)
        snapshot = runner.snapshot(sequence)
        twin = moved(runner, sequence, snapshot)
        assert twin.length == length and twin.slot != sequence.slot
        assert goes_on(runner, twin, whole[numerics]), length
        assert goes_on(runner, sequence, whole[numerics]), "the one it was copied from is as it was"
        runner.close(twin)
        runner.close(sequence)


@on_both
def test_after_it_was_put_back_state_can_be_cut_back_only_as_far_as_it_goes(whole, numerics):
    """A copy holds what its length needs, and not what a shorter one would."""
    runner = runner_of(numerics)
    for length in LENGTHS:
        sequence = grown(runner, length)
        snapshot = runner.snapshot(sequence)
        for target in range(length + 1):
            twin = moved(runner, sequence, snapshot)
            if runner.can_rewind(twin, target):
                twin.length = target
                assert goes_on(runner, twin, whole[numerics], target + 12), (length, target)
            runner.close(twin)
        runner.close(sequence)


@on_both
@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_copy_of_an_earlier_state_is_that_of_then(whole, numerics, back):
    runner = runner_of(numerics)
    for length in (5, 128, 130, 257, 258, 300):
        sequence = grown(runner, length)
        twin = moved(runner, sequence, runner.snapshot(sequence, length - back))
        assert twin.length == length - back and goes_on(runner, twin, whole[numerics]), length
        runner.close(twin)
        runner.close(sequence)


@on_both
@pytest.mark.parametrize("step_tokens", [50, 2048])
def test_state_is_rebuilt_from_history_at_every_block(whole, numerics, step_tokens):
    """From nothing, and from the state of every earlier block."""
    runner = runner_of(numerics)
    sequence = grown(runner, 400)
    states = {}
    for at in (128, 256):
        at_then = grown(runner, at)
        states[at] = runner.snapshot(at_then)
        runner.close(at_then)
    for stop in (128, 256, 384):
        for start in (0, 128, 256):
            if start >= stop:
                continue
            twin = adopted(runner, sequence, stop)
            if start:
                runner.restore(twin, states[start])
            else:
                runner.pool.prepare(twin.holding, 0, 0)
            computed = runner.replay(twin, IDS, stop, step_tokens=step_tokens)
            assert twin.length == stop and 0 < computed <= stop - start
            assert goes_on(runner, twin, whole[numerics], stop + 70), (start, stop)
            runner.close(twin)
    assert goes_on(runner, sequence, whole[numerics]), "nobody wrote into what it holds"


@on_both
def test_two_ways_from_one_past(whole, numerics):
    runner = runner_of(numerics)
    for length in LENGTHS:
        sequence = grown(runner, length)
        twin = runner.fork(sequence)
        runner.step([(twin, WRONG[length : length + 9])])
        third = runner.fork(sequence)
        assert goes_on(runner, sequence, whole[numerics]), length
        assert goes_on(runner, third, whole[numerics]), length
        for s in (sequence, twin, third):
            runner.close(s)
