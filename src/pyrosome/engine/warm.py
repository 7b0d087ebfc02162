"""Steps that nobody asked for, run before any request: on a GPU, kernels are compiled when they are first launched."""

from __future__ import annotations

import itertools
import logging
import time

import torch

from pyrosome.engine.runner import Runner
from pyrosome.engine.sampler import Row, SamplerState, choose_all
from pyrosome.errors import ContextTooLong, DoesNotFit
from pyrosome.options import SamplingParams

log = logging.getLogger(__name__)
FEW = 64  # tokens at the end of a long context, beside one


def warm_up(runner: Runner, step_tokens: int) -> float:
    """Run steps of all sizes and contexts that kernels tell apart, one of many sequences, and draw tokens in every way.

    Kernels are chosen by powers of two of a step's tokens, and of its context.  The cache holds nothing afterwards that
    it did not before.

    Returns: the seconds it took.
    """
    began = time.perf_counter()
    longest = runner.pool.max_context
    most = max(1, min(step_tokens, longest))
    for size in dict.fromkeys([*(1 << i for i in range(most.bit_length())), most]):
        if not _run(runner, [size]):
            break
    _run(runner, [1] * min(runner.pool.num_free_slots, step_tokens))
    contexts = [*(1 << i for i in range(longest.bit_length()) if 1 << i > most), longest]
    for context, size in itertools.product(dict.fromkeys(contexts), dict.fromkeys([1, min(most, FEW)])):
        if not _run(runner, [size], context - size):
            break
    _draw(runner)
    seconds = time.perf_counter() - began
    log.info("kernels for steps of up to %d tokens are ready after %.1f s", most, seconds)
    return seconds


def _run(runner: Runner, lengths: list[int], start: int = 0) -> bool:
    """One step of new sequences of these lengths; False where the cache has no room for it.

    Args:
        start: where the step begins.  What comes before is whatever the cache's memory holds.
    """
    sequences = [runner.open() for _ in lengths]
    for sequence in sequences:
        sequence.length = start
    try:
        if runner.has_drafts and len(sequences) == 1:
            runner.step_with_drafts(sequences[0], [0] * lengths[0])
        else:
            runner.step([(s, [0] * n) for s, n in zip(sequences, lengths, strict=True)])
    except (ContextTooLong, DoesNotFit):
        return False
    finally:
        for sequence in sequences:
            runner.close(sequence)
    return True


def _draw(runner: Runner) -> None:
    """A token of each kind of draw: which filters there are decides about kernels."""
    logits_V = torch.zeros(runner.model.config.vocab_size, device=runner.device)
    ways = [SamplingParams(temperature=0.0)]
    for top_k, top_p, min_p in itertools.product((0, 2), (1.0, 0.5), (0.0, 0.5)):
        ways.append(SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p))
    for params in ways:
        choose_all([Row(logits_V, SamplerState(params, (), 0), None, 0)])
