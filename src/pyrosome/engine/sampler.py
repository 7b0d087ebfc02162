"""Choosing tokens for many completions at once, each by its own logits, parameters, seed and position alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrosome.ops.sample import adjust_logits, distribution, first_argmax, not_finite, race, sample
from pyrosome.ops.sample.batch import choose_tokens
from pyrosome.ops.sample.noise import seed_of
from pyrosome.options import SamplingParams

LONGEST_PASSAGE = 64  # tokens of a passage whose repetition is noticed
LEAST_REPEATED = 16  # tokens that its repetitions have together, or "..." would end an answer


class Choice(NamedTuple):
    """A token, and what was asked to be reported of it."""

    token: int
    logprobs: dict[int, float]


class SamplerState:
    """What the choice of one completion's tokens depends on besides logits.

    Args:
        seed: the request's; completion `index` derives its own from it, the first takes it as it is.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], seed: int, index: int = 0) -> None:
        self.params, self.seed = params, seed_of(seed, index)
        # Penalties alone count tokens: a prompt of a million ids is not counted for nothing.
        self.prompt_counts = Counter(prompt) if params.repetition_penalty != 1.0 else Counter[int]()
        self.output_counts: Counter[int] = Counter()
        self._counts = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._tail: deque[int] = deque(maxlen=LONGEST_PASSAGE)  # the output's end, its last token first
        self._runs = [0] * LONGEST_PASSAGE  # at i: how many last tokens equal the one i + 1 before them
        self.is_repeating = False  # whether the output ends in one passage, `max_repeats` times over

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the best logit is the answer, and nothing else is asked."""
        return self.params.temperature == 0 and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether logits, parameters and noise decide alone, and nothing is to be reported."""
        return not self._counts and self.params.logprobs is None

    def accept(self, token: int) -> None:
        """Take a token that became part of the output."""
        if self._counts:
            self.output_counts[token] += 1
        if self.params.max_repeats is not None:
            self.is_repeating = self._repeats(token, self.params.max_repeats)
            self._tail.appendleft(token)

    def _repeats(self, token: int, times: int) -> bool:
        found = False
        for i, before in enumerate(self._tail):
            if token != before:
                self._runs[i] = 0
                continue
            self._runs[i] += 1
            # A passage of i + 1 tokens stands once, and its repetitions are the run.
            found |= self._runs[i] >= max((times - 1) * (i + 1), LEAST_REPEATED - (i + 1))
        return found


class Row(NamedTuple):
    """One choice to be made."""

    logits_V: Tensor
    state: SamplerState
    mask_V: Tensor | None  # bool, the ids allowed
    position: int  # of the token that is chosen


@torch.inference_mode()  # a kernel without gradients is passed over while they are on
def choose_all(rows: Sequence[Row]) -> list[Choice | Exception]:
    """One choice per row.  What goes wrong with a row is its value: the others are chosen as if it were not there."""
    chosen: dict[int, Choice | Exception] = {}
    if rows and _has_kernel(rows[0].logits_V):
        chosen.update(_choose_on_device(rows))
    plain = [i for i, r in enumerate(rows) if i not in chosen and r.mask_V is None and r.state.is_plain_greedy]
    chosen.update(zip(plain, _choose_greedy([rows[i] for i in plain]), strict=True))
    return [chosen[i] if i in chosen else _choose(row) for i, row in enumerate(rows)]


@torch.inference_mode()
def draw_drafts(logits_BV: Tensor, states: Sequence[SamplerState], positions: Sequence[int]) -> list[int]:
    """A drafter's tokens for these positions, drawn with the noise that the target's will be drawn with."""
    tokens = [-1] * len(states)
    if (plain := [i for i, s in enumerate(states) if s.is_plain]) and _has_kernel(logits_BV):
        found = _tokens(logits_BV[plain], [states[i] for i in plain], [positions[i] for i in plain])
        for i, token in zip(plain, found, strict=True):
            tokens[i] = token
    rows = zip(tokens, logits_BV, states, positions, strict=True)
    return [token if token >= 0 else _draw_draft(*row) for token, *row in rows]


