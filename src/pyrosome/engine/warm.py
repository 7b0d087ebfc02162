"""Steps that nobody asked for, run before any request: on a GPU, kernels are compiled when they are first launched."""

from __future__ import annotations

import logging
import time

from pyrosome.engine.runner import Runner
from pyrosome.errors import DoesNotFit

log = logging.getLogger(__name__)


def warm_up(runner: Runner, step_tokens: int) -> float:
    """Run a step of every size that kernels tell apart, and one of many sequences; the seconds it took.

    Kernels are chosen by powers of two of a step's tokens.  The cache holds nothing afterwards that it did not before.
    """
    began = time.perf_counter()
    most = max(1, min(step_tokens, runner.pool.max_context))
    for size in dict.fromkeys([*(1 << i for i in range(most.bit_length())), most]):
        if not _run(runner, [size]):
            break
    _run(runner, [1] * min(runner.pool.num_free_slots, step_tokens))
    seconds = time.perf_counter() - began
    log.info("kernels for steps of up to %d tokens are ready after %.1f s", most, seconds)
    return seconds


def _run(runner: Runner, lengths: list[int]) -> bool:
    """One step of new sequences of these lengths; False where the cache has no room for it."""
    sequences = [runner.open() for _ in lengths]
    try:
        if runner.has_drafts and len(sequences) == 1:
            runner.step_with_drafts(sequences[0], [0] * lengths[0])
        else:
            runner.step([(s, [0] * n) for s, n in zip(sequences, lengths, strict=True)])
    except DoesNotFit:
        return False
    finally:
        for sequence in sequences:
            runner.close(sequence)
    return True
