"""Choosing a token for each of many rows of logits by one call, where they are.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.sample import distribution, first_argmax, race
from pyrosome.ops.seam import Op
from pyrosome.options import SamplingParams


@Op
def choose_tokens(
    logits_NV: Tensor,
    temperature_N: Tensor | None = None,
    top_k_N: Tensor | None = None,
    top_p_N: Tensor | None = None,
    min_p_N: Tensor | None = None,
    seed_N: Tensor | None = None,
    position_N: Tensor | None = None,
) -> Tensor:
    """What `sample` chooses for each row without penalties and mask, int64 [N]; -1 where no choice is allowed.

    That is where the logits hold NaN, or where the greatest one is no finite number.

    Args:
        temperature_N: float64, 0 where the best token is wanted; None where it is by all rows.
        top_k_N, top_p_N, min_p_N: int64, float64, float64; None where no row asks for the filter.
        seed_N, position_N: int64, the bits of a seed; they are needed where a temperature is given.
    """
    absent: list[float] = [0] * len(logits_NV)
    columns = [x if x is None else x.tolist() for x in (temperature_N, top_k_N, top_p_N, min_p_N, seed_N, position_N)]
    defaults = absent, absent, [1.0] * len(logits_NV), absent, absent, absent
    asked = zip(*(d if c is None else c for c, d in zip(columns, defaults, strict=True)), strict=True)
    tokens = [_choose(logits_V, *row) for logits_V, row in zip(logits_NV, asked, strict=True)]
    return torch.tensor(tokens, dtype=torch.int64, device=logits_NV.device)


def _choose(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    if not torch.isfinite(logits_V.max()):
        return -1
    if temperature == 0:
        return first_argmax(logits_V)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return race(distribution(logits_V, params), seed, position)


gpu.kernel(choose_tokens)
