"""On the golden checkpoints: a prefix hit, a fork and a session's turn give the bits of a fresh computation.

What is fresh is computed under a salt of its own, where nothing is known.
"""

from __future__ import annotations

import dataclasses

import pytest

from pyrosome.engine.engine import Engine
from pyrosome.engine.request import Request
from pyrosome.options import EngineOptions, SamplingParams
from tests.engine.engines import Eager, is_empty, run
from tests.golden.vectors import model
from tests.networks import agreeing_network, tokens

NETWORKS = {
    "bf16-exact": ("bf16", "exact", "f32"),
    "fp8fp4-exact": ("fp8fp4", "exact", "bf16"),
    "fp8fp4-trained": ("fp8fp4", "trained", "fp8"),
}
BASE, OTHER = tokens(420, seed=5), tokens(600, seed=6)
on_every_network = pytest.mark.parametrize("which", NETWORKS)


def engine_of(which: str, **options) -> Engine:
    if which.startswith("agreeing"):
        network, kv_format = agreeing_network((0, 4, 128), which.partition("-")[2]), "f32"
    else:
        loaded = model(*NETWORKS[which])
        network, kv_format = loaded.network, loaded.kv_format
    engine = Engine(network, kv_format, EngineOptions(**{"drafter": "off", "cache_bytes": 16 << 20, **options}))
    engine.runner.pool.poison()
    return engine


def ask(name: str, ids, num_tokens: int = 3, **about) -> Request:
    return Request(name, tuple(ids), SamplingParams(num_tokens, temperature=0, logprobs=4, ignore_eos=True), **about)


def fresh(engine: Engine, requests: list[Request], all_ids=None) -> list:
    """What each says where nothing is known; `all_ids` in place of their own."""
    cold = [
        dataclasses.replace(r, id=f"{r.id} fresh", salt=f"only {r.id}", session="", ids=tuple(ids))
        for r, ids in zip(requests, all_ids or [r.ids for r in requests], strict=True)
    ]
    said = run(engine, cold)
    assert all(said[r.id, 0].end.reuse.matched_tokens == 0 for r in cold)
    return [said[r.id, 0].answer for r in cold]


@on_every_network
def test_hits_at_every_shared_length(which):
    """Every residue modulo 128, after one whole block and after two; twice, as the second time finds state."""
    engine = engine_of(which, max_sequences=16, cache_bytes=64 << 20)
    run(engine, [ask("base", BASE)])
    for time in range(2):
        tail = OTHER[200 * time :]
        asked = {
            shared: ask(f"{shared} {time}", [*BASE[:shared], (BASE[shared] + 1 + time) % 160, *tail[:9]], 2)
            for shared in range(128, 257)
        }
        said = run(engine, list(asked.values()))
        for (shared, r), expected in zip(asked.items(), fresh(engine, list(asked.values())), strict=True):
            found = said[r.id, 0].end.reuse
            assert found.matched_tokens == shared // 128 * 128, (shared, found)
            assert found.reused_tokens + found.replayed_tokens == found.matched_tokens
            if time:
                assert found.replayed_tokens == 0, "a place where prompts part has its state from the first time on"
            assert said[r.id, 0].answer == expected, shared
    assert is_empty(engine)


