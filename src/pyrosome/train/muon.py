"""Muon for matrices, AdamW for the rest, as the report divides them; both step from float32 masters.

Shape letters: B matrices of one shape, N x M a matrix (N <= M).
Source: DeepSeek-V4 report, sections 2.4 and 4.2.2 (hybrid Newton-Schulz: 8 + 2 iterations).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FAST, FINE = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (*[FAST] * 8, *[FINE] * 2)  # the first bring all singular values near one, the last two settle them
ADAMW_EPS = 1e-20


def orthogonalized(x_BNM: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nearest (semi-)orthogonal matrices of a batch, float32: all singular values of each brought to one.

    Computed in `dtype`; the iterations are stable in bfloat16 (report, section 3.4.1).
    """
    tall = x_BNM.shape[-2] > x_BNM.shape[-1]
    x = x_BNM.transpose(-1, -2) if tall else x_BNM
    x = (x / x.flatten(-2).norm(dim=-1).clamp(min=1e-30)[..., None, None]).to(dtype)
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(x, x.transpose(-1, -2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(-1, -2) if tall else x).float()


class Tuner:
    """Optimizer over named parameters; keeps masters, momenta and second moments by name, all float32.

    A matrix [N, M] is one matrix; a stack [E, N, M] (experts) is E of them, each orthogonalised on its own.

    Args:
        masters: what is stepped; the caller copies it to wherever the network reads.
        adamw: names of those that AdamW steps; all others need two dimensions or three.
        parts: names of matrices that are read as so many groups of rows, each a matrix of its own.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        adamw: Sequence[str],
        parts: Mapping[str, int],
        *,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
        update_rms: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.masters = dict(masters)
        self.momentum, self.betas, self.weight_decay = momentum, betas, weight_decay
        self.update_rms, self.dtype, self.num_steps = update_rms, dtype, 0
        self.first = {n: torch.zeros_like(p) for n, p in self.masters.items()}
        self.second = {n: torch.zeros_like(self.masters[n]) for n in adamw}
        self.parts = dict(parts)
        self._alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, p in self.masters.items():
            if name not in self.second:
                shape = self._matrices(name, p).shape
                self._alike[(min(shape[-2:]), max(shape[-2:]))].append(name)

    def _matrices(self, name: str, p: Tensor) -> Tensor:
        """p as [B, N, M]."""
        p = p.unflatten(0, (self.parts[name], -1)) if name in self.parts else p
        return p if p.dim() == 3 else p[None]

    @torch.no_grad()
    def step(
        self, gradients: Mapping[str, Tensor], muon_lr: float, adamw_lr: float, frozen: Sequence[str] = ()
    ) -> None:
        """One step of every master that has a gradient and is not frozen."""
        self.num_steps += 1
        still = set(frozen)
        live = {n: g for n, g in gradients.items() if n not in still}
        for name in self.second.keys() & live.keys():
            self._adamw(name, live[name], adamw_lr)
        for names in self._alike.values():
            if present := [n for n in names if n in live]:
                self._muon(present, live, muon_lr)

    def _adamw(self, name: str, gradient: Tensor, lr: float) -> None:
        p, m, v = self.masters[name], self.first[name], self.second[name]
        b1, b2 = self.betas
        m.lerp_(gradient, 1 - b1)
        v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        p.mul_(1 - lr * self.weight_decay)
        size = (v / (1 - b2**self.num_steps)).sqrt_().add_(ADAMW_EPS)
        p.addcdiv_(m, size, value=-lr / (1 - b1**self.num_steps))

    def _muon(self, names: list[str], gradients: Mapping[str, Tensor], lr: float) -> None:
        updates = []
        for n in names:
            m = self.first[n].mul_(self.momentum).add_(gradients[n])
            u = self._matrices(n, gradients[n] + self.momentum * m)
            updates.append(u.transpose(-1, -2) if u.shape[-2] > u.shape[-1] else u)
        done = orthogonalized(torch.cat(updates), self.dtype).split([u.shape[0] for u in updates])
        for n, update in zip(names, done, strict=True):
            p = self._matrices(n, self.masters[n])
            flat = update.transpose(-1, -2) if p.shape[-2] > p.shape[-1] else update
            p.mul_(1 - lr * self.weight_decay)
            # An orthogonal N x M matrix has an RMS of 1 / sqrt(max(N, M)): this brings it to `update_rms`.
            p.add_(flat, alpha=-lr * self.update_rms * max(p.shape[-2:]) ** 0.5)
