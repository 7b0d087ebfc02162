"""Choosing a token from logits: the definition every faster sampler must agree with.

A request's choice depends on its own logits, parameters, seed and position, never on what else is in the step, nor on
whether it was drafted (ADR 0006).  Shape letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pyrosome.errors import EngineError
from pyrosome.ops.sample.noise import uniforms
from pyrosome.options import SamplingParams

_PIECE = 1 << 14  # ids that race at a time: what they need stays in the processor's cache


def sample(
    logits_V: Tensor,
    params: SamplingParams,
    prompt_counts: Mapping[int, int],
    output_counts: Mapping[int, int],
    seed: int,
    position: int,
    mask_V: Tensor | None = None,
) -> tuple[int, dict[int, float]]:
    """(token, log-probabilities): one choice, and what was asked to be reported of it.

    Args:
        mask_V: bool, the ids allowed, on any device; applied after penalties, before temperature and filters.

    Log-probabilities are of the model's own distribution, before penalties, mask, temperature and filters.

    Raises:
        EngineError: the logits hold NaN, or nothing finite; or penalties and mask leave nothing finite.
    """
    best = logits_V.max()
    if not torch.isfinite(best):
        raise not_finite(position, best.item())
    adjusted_V = adjust_logits(logits_V, params, prompt_counts, output_counts)
    if mask_V is not None:
        mask_V = mask_V.to(logits_V.device)
        adjusted_V = adjusted_V.masked_fill(~mask_V, float("-inf"))
    if not torch.isfinite(left := adjusted_V.max()):
        allowed = "all" if mask_V is None else f"{int(mask_V.sum())} of {mask_V.numel()}"
        raise EngineError(
            f"with penalties and {allowed} ids allowed, the greatest logit at position {position} is {left.item()}; "
            "this sequence cannot go on"
        )
    if params.temperature == 0:
        token = first_argmax(adjusted_V)
    else:
        token = race(distribution(adjusted_V, params), seed, position)
    return token, {} if params.logprobs is None else logprobs(logits_V[None], [token], params.logprobs)[0]


def logprobs(logits_NV: Tensor, tokens: Sequence[int], num_top: int) -> list[dict[int, float]]:
    """For each row the log-probability of its token, then the `num_top` greatest ones, of equals the lowest id first.

    Computed in float32, each row by itself: a row's values do not depend on the others.
    """
    log_NV = logits_NV.float().log_softmax(-1)
    own_N = log_NV.gather(1, torch.tensor(tokens, device=log_NV.device)[:, None])[:, 0]
    found = [{token: value} for token, value in zip(tokens, own_N.tolist(), strict=True)]
    if num_top:
        num_top = min(num_top, log_NV.shape[1])
        row, at = (log_NV >= log_NV.topk(num_top).values[:, -1:]).nonzero(as_tuple=True)
        value = log_NV[row, at]
        order = value.sort(descending=True, stable=True).indices
        counts = [0] * len(found)
        for r, token, v in zip(row[order].tolist(), at[order].tolist(), value[order].tolist(), strict=True):
            if counts[r] < num_top:
                found[r][token], counts[r] = v, counts[r] + 1
    return found


def not_finite(position: int, best: float) -> EngineError:
    """What ends a sequence whose greatest logit is no finite number."""
    return EngineError(f"the logits at position {position} hold {best}; this sequence cannot go on")


def adjust_logits(
    logits_V: Tensor, params: SamplingParams, prompt_counts: Mapping[int, int], output_counts: Mapping[int, int]
) -> Tensor:
    """Logits with penalties applied, float32 [V].

    Repetition (on prompt and output): positive logits are divided, negative ones multiplied.  Presence and
    frequency (on the output alone): subtracted once, and once per occurrence.
    """
    logits_V = logits_V.float()
    if params.repetition_penalty != 1.0 and (seen := {*prompt_counts, *output_counts}):
        at = torch.tensor(list(seen), device=logits_V.device)
        held = logits_V[at]
        held = torch.where(held > 0, held / params.repetition_penalty, held * params.repetition_penalty)
        logits_V = logits_V.index_copy(0, at, held)
    if (params.presence_penalty or params.frequency_penalty) and output_counts:
        at = torch.tensor(list(output_counts), device=logits_V.device)
        counts = torch.tensor(list(output_counts.values()), dtype=torch.float32, device=logits_V.device)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        logits_V = logits_V.index_add(0, at, -penalty)
    return logits_V


def first_argmax(logits_V: Tensor) -> int:
    """The most probable token; of equals, the lowest id, as torch promises."""
    return int(logits_V.argmax())


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities to sample from, float64 [V]: temperature, then top-k, top-p and min-p, renormalised.

    Ties at the edge of top-k and top-p go to the lowest id.  At least one token always remains.

    Raises:
        EngineError: the greatest logit is no finite number.
    """
    scaled_V = logits_V.to(torch.float64, copy=True)
    greatest = float(scaled_V.max())
    if not math.isfinite(greatest):
        raise EngineError(f"the logits hold {greatest}: there are no probabilities to draw from")
    scaled_V.sub_(greatest).div_(params.temperature)  # shifted first: a tiny temperature overflows
    probs_V = scaled_V.softmax(-1)
    if not 0 < params.top_k < probs_V.numel() and params.top_p == 1 and params.min_p == 0:
        return probs_V
    at = _survivors(probs_V, params)
    held = probs_V[at]
    # A running sum adds in one order whatever the number of threads; torch's `sum` does not.
    return torch.zeros_like(probs_V).index_copy(0, at, held / held.cumsum(0)[-1])


