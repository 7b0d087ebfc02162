"""What is told of a prompt while it is computed: how far it is, and how probable the model found its tokens."""

from __future__ import annotations

import torch

from pyrosome.engine.request import Progress, PromptLogprobs
from pyrosome.engine.runner import Forward, Runner
from pyrosome.engine.track import Completion, Span
from pyrosome.ops.sample import logprobs, not_finite

HEAD_ROWS = 256  # rows of logits at once: those of a long prompt together would take more memory than its cache


def progress(c: Completion) -> list[Progress]:
    """How far a prompt is, if its request wants to know and it is on its way."""
    if not c.request.progress or c.index or c.output_tokens or not 0 < c.length < c.prompt_length:
        return []
    return [Progress(c.request.id, c.length, c.prompt_length)]


def prompt_logprobs(runner: Runner, forward: Forward, first: int, span: Span) -> list[PromptLogprobs]:
    """Log probabilities of the prompt's positions that a span's tokens stand before, but for those told already.

    Args:
        first: which token of the forward's step the span begins with.

    Raises:
        EngineError: logits that are no numbers.
    """
    c = span.completion
    if c.most_reused is None:
        return []
    assert span.start <= c.most_reused, "a position was passed over"
    start, stop = c.next_told, min(span.start + len(span.ids) + 1, c.prompt_length)
    told: list[dict[int, float]] = []
    for low in range(start, stop, HEAD_ROWS):
        high = min(low + HEAD_ROWS, stop)
        before = first + low - 1 - span.start
        logits_NV = runner.logits(forward, before, before + high - low)
        best_N = logits_NV.amax(-1)
        if not torch.isfinite(best_N).all():
            at = int((~torch.isfinite(best_N)).nonzero()[0])
            raise not_finite(low + at, best_N[at].item())
        told += logprobs(logits_NV, c.track.ids[low:high], c.request.params.prompt_logprobs or 0)
    c.next_told = max(start, stop)
    return [PromptLogprobs(c.request.id, start, told)] if told else []
