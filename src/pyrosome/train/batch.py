"""Samples packed into steps: whole sequences from position 0, side by side, that never touch each other."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrosome.model.step import Span, Step
from pyrosome.train.samples import Encoded


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step of training.  All lists are over the step's tokens, span after span."""

    step: Step
    draft_step: Step  # the same spans, each token replaced by the next: what an MTP stage reads
    row: Tensor  # int64 [N]: tokens whose next one counts
    target: Tensor  # int64 [N]: those next ones
    weight: Tensor  # float32 [N]
    is_answer: Tensor  # bool [N]
    draft_row: Tensor  # int64 [M]: tokens of the draft step whose next but one counts
    draft_target: Tensor
    draft_weight: Tensor
    num_spans: int

    @property
    def num_tokens(self) -> int:
        return len(self.step.ids_T)


def pack(samples: Sequence[Encoded], device: torch.device | str = "cpu") -> Batch:
    """Samples side by side as one step."""
    spans = [Span(0, 0, s.ids) for s in samples]
    ahead = [Span(0, 0, [*s.ids[1:], 0]) for s in samples]
    rows, targets, weights, answers = [], [], [], []
    draft_rows, draft_targets, draft_weights = [], [], []
    first = 0
    for s in samples:
        for i in range(1, len(s.ids)):
            if not s.weight[i]:
                continue
            rows.append(first + i - 1)
            targets.append(s.ids[i])
            weights.append(s.weight[i])
            answers.append(s.answer[i])
            if i >= 2:
                draft_rows.append(first + i - 2)
                draft_targets.append(s.ids[i])
                draft_weights.append(s.weight[i])
        first += len(s.ids)

    def whole(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        step=Step.of(spans, device),
        draft_step=Step.of(ahead, device),
        row=whole(rows),
        target=whole(targets),
        weight=torch.tensor(weights, dtype=torch.float32, device=device),
        is_answer=torch.tensor(answers, dtype=torch.bool, device=device),
        draft_row=whole(draft_rows),
        draft_target=whole(draft_targets),
        draft_weight=torch.tensor(draft_weights, dtype=torch.float32, device=device),
        num_spans=len(samples),
    )


class Source:
    """Samples by number: sample i of a stage is a function of (seed, stage, i) alone, so a place in it is one number.

    Args:
        make: (mix entry, rng) -> a sample, encoded.
        mix: the sources of the stage; each has a `share` of the tokens, and a `length` (lowest, highest).
    """

    def __init__(
        self, seed: int, stage: str, mix: Sequence[Any], make: Callable[[Any, random.Random], Encoded]
    ) -> None:
        self.seed, self.stage, self.mix, self.make = seed, stage, list(mix), make
        self.shares = [m.share / sum(m.length) for m in mix]  # of samples: short ones come more often

    def sample(self, number: int) -> Encoded:
        """Sample `number` of the stage."""
        rng = random.Random(f"{self.seed}/{self.stage}/{number}")
        return self.make(rng.choices(self.mix, self.shares)[0], rng)

    def batch(self, number: int, max_tokens: int) -> tuple[list[Encoded], int]:
        """(samples from `number` on that fit in `max_tokens`, at least one; the number of the next)."""
        samples: list[Encoded] = []
        total = 0
        while True:
            sample = self.sample(number)
            if samples and total + len(sample.ids) > max_tokens:
                return samples, number
            samples.append(sample)
            total += len(sample.ids)
            number += 1
            if total >= max_tokens:
                return samples, number
