"""Agents' conversations, short: what turns share is computed once, alone and with many agents in a small cache.

Prompts are of 2,600 tokens and more: of fewer, what is over a whole block of 128 may be more than 5%.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest

from pyrosome import LLM
from pyrosome.engine.request import Request
from pyrosome.options import SamplingParams
from pyrosome.session import common_prefix
from pyrosome.testing.make_nano import VOCABULARY
from pyrosome.testing.shapes import tiny
from pyrosome.testing.traces import agent_trace, chat_trace
from tests.engine.engines import bytes_for, engine_of, run
from tests.networks import network

CONFIG = tiny((0, 4, 128), vocab_size=VOCABULARY)  # of the tokenizer that writes the conversations
MAX_TOKENS = 4
ANSWER = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, logprobs=4)


@pytest.fixture(scope="module")
def llm(noise_checkpoint):
    """Writes the conversations: a token for each character, so that they are as long as the traces say."""
    with LLM(noise_checkpoint) as one:
        yield one


def requests(llm, turns, salt: str = "") -> list[Request]:
    """The turns' requests, each with the whole conversation, as clients send them."""
    prompts = [llm.chat_template.conversation(turn.messages, "high", turn.tools) for turn in turns]
    return [llm.request(p, ANSWER, salt=salt, constraint=None) for p in prompts]


def new_engine(**options):
    return engine_of(network(CONFIG, "trained"), "fp8", **options)


def computed(engine) -> int:
    """Tokens that went through the network, to rebuild state too."""
    return engine.stats.computed_tokens + engine.stats.replayed_tokens


@functools.cache
def answer_of_a_fresh_engine(ids: tuple[int, ...]):
    said = run(new_engine(), [Request("fresh", ids, ANSWER)])["fresh", 0]
    assert said.end.reuse.matched_tokens == 0
    return said.answer


@pytest.mark.parametrize("trace", [agent_trace(4, 1000, 1900), chat_trace(4, 2700, 3600)], ids=["agent", "chat"])
def test_from_the_second_turn_on_what_is_shared_is_reused(llm, trace):
    """With tools thoughts stay in the conversation; without, each turn leaves out those of the turn before."""
    engine, before = new_engine(), ()
    for r in requests(llm, trace):
        already, shared = computed(engine), common_prefix(before, r.ids)
        said = run(engine, [r])[r.id, 0]
        reused = said.end.reuse.reused_tokens
        if before:
            assert shared > 2560 and reused >= 0.95 * shared, said.end.reuse
        # The last token of an answer is given and not computed.
        assert computed(engine) - already == len(r.ids) - reused + MAX_TOKENS - 1
        assert said.answer == answer_of_a_fresh_engine(r.ids)
        before = r.ids


def test_what_an_agent_said_itself_is_not_computed_again_either(llm):
    engine, (first,) = new_engine(), requests(llm, agent_trace(1, 1000))
    said = run(engine, [dataclasses.replace(first, params=dataclasses.replace(ANSWER, max_tokens=200))])[first.id, 0]
    known = (*first.ids, *said.tokens)
    again = run(engine, [Request("again", (*known, *first.ids[:60]), ANSWER)])["again", 0]
    assert len(first.ids) < 0.95 * len(known) <= again.end.reuse.reused_tokens, again.end.reuse
    assert again.answer == answer_of_a_fresh_engine((*known, *first.ids[:60]))


@pytest.mark.parametrize("at_once", [1, 4], ids=["one after the other", "all at once"])
def test_agents_that_take_turns_in_a_cache_for_half_of_them_lose_nothing(llm, at_once):
    """Each of its own tenant; what has to leave goes to host memory and comes back."""
    traces = [requests(llm, agent_trace(3, 1000, 1800, seed), f"tenant {seed}") for seed in range(4)]
    room = bytes_for(CONFIG, 2 * max(len(trace[-1].ids) for trace in traces), max_sequences=2, kv_format="fp8")
    engine = new_engine(cache_bytes=room, host_bytes=64 << 20, max_sequences=2)
    needed = 0
    for turn in range(3):
        for first in range(0, 4, at_once):
            asked = [trace[turn] for trace in traces[first : first + at_once]]
            said = run(engine, asked)
            for trace, r in zip(traces[first:], asked, strict=False):
                found = said[r.id, 0].end.reuse
                needed += len(r.ids) - found.reused_tokens + MAX_TOKENS - 1
                if turn:
                    assert found.reused_tokens >= 0.95 * common_prefix(trace[turn - 1].ids, r.ids), found
                    assert said[r.id, 0].answer == answer_of_a_fresh_engine(r.ids)
    stats = engine.current_stats()
    assert computed(engine) == needed, "what was set aside was not computed again"
    assert stats.spilled_blocks and stats.restored_blocks, "there was not room for all"
    assert stats.evicted_blocks == stats.spilled_blocks, "nothing was lost"
