"""Our side of `bench.engine`: so many requests at once through the engine, greedy, drafts off unless asked for."""

from __future__ import annotations

import json
import sys
import time

import measure
import torch

import pyrosome
from pyrosome.engine.engine import Engine
from pyrosome.engine.request import Ended, Request, TokenEvent
from pyrosome.options import EngineOptions, SamplingParams


def main(
    checkpoint: str, answer: str, counts: list[int], length: int, num_tokens: int, repeats: int, drafter: str
) -> None:
    """For each count, seconds of CPU time per repeat; repeats go round all counts, so that drift is fair to each."""
    torch.set_num_threads(1)
    most = max(counts)
    options = EngineOptions(max_sequences=most, cache_bytes=2 << 30, drafter=drafter, snapshot_bytes=0)
    model = pyrosome.load_model(checkpoint, numerics="exact")  # as the other side computes: for what is said
    ids = [t % model.config.vocab_size for t in measure.prompt(most * length)]
    tokens = run(model.engine(options), ids, most, length, num_tokens, "exact")
    model = pyrosome.load_model(checkpoint, numerics="trained")  # as `LLM` runs: for how fast
    engine = model.engine(options)
    run(engine, ids, 1, length, 2, "warm")
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for at in range(repeats):
        for count in counts:
            began = time.process_time()
            run(engine, ids, count, length, num_tokens, f"{at} {count}")
            seconds[count].append(time.process_time() - began)
    stats = engine.current_stats()
    out = {"seconds": seconds, "tokens": tokens, "accepted": stats.accepted, "drafted": stats.drafted}
    measure.answer(answer, {**out, "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__})


def run(engine: Engine, ids: list[int], count: int, length: int, num_tokens: int, salt: str) -> list[list[int]]:
    """The tokens of `count` requests that arrive together; the salt is new each time, so nothing is known of them.

    Raises:
        SystemExit: one of them failed.
    """
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    for i in range(count):
        engine.add(Request(f"{salt} {i}", tuple(ids[i * length : (i + 1) * length]), params, salt=salt))
    said: dict[str, list[int]] = {f"{salt} {i}": [] for i in range(count)}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                said[event.request].append(event.token)
            elif isinstance(event, Ended) and event.reason == "error":
                raise SystemExit(event.error)
    return list(said.values())


if __name__ == "__main__":
    main(*sys.argv[1:3], *(json.loads(a) for a in sys.argv[3:]))
