"""What a step of training is judged by.

Shape letters: T tokens in step, N rows judged, K rows chosen by an indexer, E experts, B spans, V vocabulary.
Sources: DeepSeek-V4 report, sections 2 and 4.2.2 (MTP, balance); DeepSeek-V3.2 report (the indexer's target).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.model.build import Network
from pyrosome.model.deepseek_v4 import Choice, Gate
from pyrosome.ops.route import route_scores
from pyrosome.train.batch import Batch


@dataclasses.dataclass
class Losses:
    """Parts of a step's loss, each a mean; `total` is what is differentiated."""

    total: Tensor
    lm: Tensor
    mtp: Tensor
    indexer: Tensor
    balance: Tensor
    hit: Tensor  # bool [N]: the best token is the target
    draft_hit: Tensor  # bool [M]
    load: dict[str, Tensor]  # layer -> tokens of each expert, int64 [E]


def losses(model: Network, batch: Batch, weight: Any, mtp_weight: float) -> Losses:
    """Run a batch and judge it.

    Args:
        weight: the parts' weights, of `recipe.LossRecipe`.
        mtp_weight: that of the MTP loss, which falls during a run.
    """
    with watched_gates(model) as gates:
        trunk = model(batch.step)
        logits_NV = model.logits(trunk.streams[batch.row])
        each_N = F.cross_entropy(logits_NV.float(), batch.target, reduction="none")
        lm = (each_N * batch.weight).sum() / batch.weight.sum().clamp(min=1e-9)
        hit = logits_NV.detach().argmax(-1) == batch.target
        mtp, draft_hit = lm.new_zeros(()), hit[:0]
        if model.mtp and mtp_weight and len(batch.draft_row):
            stage = model.draft_stage
            streams = stage.streams(model, batch.draft_step, trunk.streams)
            drafts_MV = stage.logits(model, streams[batch.draft_row])
            each_M = F.cross_entropy(drafts_MV.float(), batch.draft_target, reduction="none")
            mtp = (each_M * batch.draft_weight).sum() / batch.draft_weight.sum().clamp(min=1e-9)
            draft_hit = drafts_MV.detach().argmax(-1) == batch.draft_target
    indexer = indexer_loss(trunk.scores) if trunk.scores else lm.new_zeros(())
    balance = lm.new_zeros(())
    if weight.balance:
        seen = [balance_loss(g, batch) for g in gates if not g.gate.hashed]
        balance = torch.stack(seen).mean() if seen else balance
    total = lm + mtp_weight * mtp + weight.indexer * indexer + weight.balance * balance
    load = {g.name: g.load() for g in gates if not g.gate.hashed}
    return Losses(total, lm, mtp, indexer, balance, hit, draft_hit, load)


def indexer_loss(choices: Sequence[Choice]) -> Tensor:
    """KL(attention's own mass over the rows chosen || softmax of the indexer's scores), a mean over layers and tokens.

    The target carries no gradient.  Tokens with fewer than two rows have nothing to learn and do not count.
    """
    parts = []
    for choice in choices:
        assert choice.mass is not None  # gradients are on
        real_TK = choice.rows >= 0
        counts_T = real_TK.sum(1) > 1
        if not choice.score.shape[1]:
            continue
        mass_TK = choice.mass.masked_fill(~real_TK, 0.0)
        target_TK = mass_TK / mass_TK.sum(1, keepdim=True).clamp(min=1e-30)
        foreseen_TK = choice.score.masked_fill(~real_TK, torch.finfo(choice.score.dtype).min).log_softmax(1)
        kl_T = (torch.xlogy(target_TK, target_TK) - target_TK * foreseen_TK.masked_fill(~real_TK, 0.0)).sum(1)
        parts.append((kl_T * counts_T).sum() / counts_T.sum().clamp(min=1))
    return torch.stack(parts).mean() if parts else choices[0].score.sum() * 0


class WatchedGate:
    """One gate's call: what it read, and whom it chose."""

    def __init__(self, name: str, gate: Gate, x_TD: Tensor, expert_TK: Tensor) -> None:
        self.name, self.gate, self.x_TD, self.expert_TK = name, gate, x_TD, expert_TK

    def load(self) -> Tensor:
        """Tokens of each expert, int64 [E]."""
        chosen = self.expert_TK[self.expert_TK >= 0]
        return torch.bincount(chosen, minlength=self.gate.weight.shape[0])


@contextmanager
def watched_gates(model: Network) -> Iterator[list[WatchedGate]]:
    """Collects every gate's call inside a block."""
    seen: list[WatchedGate] = []

    def watch(name: str) -> Any:
        return lambda gate, given, out: seen.append(WatchedGate(name, gate, given[0], out[0]))

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, Gate)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(call: WatchedGate, batch: Batch) -> Tensor:
    """Sequence-wise balance: sum over experts of (share of visits x mean affinity), one where all are alike."""
    E, K = call.gate.weight.shape[0], call.expert_TK.shape[1]
    score_TE = route_scores(call.x_TD, call.gate.weight)
    share_TE = score_TE / score_TE.sum(1, keepdim=True)
    visits_TE = torch.zeros_like(share_TE).scatter_(1, call.expert_TK.clamp(min=0), 1.0)
    B = batch.num_spans
    span_T = batch.step.span_T
    length_B1 = torch.zeros(B, 1, dtype=share_TE.dtype, device=share_TE.device).index_add_(
        0, span_T, torch.ones_like(share_TE[:, :1])
    )
    f_BE = torch.zeros(B, E, dtype=share_TE.dtype, device=share_TE.device).index_add_(0, span_T, visits_TE)
    p_BE = torch.zeros_like(f_BE).index_add(0, span_T, share_TE)
    return ((f_BE * E / (K * length_B1)) * (p_BE / length_B1)).sum(1).mean()


@torch.no_grad()
def rebalance(fixed: dict[str, Tensor], model: Network, load: dict[str, Tensor], speed: float) -> None:
    """Move the balancing biases: up where an expert got less than its part, down where more (aux-loss-free)."""
    for name, load_E in load.items():
        bias = f"{name}.bias"
        moved = fixed[bias].to(load_E.device) + speed * torch.sign(load_E.float().mean() - load_E.float())
        fixed[bias] = moved
        model.get_submodule(name).bias.copy_(moved)  # type: ignore[union-attr, operator]


@torch.no_grad()
def first_bad(model: Network, batch: Batch, gradients: Mapping[str, Tensor]) -> str:
    """Where a step's first value that is not finite is: a layer's output, or else a gradient."""
    taps = model(batch.step, taps=range(len(model.layers))).taps
    if bad := [i for i, streams in taps.items() if not torch.isfinite(streams).all()]:
        return f"layer {bad[0]}'s output"
    names = [n for n, g in gradients.items() if not torch.isfinite(g).all()]
    return f"the gradient of {names[0]}" if names else "the loss alone"
