"""A server under load, and what a server adds to an engine's first token.

    python -m bench.serve [--seconds 300] [--clients 200] [--model NAME] [--no-overhead] [--out FILE] [--no-save]

**Load**: clients that stream to the end, leave at any moment, send what is no request, or hardly read, against a server
in a process of its own.  Exit status 1 where any answer is 5xx but a 503 with a reason and Retry-After (429 likewise),
a stream breaks off, a request is stuck, and, once nobody is left, where anything is still held: requests, sequences,
pages of the cache besides those of kept prefixes, or memory beyond what there was after a fifth of that time before.

**Overhead**: the same prompts to the same engine, directly in this process and over HTTP, for 32 clients that ask at
their own times and for one: seconds to the first token, medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from bench import records
from bench.serve_clients import COMPLETIONS, WORDS, Caller, Tally, asked, client
from pyrosome.chat import Tokenizer
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.aio import AsyncEngine, EngineProcess
from pyrosome.engine.request import Request, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.measure.served import told_after
from pyrosome.options import SamplingParams
from pyrosome.plan.inventory import Model
from pyrosome.server.memory import REST_S

RESULTS = Path(__file__).parent / "results"
MODEL, AT_ONCE, ROUNDS, ASKED, ANSWER_TOKENS = "builtin:nano", 32, 5, 4, 4
PAUSE_S = 2.0  # between two requests of a client, on average
CACHE = {"cache_bytes": 64 << 20}
GROWN_MIB, GROWN_SHARE = 32.0, 0.05  # of resident memory, that is nobody's fault
SETTLE_S = 60.0


@contextlib.asynccontextmanager
async def server(**options: Any) -> AsyncIterator[dict[str, Any]]:
    """A server's process; `port`, `pid` and `engine`, once it answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYROSOME_LOG": "WARNING"}
    command = [sys.executable, "-m", "bench.serve_side", json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout
        line = await asyncio.to_thread(process.stdout.readline)
        if not line:
            raise SystemExit("the server did not start; what it said is on standard error")
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


async def load(
    seconds: float, clients: int, model: str = MODEL, *, weighs: bool = True, **options: Any
) -> dict[str, Any]:
    """What a server did under so many clients; `wrong` lists what it may not do.

    Args:
        weighs: memory is compared with what it was after a fifth of the time, when all had rest.
    """
    tally, memory, base = Tally(), list[dict[str, float]](), None
    settings: dict[str, Any] = {"max_queue": 128, "write_s": 20.0, "drain_s": 5.0, "model": model, **CACHE, **options}
    async with server(**settings) as told:
        if weighs:
            await _clients_for(told["port"], seconds / 5, clients, Tally(), 10**6)
            base = _sample(told, await _settled(told["port"], weighs=True), -1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        watching = asyncio.create_task(_watch(told, memory, began + seconds))
        await _clients_for(told["port"], seconds, clients, tally, 0)
        await watching
        last = await _settled(told["port"], weighs=weighs)
        memory.append(_sample(told, last, loop.time() - began))
    tally.wrong += _held(last) + (_grown(base, memory[-1]) if base else [])
    firsts = sorted(tally.first_byte_s) or [0.0]
    first_byte = {"median": statistics.median(firsts), "p99": firsts[int(len(firsts) * 0.99)], "worst": firsts[-1]}
    return {
        "seconds": seconds, "clients": clients, "model": model, "counts": dict(sorted(tally.counts.items())),
        "answers": sum(tally.counts.values()), "wrong": tally.wrong[:20], "num_wrong": len(tally.wrong),
        "first_byte_s": first_byte, "ended": last.get("ended_by_reason"), "output_tokens": last.get("output_tokens"),
        "sums": {name: last.get(name, {}) for name in ("decode_sums", "prompt_sums")},
        "memory_mib": {"before": base, "during": memory[:-1], "after": memory[-1]},
    }  # fmt: skip


async def _clients_for(port: int, seconds: float, count: int, tally: Tally, seed: int) -> None:
    until = asyncio.get_running_loop().time() + seconds
    await asyncio.gather(*(client(port, until, seed + n, tally) for n in range(count)))


async def _watch(told: dict[str, Any], memory: list[dict[str, float]], until: float) -> None:
    loop = asyncio.get_running_loop()
    began, every = loop.time(), max(1.0, (until - loop.time()) / 30)
    while loop.time() < until:
        stats: dict[str, Any] = {}
        with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(10):
                stats = await asked(told["port"], "/bench/stats")
        if stats:
            memory.append(_sample(told, stats, loop.time() - began))
        await asyncio.sleep(every)


def _sample(told: dict[str, Any], stats: dict[str, Any], at: float) -> dict[str, float]:
    """Resident memory; the engine's without the copies of state it keeps, whose bound is an option."""
    engine = _rss_mib(told["engine"]) - stats.get("snapshot_bytes", 0) / 2**20
    return {"at_s": round(at, 1), "server": round(_rss_mib(told["pid"]), 1), "engine": round(engine, 1)}


async def _settled(port: int, *, weighs: bool) -> dict[str, Any]:
    """The engine's numbers when nothing runs any more, or after a while."""
    loop = asyncio.get_running_loop()
    until, names = loop.time() + SETTLE_S, ("running", "waiting", "inside", "exchanges")
    stats = await asked(port, "/bench/stats")
    while any(stats[name] for name in names) and loop.time() < until:
        await asyncio.sleep(0.1)
        stats = await asked(port, "/bench/stats")
    if weighs:
        await asyncio.sleep(2 * REST_S)  # what was freed is given back by then
    return stats


def _held(stats: dict[str, Any]) -> list[str]:
    """What is held though nobody is there."""
    found = [
        f"{stats[name]} {name} after the end" for name in ("running", "waiting", "inside", "exchanges") if stats[name]
    ]
    if stats["free_slots"] != stats["num_slots"]:
        found.append(f"{stats['num_slots'] - stats['free_slots']} slots are not free")
    for ratio, pages in stats["num_pages"].items():
        used, kept = pages - stats["free_pages"][ratio], stats["tree_pages"].get(ratio, 0)
        if used != kept:
            found.append(f"{used} pages of {ratio} tokens a row are in use and {kept} are of kept prefixes")
    return found


def _grown(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Memory that did not come back."""
    return [
        f"the {name} has {after[name]:.0f} MiB and had {before[name]:.0f} MiB before"
        for name in ("server", "engine")
        if after[name] > before[name] * (1 + GROWN_SHARE) + GROWN_MIB
    ]


def _rss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS:"))


async def overhead(model: str = MODEL, at_once: int = AT_ONCE, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds to the first token, directly and over HTTP, in turns: of so many clients, and of one."""
    tokenizer = Tokenizer.from_dir(open_checkpoint(model).path)
    settings: dict[str, Any] = {**CACHE, "max_sequences": at_once}
    driver = await asyncio.to_thread(EngineProcess, "pyrosome.engine.loaded:open_engine", {"path": model, **settings})
    engine = AsyncEngine(driver)
    found: dict[str, list[float]] = {"direct": [], "http": [], "direct_alone": [], "http_alone": []}
    try:
        async with server(model=model, **settings) as told:
            callers = [Caller(told["port"]) for _ in range(at_once)]

            async def direct(client: int, prompt: list[int]) -> float:
                return await _direct_s(engine, prompt)

            async def http(client: int, prompt: list[int]) -> float:
                return await callers[client].first_byte_s(COMPLETIONS, _body(prompt))

            for n in range(-1, rounds):
                for suffix, count in (("", at_once), ("_alone", 1)):
                    for name, ask in (("direct", direct), ("http", http)):
                        took = await _clients(tokenizer, count, n, ask)
                        found[f"{name}{suffix}"] += took if n >= 0 else []  # the first round warms up
            for caller in callers:
                caller.close()
    finally:
        await engine.close()
    medians = {name: statistics.median(seconds) * 1000 for name, seconds in found.items()}
    return {
        "at_once": at_once, "rounds": rounds, "model": model, "pause_s": PAUSE_S, "requests": len(found["http"]),
        "median_ms": medians, "added_ms": medians["http"] - medians["direct"],
        "ratio": medians["http"] / medians["direct"], "added_alone_ms": medians["http_alone"] - medians["direct_alone"],
    }  # fmt: skip


async def _clients(
    tokenizer: Tokenizer, count: int, seed: int, ask: Callable[[int, list[int]], Awaitable[float]]
) -> list[float]:
    """What clients saw that ask, wait, and ask again, each at its own times; both sides get the same of them."""

    async def one(client: int) -> list[float]:
        rng, took = random.Random(f"{seed} {client} {count}"), []
        for _ in range(ASKED if count > 1 else ASKED * 8):
            await asyncio.sleep(rng.expovariate(1 / PAUSE_S) if count > 1 else 0.02)
            prompt = [0, *tokenizer.encode(" ".join(rng.choice(WORDS) for _ in range(48)))]
            took.append(await ask(client, prompt))
        return took

    return [s for each in await asyncio.gather(*map(one, range(count))) for s in each]


def _body(ids: list[int]) -> dict[str, Any]:
    return {"prompt": ids, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}


async def _direct_s(engine: AsyncEngine, ids: list[int]) -> float:
    loop = asyncio.get_running_loop()
    began, first = loop.time(), 0.0
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    async for event in engine.submit(Request(uuid.uuid4().hex, tuple(ids), params)):
        if isinstance(event, TokenEvent):
            first = first or loop.time() - began
    return first


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--no-overhead", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.jsonl")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    record: dict[str, Any] = {**records.machine(), "bench": "serve"}
    record["load_test"] = asyncio.run(load(args.seconds, args.clients, args.model))
    if not args.no_overhead:
        record["overhead"] = asyncio.run(overhead(args.model))
    print(json.dumps(record, indent=1))
    stats = Stats(**record["load_test"]["sums"])
    print("\n".join(told_after(stats, Model.open(args.model), "fp8")))
    if not args.no_save:
        records.append(args.out, record)
    return 1 if record["load_test"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
