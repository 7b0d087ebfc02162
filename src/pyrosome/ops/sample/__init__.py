"""Choosing a token from logits: the definition every faster sampler must agree with.

A request's choice depends on its own logits, parameters, seed and position, never on what else is in the step.
Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyrosome.errors import EngineError
from pyrosome.options import SamplingParams

_64 = (1 << 64) - 1


def sample(
    logits_V: Tensor,
    params: SamplingParams,
    prompt_counts: Mapping[int, int],
    output_counts: Mapping[int, int],
    seed: int,
    position: int,
) -> tuple[int, dict[int, float]]:
    """(token, log-probabilities): one choice, and what was asked to be reported of it.

    Log-probabilities are of the model's own distribution, before penalties, temperature and filters.

    Raises:
        EngineError: the logits hold NaN, or nothing finite.
    """
    best = logits_V.max()
    if not torch.isfinite(best):
        raise EngineError(f"the logits at position {position} hold {best.item()}; this sequence cannot go on")
    adjusted_V = adjust_logits(logits_V, params, prompt_counts, output_counts)
    if params.temperature == 0:
        token = first_argmax(adjusted_V)
    else:
        token = draw(distribution(adjusted_V, params), uniform(seed, position))
    return token, {} if params.logprobs is None else _logprobs(logits_V, token, params.logprobs)


def adjust_logits(
    logits_V: Tensor, params: SamplingParams, prompt_counts: Mapping[int, int], output_counts: Mapping[int, int]
) -> Tensor:
    """Logits with penalties applied, float32 [V].

    Repetition (on prompt and output): positive logits are divided, negative ones multiplied.  Presence and
    frequency (on the output alone): subtracted once, and once per occurrence.
    """
    logits_V = logits_V.float()
    if params.repetition_penalty != 1.0 and (seen := sorted({*prompt_counts, *output_counts})):
        at = torch.tensor(seen, device=logits_V.device)
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
    """The most probable token; of equals, the lowest id."""
    return int((logits_V == logits_V.max()).to(torch.uint8).argmax())


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities to sample from, float64 [V]: temperature, then top-k, top-p and min-p, renormalised.

    Ties at the edge of top-k and top-p go to the lowest id.  At least one token always remains.
    """
    logits_V = logits_V.double()
    probs_V = ((logits_V - logits_V.max()) / params.temperature).softmax(-1)  # shifted: a tiny temperature overflows
    keep_V = torch.ones_like(probs_V, dtype=torch.bool)
    if 0 < params.top_k < probs_V.numel() or params.top_p < 1:
        ordered_V, order_V = probs_V.sort(descending=True, stable=True)
        kept = torch.ones_like(keep_V)
        if 0 < params.top_k < probs_V.numel():
            kept[params.top_k :] = False
        if params.top_p < 1:
            within = ordered_V * kept
            # A token stays while those before it hold less than top_p of what top-k left.
            kept &= within.cumsum(0) - within < params.top_p * within.sum()
            kept[0] = True
        keep_V = torch.zeros_like(keep_V).scatter(0, order_V, kept)
    if params.min_p > 0:
        keep_V &= probs_V >= params.min_p * probs_V.max()
    probs_V = probs_V * keep_V
    return probs_V / probs_V.sum()


def draw(probs_V: Tensor, u: float) -> int:
    """The token whose slice of the cumulative distribution, in id order, holds u in [0, 1)."""
    edges_V = probs_V.cumsum(0)
    token = int(torch.searchsorted(edges_V, u * float(edges_V[-1]), right=True))
    # Rounding of the last edges may point past the last token with any probability.
    return token if token < probs_V.numel() and probs_V[token] > 0 else int(probs_V.nonzero()[-1])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone, the same on every machine.

    Counter-based (two rounds of the splitmix64 finaliser), so that a request resumed anywhere goes on as it would have.
    """
    return (_mix(_mix(seed & _64) ^ (position * 0x9E3779B97F4A7C15 & _64)) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)


def _logprobs(logits_V: Tensor, token: int, num_top: int) -> dict[int, float]:
    log_V = logits_V.float().log_softmax(-1)
    reported = [token, *log_V.sort(descending=True, stable=True).indices[:num_top].tolist()]
    return {t: float(log_V[t]) for t in reported}
