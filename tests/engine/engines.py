"""Engines on tiny networks, and what comes out of them."""

from __future__ import annotations

import dataclasses

from pyrosome.cache.streams import cache_tokens_in
from pyrosome.engine import drafting
from pyrosome.engine.engine import Engine
from pyrosome.engine.loaded import open_engine
from pyrosome.engine.request import Ended, News, Request, TokenEvent
from pyrosome.engine.speculate import Depth
from pyrosome.options import EngineOptions, SamplingParams
from pyrosome.testing.shapes import tiny
from tests.networks import network, tokens

CONFIG = tiny((0, 4, 128))
IDS = tokens(3000)


def engine_of(net=None, kv_format: str = "f32", **options) -> Engine:
    """An engine whose cache starts out poisoned; without drafts unless they are asked for."""
    engine = Engine(
        net or network(CONFIG), kv_format, EngineOptions(**{"drafter": "off", "cache_bytes": 8 << 20, **options})
    )
    engine.runner.pool.poison()
    return engine


class Eager(Depth):
    """Drafts as many as it may, whatever became of them."""

    def choose(self) -> int:
        return self.most


def open_eagerly(**arguments) -> Engine:
    """`open_engine` in a process of its own, where how long steps take decides nothing."""
    drafting.Depth = Eager
    return open_engine(**arguments)


def bytes_for(config, tokens: int, max_sequences: int, kv_format: str = "f32") -> int:
    """The least `cache_bytes` whose cache holds so many tokens."""
    low, high = 0, 1 << 32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if cache_tokens_in(config, kv_format, middle, max_sequences) >= tokens else (middle, high)
        )
    return high


def watched(engine: Engine) -> list[list[tuple[int, int]]]:
    """Fills as the engine steps: per step, (length before, tokens) of each span."""
    steps, forward = [], engine.runner.forward

    def watch(spans, rows, **kwargs):
        steps.append([(s.length, len(ids)) for s, ids in spans])
        return forward(spans, rows, **kwargs)

    engine.runner.forward = watch
    return steps


@dataclasses.dataclass
class Said:
    """What one completion said."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    end: Ended | None = None

    @property
    def answer(self):
        """All that must not depend on anything else."""
        return self.tokens, self.logprobs, self.end.reason if self.end else None


def take(events, into: dict[tuple[str, int], Said]) -> dict[tuple[str, int], Said]:
    for e in events:
        if isinstance(e, News):
            continue
        said = into.setdefault((e.request, e.index), Said())
        assert said.end is None, "nothing follows the end"
        if isinstance(e, TokenEvent):
            said.tokens.append(e.token)
            said.logprobs.append(e.logprobs)
        else:
            said.end = e
    return into


def drain(engine: Engine, most: int = 5000) -> dict[tuple[str, int], Said]:
    """Step until nothing is left to do."""
    out: dict[tuple[str, int], Said] = {}
    for _ in range(most):
        if not engine.has_work:
            return out
        take(engine.step(), out)
    raise AssertionError(f"{most} steps and no end")


def run(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], Said]:
    for r in requests:
        engine.add(r)
    return drain(engine)


def is_empty(engine: Engine) -> bool:
    """Whether nobody but the prefix tree holds anything, and it no more than it knows of."""
    pool = engine.runner.pool
    engine.tree.forget()
    return pool.num_free_slots == pool.plan.num_slots - 1 and all(
        pool.num_free_pages(r) == n - 1 for r, n in pool.plan.num_pages.items()
    )


def request(name: str, length: int, max_tokens: int = 8, start: int = 0, **changes) -> Request:
    about = {k: changes.pop(k) for k in list(changes) if k in {f.name for f in dataclasses.fields(Request)}}
    params = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **changes}
    return Request(name, tuple(IDS[start : start + length]), SamplingParams(**params), **about)
