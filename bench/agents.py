"""Agent traces through the engine: how much of each turn was computed before, and how long the first token took.

    python -m bench.agents [--turns N] [--agents N] [--room N] [--repeats N] [--quick] [--no-save]

Exit status 1 where from the second turn on less than 95% of what a turn shares with the one before it was reused, where
the second turn's first token took a tenth of the first's or more, or where the small cache was not too small.

Three measurements on the built-in model: one agent with tools and thinking over a preamble, one thinking chat
without tools, and several agents taken in turn with a cache that holds only some of them (the rest in host memory).
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import records
from pyrosome import LLM
from pyrosome.cache.streams import cache_tokens_in
from pyrosome.engine.request import Ended, Request, TokenEvent
from pyrosome.options import EngineOptions, SamplingParams
from pyrosome.session import common_prefix
from pyrosome.testing.traces import TEXT, Turn, agent_trace, chat_trace

RESULTS = Path(__file__).parent / "results"
ANSWER = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
REUSED, SECOND_TURN = 0.95, 0.1  # promised: of the shared prefix; of the first turn's time to its first token


def run_turns(llm: LLM, turns: Iterable[Turn], salt: str = "") -> Iterator[dict[str, Any]]:
    """One row per turn: prompt, prefix shared with the turn before, tokens reused, seconds to the first token."""
    before: tuple[int, ...] = ()
    for turn in turns:
        prompt = llm.chat_template.conversation(turn.messages, "high", turn.tools)
        request = llm.request(prompt, ANSWER, salt=salt, constraint=None)
        yield {"prompt": len(prompt.ids), "shared": common_prefix(before, prompt.ids), **first_token(llm, request)}
        before = prompt.ids


def first_token(llm: LLM, request: Request) -> dict[str, Any]:
    """Send a request and wait for its end: what it reused, and seconds to its first token, of the clock and CPU time.

    Raises:
        SystemExit: it failed.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    first: dict[str, float] = {}
    for event in llm.engine.submit(request):
        if isinstance(event, TokenEvent) and not first:
            first = {"first_s": time.perf_counter() - began, "first_cpu_s": time.process_time() - cpu_began}
        if isinstance(event, Ended):
            if event.reason == "error":
                raise SystemExit(event.error)
            r = event.reuse
            found = {"reused": r.reused_tokens, "replayed": r.replayed_tokens, "limit": r.limit, "reason": r.reason}
            return {**found, **first}
    raise SystemExit("a request ended without a word")


def one_alone(llm: LLM, trace: Callable[[], Iterable[Turn]], repeats: int) -> dict[str, Any]:
    """A whole trace, and its first two turns so often in all, each time as another tenant that finds nothing."""
    rows = list(run_turns(llm, trace(), "tenant 0"))
    again = [list(run_turns(llm, itertools.islice(trace(), 2), f"tenant {i}")) for i in range(1, repeats)]
    return summary(rows, [rows[:2], *again])