def _survivors(probs_V: Tensor, params: SamplingParams) -> Tensor:
    """The ids that top-k, top-p and min-p leave.

    Only ids that may be among them are put in order: to order a vocabulary takes longer than all the rest.
    """
    greatest = float(probs_V.max())
    total = 1.0
    if 0 < params.top_k < probs_V.numel():
        at = _ordered(probs_V, float(probs_V.topk(params.top_k).values[-1]))[: params.top_k]
        edges = probs_V[at].cumsum(0)
        total = float(edges[-1])
    elif params.top_p < 1:
        for share in (2.0**-10, 2.0**-20, 2.0**-30, 0.0):
            at = _ordered(probs_V, share * greatest)
            edges = probs_V[at].cumsum(0)
            if edges[-1] >= params.top_p:
                break
    else:
        return (probs_V >= params.min_p * greatest).nonzero()[:, 0]
    if params.top_p < 1:
        # A token stays while those before it hold less than top_p of what top-k left.
        at = at[: 1 + int((edges[:-1] < params.top_p * total).sum())]
    return at[probs_V[at] >= params.min_p * greatest]


def _ordered(values_V: Tensor, least: float) -> Tensor:
    """Ids of at least this value, the greatest first, of equals the lowest id."""
    at = (values_V >= least).nonzero()[:, 0]
    return at[values_V[at].sort(descending=True, stable=True).indices]


def race(probs_V: Tensor, seed: int, position: int) -> int:
    """The winner of an exponential race: the id of the least e / p, with e = -log(1 - u), u the noise of the id.

    A draw from `probs_V`.  As u depends on (seed, position, id) alone, two distributions that are alike mostly have
    the same winner: with probability at least (1 - TV) / (1 + TV) (Daliri, Musco, Suresh 2024).

    Promised: one build on one machine, whatever the threads, always names the same id; of equals the lowest.
    Elsewhere exp and log may have other last bits, which matters where two ids are within 1e-15 of each other.
    """
    probs = probs_V.cpu().numpy()
    winner, record = int(probs.argmax()), math.inf
    for start in range(0, probs.size, _PIECE):
        piece = probs[start : start + _PIECE]
        at = np.flatnonzero(piece)
        if not at.size:
            continue
        p, u = piece[at], uniforms(seed, position, at + start)
        with np.errstate(over="ignore"):
            bound = u / p  # e is more than u: only ids whose bound is below some id's time can win
        record_here = _time(u, p, bound.argmin())
        for i in np.flatnonzero(bound <= min(record, record_here)):
            if (time := _time(u, p, i)) < record:
                winner, record = int(at[i]) + start, time
    return winner


def _time(u: np.ndarray, p: np.ndarray, i: np.intp) -> float:
    return -math.log1p(-float(u[i])) / float(p[i])
