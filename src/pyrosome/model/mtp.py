"""The multi-token-prediction head of the preview checkpoints: one more block that drafts the token after next.

Shape letters: T tokens of the draft step, J residual streams, D model dim, B spans, R ring rows, V vocabulary.
Source: DeepSeek-V4 report, multi-token prediction; official inference code (`mtp.0.*`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.cache.views import FreshLayer, LayerCache
from pyrosome.config import ModelConfig
from pyrosome.model.deepseek_v4 import Block, DeepseekV4, HeadCollapse
from pyrosome.model.layers import Linear, RMSNorm
from pyrosome.model.numerics import Numerics
from pyrosome.model.step import Step
from pyrosome.ops.linear import linears
from pyrosome.ops.rows import UnitedRows


class MTPStage(Block):
    """Reads the trunk's last streams at position t and the id at t + 1; its logits are for position t + 2.

    Embedding, LM head and expert bank are the trunk's; norm, collapse and window cache are its own.
    """

    def __init__(self, config: ModelConfig, stage: int, numerics: Numerics) -> None:
        super().__init__(config, f"mtp.{stage}", 0, False, numerics)
        D = config.hidden_size
        self.e_proj, self.h_proj = Linear(D, D), Linear(D, D)
        self.enorm, self.hnorm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.hc_head = HeadCollapse(config)

    def draft(
        self, trunk: DeepseekV4, step: Step, streams_TJD: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits [T, V], streams [T, J, D]) of a step whose ids are those *after* its positions.

        The streams returned feed a deeper draft, where one is wanted.
        """
        streams_TJD = self.streams(trunk, step, streams_TJD, cache)
        return self.logits(trunk, streams_TJD), streams_TJD

    def streams(self, trunk: DeepseekV4, step: Step, streams_TJD: Tensor, cache: LayerCache | None = None) -> Tensor:
        """The stage's own streams [T, J, D]."""
        embedded_TD = self.enorm(trunk.embed_ids(step.ids_T))
        streams_TJD = self.e_proj(embedded_TD)[:, None] + self.h_proj(self.hnorm(streams_TJD))
        turns = trunk.rotary(step, {0})[0]
        return self(streams_TJD, step, turns, cache or FreshLayer(step), trunk.bank, [])  # type: ignore[no-any-return]

    def logits(self, trunk: DeepseekV4, streams_NJD: Tensor) -> Tensor:
        """Logits [N, V] of the stage's streams, by the trunk's head."""
        (logits_NV,) = linears(
            self.hc_head(streams_NJD), [(trunk.head.value, trunk.head.prepare)], self.norm.weight, self.norm.eps
        )
        return logits_NV  # type: ignore[no-any-return]


def streams_at(step: Step, trunk_step: Step, streams_TJD: Tensor, ring_BRX: Tensor) -> Tensor:
    """The trunk's streams at the positions of a draft step over the same spans.

    A draft step trails the trunk by one position, since it needs the next id: so its first position may be
    the last of the step before, whose streams `ring_BRX` [B, R, J D] remembers.
    """
    R = ring_BRX.shape[1]
    united = UnitedRows(ring_BRX, streams_TJD.flatten(1))
    first_B = torch.tensor([first for first, _ in trunk_step.layout], device=step.device)
    ahead_T = step.position_T - trunk_step.start_B[step.span_T]
    fresh_T = 1 + len(trunk_step.layout) * R + first_B[step.span_T] + ahead_T
    ring_T = 1 + step.span_T * R + step.position_T.clamp(min=0) % R
    index_T = torch.where(ahead_T >= 0, fresh_T, ring_T).masked_fill(step.position_T < 0, 0)
    return united.rows_NC[index_T].unflatten(1, streams_TJD.shape[1:])


def keep_streams(trunk_step: Step, streams_TJD: Tensor, ring_SRX: Tensor) -> None:
    """Remember the trunk's last streams of each sequence for the draft step to come."""
    ring_SRX[trunk_step.ring_place(ring_SRX.shape[1])] = streams_TJD.flatten(1)
