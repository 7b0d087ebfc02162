"""Agents' conversations, short: what turns share is computed once, alone and with many agents in a small cache."""

from __future__ import annotations

import dataclasses

import pytest

from pyrosome import LLM
from pyrosome.engine.request import Request
from pyrosome.options import SamplingParams
from pyrosome.testing.traces import agent_trace, chat_trace
from tests.engine.engines import run

ANSWER = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
TURNS = 5


@pytest.fixture(scope="module")
def llm():
    with LLM("builtin:nano") as one:
        yield one


def requests(llm, turns, salt: str = "") -> list[Request]:
    """The turns' requests, each with the whole conversation, as clients send them."""
    prompts = [llm.chat_template.conversation(turn.messages, "high", turn.tools) for turn in turns]
    return [llm.request(p, ANSWER, salt=salt, constraint=None) for p in prompts]


def common(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def engine_of(llm, **options):
    return llm.model.engine(dataclasses.replace(llm.options, **{"cache_bytes": 8 << 20, "drafter": "off", **options}))


@pytest.mark.parametrize("trace", [agent_trace, chat_trace])
def test_from_the_second_turn_on_what_is_shared_is_reused(llm, trace):
    """With tools thoughts stay in the conversation; without, each turn leaves out those of the turn before."""
    asked = requests(llm, trace(TURNS, 2700, 4500))
    engine, before = engine_of(llm), ()
    for r in asked:
        computed, replayed = engine.stats.computed_tokens, engine.stats.replayed_tokens
        said = run(engine, [r])[r.id, 0]
        shared, found = common(before, r.ids), said.end.reuse
        if before:
            assert shared > 2600 and found.reused_tokens >= 0.95 * shared, found
            done = engine.stats.computed_tokens - computed + engine.stats.replayed_tokens - replayed
            assert done == len(r.ids) - found.reused_tokens + 3
        assert said.tokens == run(engine, [dataclasses.replace(r, id="fresh", salt=r.id)])["fresh", 0].tokens
        before = r.ids


def test_agents_that_take_turns_in_a_cache_for_some_of_them_lose_nothing(llm):
    """Each of its own tenant; what has to leave goes to host memory and comes back."""
    traces = [requests(llm, agent_trace(3, 2700, 4000, seed), f"tenant {seed}") for seed in range(4)]
    longest = max(len(t[-1].ids) for t in traces)
    room = int(2.2 * longest * llm.kv_bytes()["per_token"])
    engine, before = engine_of(llm, cache_bytes=room, host_bytes=64 << 20, max_sequences=2), {}
    for turn in range(3):
        for agent, trace in enumerate(traces):
            r = trace[turn]
            found = run(engine, [r])[r.id, 0].end.reuse
            if turn:
                assert found.reused_tokens >= 0.95 * common(before[agent], r.ids), found
            before[agent] = r.ids
    stats = engine.current_stats()
    assert stats.spilled_blocks and stats.restored_blocks, "there was not room for all"