def _draw_draft(logits_V: Tensor, state: SamplerState, position: int) -> int:
    params = state.params
    if not state.is_plain_greedy:
        logits_V = adjust_logits(logits_V, params, state.prompt_counts, state.output_counts)
    # A drafter's logits may be anything, and its token then any: it is checked as all are.
    if params.temperature == 0 or not torch.isfinite(logits_V.max()):
        return first_argmax(logits_V)
    return race(distribution(logits_V, params), state.seed, position)


def _choose(row: Row) -> Choice | Exception:
    s = row.state
    try:
        return Choice(
            *sample(row.logits_V, s.params, s.prompt_counts, s.output_counts, s.seed, row.position, row.mask_V)
        )
    except Exception as error:
        return error


def _has_kernel(logits_V: Tensor) -> bool:
    """Whether tokens are chosen where these logits are: on a GPU, by a kernel."""
    if logits_V.device.type == "cpu" and choose_tokens.choice == "auto":
        return False
    return choose_tokens.chosen(logits_V) != "torch"


def _choose_on_device(rows: Sequence[Row]) -> dict[int, Choice | Exception]:
    """Choices of the rows that a kernel chooses for, by one wait for the device; of others nothing is said."""
    at = [i for i, row in enumerate(rows) if row.mask_V is None and row.state.is_plain]
    if not at:
        return {}
    try:
        logits_NV = torch.stack([rows[i].logits_V for i in at])
        tokens = _tokens(logits_NV, [rows[i].state for i in at], [rows[i].position for i in at])
    except Exception:  # rows that do not go together are told apart one by one
        return {}
    # A row that allows no choice is looked at again, for what is wrong with it.
    return {i: Choice(token, {}) for i, token in zip(at, tokens, strict=True) if token >= 0}


def _tokens(logits_NV: Tensor, states: Sequence[SamplerState], positions: Sequence[int]) -> list[int]:
    """`choose_tokens` with what these states ask for, which goes to the device as one tensor."""
    params, V = [s.params for s in states], logits_NV.shape[1]
    if all(p.temperature == 0 for p in params):
        return choose_tokens(logits_NV).tolist()  # type: ignore[no-any-return]
    N = len(states)
    # Rows of an even length: each begins at 16 bytes, and for other addresses kernels would be compiled all over again.
    packed = np.zeros((6, N + N % 2), np.int64)
    asked = packed[:, :N]
    floats = asked[:3].view(np.float64)
    floats[0], floats[1], floats[2] = zip(*((p.temperature, p.top_p, p.min_p) for p in params), strict=True)
    asked[3], asked[4] = [min(p.top_k, V) for p in params], positions
    asked[5] = np.array([s.seed & ((1 << 64) - 1) for s in states], np.uint64).view(np.int64)
    on_device = torch.from_numpy(packed).to(logits_NV.device)[:, :N]
    temperature_N, top_p_N, min_p_N = on_device[:3].view(torch.float64)
    top_k_N, position_N, seed_N = on_device[3:]
    return choose_tokens(  # type: ignore[no-any-return]
        logits_NV,
        temperature_N,
        top_k_N if any(0 < p.top_k < V for p in params) else None,
        top_p_N if any(p.top_p < 1 for p in params) else None,
        min_p_N if any(p.min_p > 0 for p in params) else None,
        seed_N,
        position_N,
    ).tolist()


def _choose_greedy(rows: Sequence[Row]) -> list[Choice | Exception]:
    """The best token of each row, of equals the lowest id, by one call and one wait for the device."""
    if len(rows) < 2:
        return [_choose(row) for row in rows]
    try:
        best_B, tokens_B = torch.stack([row.logits_V for row in rows]).max(-1)
        found = zip(rows, tokens_B.tolist(), best_B.tolist(), torch.isfinite(best_B).tolist(), strict=True)
        return [
            Choice(token, {}) if is_finite else not_finite(row.position, best) for row, token, best, is_finite in found
        ]
    except Exception:  # rows that do not go together are told apart one by one
        return [_choose(row) for row in rows]
