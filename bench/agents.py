"""Agent traces through the engine: how much of each turn was computed before, and how long the first token took.

    python -m bench.agents [--turns N] [--agents N] [--room N] [--quick] [--no-save]

Exit status 1 where from the second turn on less than 95% of what a turn shares with the one before it was reused, or
the second turn's first token took a tenth of the first's or more.

Three measurements on the built-in model: one agent with tools and thinking over a preamble, one thinking chat
without tools, and several agents taken in turn with a cache that holds only some of them (the rest in host memory).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import records
from pyrosome import LLM
from pyrosome.engine.request import Ended, Request, TokenEvent
from pyrosome.options import EngineOptions, SamplingParams
from pyrosome.testing.traces import Turn, agent_trace, chat_trace

ANSWER = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
REUSED, SECOND_TURN = 0.95, 0.1  # promised: of the shared prefix; of the first turn's time to its first token


def run_turns(llm: LLM, turns: Iterable[Turn], salt: str = "") -> Iterable[dict[str, Any]]:
    """One row per turn: prompt, prefix shared with the turn before, tokens reused, seconds to the first token."""
    before: tuple[int, ...] = ()
    for turn in turns:
        prompt = llm.chat_template.conversation(turn.messages, "high", turn.tools)
        request = llm.request(prompt, ANSWER, salt=salt, constraint=None)
        shared = common(before, prompt.ids)
        began = time.perf_counter()
        row = first_token(llm, request, began)
        yield {"prompt": len(prompt.ids), "shared": shared, **row}
        before = prompt.ids


def first_token(llm: LLM, request: Request, began: float) -> dict[str, Any]:
    """Send a request, wait for its end."""
    first = 0.0
    for event in llm.engine.submit(request):
        if isinstance(event, TokenEvent) and not first:
            first = time.perf_counter() - began
        if isinstance(event, Ended):
            if event.reason == "error":
                raise SystemExit(event.error)
            r = event.reuse
            return {"reused": r.reused_tokens, "replayed": r.replayed_tokens, "limit": r.limit, "first_s": first}
    raise SystemExit("a request ended without a word")


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is promised of a trace, from turn 2 on."""
    later = rows[1:]
    return {
        "turns": len(rows), "first_prompt": rows[0]["prompt"], "last_prompt": rows[-1]["prompt"],
        "least_reused_share": min(r["reused"] / r["shared"] for r in later),
        "median_reused_share": statistics.median(r["reused"] / r["shared"] for r in later),
        "turn_1_first_s": rows[0]["first_s"], "turn_2_first_s": rows[1]["first_s"],
        "turn_2_share": rows[1]["first_s"] / rows[0]["first_s"],
    }  # fmt: skip


def interleaved(num_agents: int, num_turns: int, preamble: int, total: int, room: int) -> dict[str, Any]:
    """Several agents in turn, each of its own tenant so that nothing is shared, with a cache for `room` of them."""
    probe = LLM("builtin:nano")
    growth = probe.kv_bytes()["per_token"]
    turn = list(agent_trace(num_turns, preamble, total))[-1]
    longest = len(probe.chat_template.conversation(turn.messages, "high", turn.tools).ids)
    cache = int(1.25 * room * longest * growth)
    with LLM("builtin:nano", options=EngineOptions(cache_bytes=cache, host_bytes=2 * num_agents * cache)) as llm:
        agents = [run_turns(llm, agent_trace(num_turns, preamble, total, seed), f"tenant {seed}")
                  for seed in range(num_agents)]  # fmt: skip
        rows: list[list[dict[str, Any]]] = [[] for _ in agents]
        for _ in range(num_turns):
            for kept, agent in zip(rows, agents, strict=True):
                kept.append(next(iter(agent)))
        later = [r for kept in rows for r in kept[1:]]
        return {
            "agents": num_agents, "room": room, "turns": num_turns, "last_prompt": longest, "cache_bytes": cache,
            "least_reused_share": min(r["reused"] / r["shared"] for r in later),
            "limits": {k: sum(r["limit"] == k for r in later) for k in {r["limit"] for r in later}},
        }  # fmt: skip


def main() -> int:
    """Run the three; exit status 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--room", type=int, default=3, help="agents whose history the cache holds")
    parser.add_argument("--quick", action="store_true", help="a tenth of the lengths, few turns")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/agents.jsonl alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    turns, scale = (6, 10) if args.quick else (args.turns, 1)
    where = records.machine()
    with LLM("builtin:nano") as llm:
        agent = summary(list(run_turns(llm, agent_trace(turns, 20_000 // scale, 60_000 // scale))))
        print(f"agent with tools: {agent}")
        chat = summary(list(run_turns(llm, chat_trace(turns, 20_000 // scale, 50_000 // scale))))
        print(f"thinking chat:    {chat}")
    many = interleaved(args.agents, max(3, turns // 4), 20_000 // scale, 60_000 // scale, args.room)
    print(f"interleaved:      {many}")
    kept = min(found["least_reused_share"] for found in (agent, chat, many))
    slowest = max(agent["turn_2_share"], chat["turn_2_share"])
    if not args.no_save:
        record = {**where, "bench": "agents", "agent": agent, "chat": chat, "interleaved": many}
        records.append(Path(__file__).parent / "results" / "agents.jsonl", record)
    return 0 if args.quick or (kept >= REUSED and slowest < SECOND_TURN) else 1


if __name__ == "__main__":
    sys.exit(main())