def summary(rows: list[dict[str, Any]], openings: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What is promised of a trace; of the openings, pairs of a first and a second turn, the medians."""
    shares = {c: [two[c] / one[c] for one, two in openings] for c in ("first_s", "first_cpu_s")}
    return {
        "turns": len(rows), "first_prompt": rows[0]["prompt"], "last_prompt": rows[-1]["prompt"],
        **reused(rows[1:]), "openings": len(openings),
        "turn_1_first_s": statistics.median(one["first_s"] for one, _ in openings),
        "turn_2_first_s": statistics.median(two["first_s"] for _, two in openings),
        "turn_2_share": statistics.median(shares["first_s"]),
        "turn_2_cpu_share": statistics.median(shares["first_cpu_s"]),
    }  # fmt: skip


def reused(later: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of what a turn had in common with the one before that was reused, and what limited the least."""
    least = min(later, key=lambda r: r["reused"] / r["shared"])
    return {
        "least_reused_share": least["reused"] / least["shared"],
        "least_because": f"{least['limit']}: {least['reason']}",
        "median_reused_share": statistics.median(r["reused"] / r["shared"] for r in later),
        "most_replayed": max(r["replayed"] for r in later),
    }  # fmt: skip


def interleaved(num_agents: int, num_turns: int, preamble: int, total: int, room: int) -> dict[str, Any]:
    """Several agents in turn, each of its own tenant so that nothing is shared, with a cache for `room` of them."""
    probe = LLM("builtin:nano")
    turn = list(agent_trace(num_turns, preamble, total))[-1]
    longest = len(probe.chat_template.conversation(turn.messages, "high", turn.tools).ids)
    cache = cache_for(probe, room * longest)
    options = EngineOptions(cache_bytes=cache, host_bytes=2 * num_agents * cache)
    began = time.process_time()
    with LLM("builtin:nano", options=options) as llm:
        agents = [run_turns(llm, agent_trace(num_turns, preamble, total, seed), f"tenant {seed}")
                  for seed in range(num_agents)]  # fmt: skip
        rounds = [[next(agent) for agent in agents] for _ in range(num_turns)]
        stats = llm.stats()
    later = [row for rows in rounds[1:] for row in rows]
    return {
        "agents": num_agents, "room": room, "turns": num_turns, "last_prompt": longest, "cache_bytes": cache,
        **reused(later),
        "first_turn_s": statistics.median(row["first_s"] for row in rounds[0]),
        "later_turn_s": statistics.median(row["first_s"] for row in later),
        "prompt_tokens": stats.prompt_tokens, "computed_tokens": stats.computed_tokens,
        "restored_blocks": stats.restored_blocks, "cpu_s": time.process_time() - began,
    }  # fmt: skip


def cache_for(llm: LLM, tokens: int) -> int:
    """The least `cache_bytes` that hold so many tokens."""
    config, kv_format, sequences = llm.model.config, llm.model.kv_format, llm.options.max_sequences
    return bisect.bisect_left(range(1 << 40), tokens, key=lambda n: cache_tokens_in(config, kv_format, n, sequences))


def letters_of(llm: LLM, tokens: int) -> int:
    """Characters of a trace's text that this model's tokenizer makes about so many tokens of."""
    return round(tokens * len(TEXT) / len(llm.tokenizer.encode(TEXT)))


def main() -> int:
    """Run the three; exit status 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--room", type=int, default=3, help="agents whose history the cache holds")
    parser.add_argument("--repeats", type=int, default=3, help="of the first two turns")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the lengths, 3 turns, nothing promised")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/agents.jsonl alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    turns, repeats, scale = (3, 1, 20) if args.quick else (args.turns, args.repeats, 1)
    record = {**records.machine(), "bench": "agents"}
    with LLM("builtin:nano") as llm:
        preamble, total = (letters_of(llm, tokens // scale) for tokens in (20_000, 60_000))
        record["agent"] = one_alone(llm, lambda: agent_trace(turns, preamble, total), repeats)
        record["chat"] = one_alone(llm, lambda: chat_trace(turns, preamble, total), repeats)
    record["interleaved"] = interleaved(args.agents, turns, preamble, total, args.room)
    for name in ("agent", "chat", "interleaved"):
        print(name, *(f"    {key}: {value}" for key, value in record[name].items()), sep="\n")
    if not args.no_save:
        records.append(RESULTS / "agents.jsonl", record)
    return 0 if args.quick or passes(record) else 1


def passes(record: dict[str, Any]) -> bool:
    """Whether all that was promised was found (NaN is not), and there was not room for all agents."""
    agent, chat, many = record["agent"], record["chat"], record["interleaved"]
    return (
        all(found["least_reused_share"] >= REUSED for found in (agent, chat, many))
        and all(found["turn_2_share"] < SECOND_TURN for found in (agent, chat))
        and many["restored_blocks"] > 0
    )


if __name__ == "__main__":
    sys.exit(main())
