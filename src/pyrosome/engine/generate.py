"""A plain generation loop: many requests share each step, none waits for another.

Prompt parts and single tokens are spans of the same step, under one token budget.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Collection, Iterator

from pyrosome.engine.runner import Runner, Sequence
from pyrosome.errors import RequestError
from pyrosome.ops.sample import sample
from pyrosome.options import SamplingParams


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids to continue, and how."""

    ids: list[int]
    params: SamplingParams


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One token of one request."""

    request: int  # index into the requests given
    token: int
    logprobs: dict[int, float]  # of the raw model distribution: this token's, and the top ones asked for
    finish_reason: str | None  # "stop", "length", or None while it goes on
    is_end_token: bool = False  # an end-of-sequence or stop id: not part of the text


@dataclasses.dataclass(eq=False)
class _Running:
    request: int
    params: SamplingParams
    sequence: Sequence
    pending: list[int]  # ids not yet in the cache
    prompt_counts: Counter[int]
    seed: int
    output: Counter[int] = dataclasses.field(default_factory=Counter)  # how often each token was generated


def generate(
    runner: Runner,
    requests: list[Request],
    *,
    eos_id: int,
    step_tokens: int = 2048,
    stopped: Collection[int] = (),
) -> Iterator[TokenEvent]:
    """Run every request to its end; events of different requests interleave.

    Args:
        step_tokens: tokens computed per step at most; a longer prompt is cut into spans.
        stopped: requests to end before the next step; the caller may add to it while iterating.

    Raises:
        RequestError: `step_tokens` is below 1.
    """
    if step_tokens < 1:
        raise RequestError(f"step_tokens is {step_tokens}; a step computes at least 1 token")
    waiting = deque(enumerate(requests))
    running: list[_Running] = []
    try:
        while waiting or running:
            for r in [r for r in running if r.request in stopped]:
                _finish(runner, running, r)
            while waiting and runner.pool.num_free_slots:
                number, request = waiting.popleft()
                if number not in stopped:
                    running.append(_start(runner, number, request))
            spans = _schedule(running, step_tokens)
            if not spans:
                continue
            # Who was served goes to the end: a budget smaller than the number running starves nobody.
            served = {id(r) for r, _ in spans}
            running.sort(key=lambda r: id(r) in served)
            rows = runner.step([(r.sequence, ids) for r, ids in spans])
            for (r, ids), logits_V in zip(spans, rows, strict=True):
                del r.pending[: len(ids)]
                if r.pending:
                    continue  # the prompt goes on: nothing to sample yet
                event = _sample(r, logits_V, eos_id, runner.pool.max_context)
                if event.finish_reason:
                    _finish(runner, running, r)
                yield event
    finally:
        for r in list(running):
            _finish(runner, running, r)


def _start(runner: Runner, number: int, request: Request) -> _Running:
    # Without a seed a request draws its own: its tokens still do not depend on what else is in a step.
    seed = request.params.seed if request.params.seed is not None else random.getrandbits(63)
    return _Running(number, request.params, runner.open(), list(request.ids), Counter(request.ids), seed)


def _schedule(running: list[_Running], step_tokens: int) -> list[tuple[_Running, list[int]]]:
    """Single tokens first: a long prompt never makes those that are generating wait."""
    spans, left = [], step_tokens
    for r in sorted(running, key=lambda r: len(r.pending)):
        ids = r.pending[:left]
        if ids:
            spans.append((r, ids))
            left -= len(ids)
    return spans


def _sample(r: _Running, logits_V, eos_id: int, max_context: int) -> TokenEvent:  # type: ignore[no-untyped-def]
    position = r.sequence.length
    token, logprobs = sample(logits_V, r.params, r.prompt_counts, r.output, r.seed, position)
    r.output[token] += 1
    r.pending = [token]
    ends = token in r.params.stop_token_ids or (token == eos_id and not r.params.ignore_eos)
    full = r.output.total() >= r.params.max_tokens or position >= max_context
    return TokenEvent(r.request, token, logprobs, "stop" if ends else "length" if full else None, ends)


def _finish(runner: Runner, running: list[_Running], r: _Running) -> None:
    running.remove(r)
    runner.close(r.sequence)