@on_every_network
def test_a_hit_holds_the_pages_that_are_there_and_takes_those_it_writes_in(which):
    engine = engine_of(which)
    pool = engine.runner.pool
    run(engine, [ask("base", BASE)])
    for shared in (128, 200, 256, 300, 384, 400):
        before = {r: pool.num_free_pages(r) for r in pool.ratios}
        engine.add(ask(f"hit {shared}", [*BASE[:shared], *OTHER[:4]], 2))
        engine.step()
        (c,) = engine.completions
        for ratio in pool.ratios:
            written = {row // 64 for row in range(shared // 128 * 128 // ratio, (shared + 4) // ratio)}
            held = c.track.sequence.holding.pages[ratio]
            assert before[ratio] - pool.num_free_pages(ratio) == len(written)
            assert all((pool.num_holders(ratio, page) > 1) == (at not in written) for at, page in enumerate(held))
        while engine.has_work:
            engine.step()
    assert is_empty(engine)


@on_every_network
def test_forks_at_every_residue_go_two_ways(which):
    """Sessions forked at lengths of each residue modulo 4, around blocks and away from them."""
    engine = engine_of(which, max_sequences=16, cache_bytes=64 << 20)
    lengths = (1, 2, 3, 4, 5, 6, 7, 126, 127, 128, 129, 130, 131, 254, 255, 256, 257)
    sessions = [engine.call("session_open", ids=BASE[:n], salt=str(n)) for n in lengths]
    first = [ask(f"first {n}", [], session=s) for n, s in zip(lengths, sessions, strict=True)]
    said = run(engine, first)
    assert [said[r.id, 0].answer for r in first] == fresh(engine, first, [BASE[:n] for n in lengths])
    known = [[*BASE[:n], *said[r.id, 0].tokens] for n, r in zip(lengths, first, strict=True)]
    twins = [engine.call("session_fork", session=s) for s in sessions]
    turns = [ask(f"on {n}", [], 4, session=s) for n, s in zip(lengths, sessions, strict=True)]
    turns += [ask(f"another way {n}", OTHER[:5], 4, session=s) for n, s in zip(lengths, twins, strict=True)]
    both = run(engine, turns)
    expected = fresh(engine, turns, [*known, *([*k, *OTHER[:5]] for k in known)])
    for turn, answer in zip(turns, expected, strict=True):
        assert both[turn.id, 0].answer == answer, turn.id
    for s in (*sessions, *twins):
        engine.call("session_close", session=s)
    assert is_empty(engine)


@on_every_network
def test_what_was_taken_back_was_never_said(which):
    engine = engine_of(which, max_sequences=16, cache_bytes=64 << 20)
    counts = (1, 2, 3, 4, 5, 63, 126, 127, 128, 129, 200)
    sessions = [engine.call("session_open", ids=BASE[:300], salt=str(n)) for n in counts]
    run(engine, [ask(f"first {n}", [], session=s) for n, s in zip(counts, sessions, strict=True)])
    for n, s in zip(counts, sessions, strict=True):
        engine.call("session_rewind", session=s, num_tokens=n)
    known = [engine.call("session_ids", session=s) for s in sessions]
    assert [len(ids) for ids in known] == [303 - n for n in counts]
    turns = [ask(f"turn {n}", OTHER[:3], 4, session=s) for n, s in zip(counts, sessions, strict=True)]
    said = run(engine, turns)
    assert [said[r.id, 0].answer for r in turns] == fresh(engine, turns, [[*k, *OTHER[:3]] for k in known])


@pytest.mark.parametrize("which", [*NETWORKS, "agreeing-exact", "agreeing-trained"])
@pytest.mark.parametrize("most", range(1, 9))
def test_hits_and_forks_with_drafts(monkeypatch, which, most):
    monkeypatch.setattr("pyrosome.engine.drafting.Depth", Eager)
    engine, plain = engine_of(which, drafter="mtp", max_drafts=most), engine_of(which)
    run(engine, [ask("base", BASE)])
    asked = {n: ask(f"{n}", [*BASE[:n], *OTHER[:3]], 9) for n in (128, 129, 130, 131, 255, 256)}
    said = run(engine, list(asked.values()))
    assert [said[r.id, 0].answer for r in asked.values()] == fresh(plain, list(asked.values()))
    assert all(said[r.id, 0].end.reuse.matched_tokens == n // 128 * 128 for n, r in asked.items())
    sessions = [engine.call("session_open", ids=r.ids) for r in asked.values()]
    first = [ask(f"first {s}", [], 7, session=s) for s in sessions]
    said = run(engine, first)
    twins = [engine.call("session_fork", session=s) for s in sessions]
    turns = [ask(f"turn {s}", OTHER[5:7], 7, session=s) for s in twins]
    known = [[*r.ids, *said[f.id, 0].tokens, *OTHER[5:7]] for r, f in zip(asked.values(), first, strict=True)]
    after = run(engine, turns)
    assert [after[r.id, 0].answer for r in turns] == fresh(plain, turns, known)
    for s in (*sessions, *twins):
        engine.call("session_close", session=s)
    assert len(engine.stats.drafted) == most and engine.stats.drafted[-1] > 0
    if which.startswith("agreeing"):
        assert engine.stats.accepted[0] > 0
    assert is_empty(engine)
