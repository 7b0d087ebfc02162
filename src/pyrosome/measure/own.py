"""A checkpoint's own steps, predicted by the planner and timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from pyrosome.engine.loaded import load_model
from pyrosome.measure.steps import Timed, clock
from pyrosome.plan.hardware import machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.speed import coefficients_for, step_time
from pyrosome.plan.work import Load

ROUNDS, MOST_SECONDS = 5, 60.0
DECODING, PROMPTS = (1024, 16384), (128, 512)  # contexts; tokens


def own_steps(path: str, threads: int, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Rates of a checkpoint in tokens per second: [{"what", "at", "predicted", "measured"}], "what" naming the kind.

    Raises:
        CheckpointError: the files are not what they claim to be.
    """
    planned, here = Model.open(path), machine("here")
    loaded = load_model(path, numerics="trained")  # what plans are of
    room = planned.config.max_position_embeddings
    loads = [Load(1, 1, n, loaded.kv_format) for n in DECODING if n + 512 <= room]
    loads += [Load(1, n, 0, loaded.kv_format) for n in PROMPTS if n <= room]
    timed = Timed(loaded.network, loads, clock(threads), loaded.kv_format)
    before, until = torch.get_num_threads(), time.monotonic() + MOST_SECONDS
    torch.set_num_threads(threads)
    try:
        for done in range(ROUNDS):
            for at in range(len(loads)):
                timed.take(at)
            if done and time.monotonic() > until:
                break
    finally:
        torch.set_num_threads(before)
    say(f"{planned.name}: {len(loads)} steps were timed {done + 1} times each")
    coefficients, one = coefficients_for(here), Layout.of("tp", 1)
    trunk = dataclasses.replace(planned, num_stages=0)  # what is timed drafts nothing
    return [
        {
            "what": "decode tok/s" if load.tokens == 1 else "prefill tok/s",
            "at": f" at {load.context:,}" if load.tokens == 1 else f" of {load.tokens:,}",
            "predicted": load.tokens / step_time(trunk, here, one, Placement(), load, coefficients).seconds,
            "measured": load.tokens / seconds,
        }
        for load, seconds in zip(loads, timed.medians(), strict=True)
    ]
