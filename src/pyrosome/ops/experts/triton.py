"""Experts on a GPU: pairs sorted by expert, two products over each expert's pairs, and each token's rows added.

Of one token's pairs each is a tile of its own: 6 experts times 16 pieces of 128 outputs occupy a device, and every byte
of an expert is read once.  More pairs are sorted into tiles of one expert, of more columns the more pairs an expert may
expect, so that an expert's bytes are decoded once for all of them.  Rows are kept by pair, not by tile: `combine` adds
them in the definition's order whatever the tiles were.
Shape letters: T tokens, K experts per token, N = T K pairs, D model dim, I intermediate dim, G tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrosome.ops import experts as ops
from pyrosome.ops import gpu
from pyrosome.ops.experts import ExpertWeights, products
from pyrosome.ops.experts.addresses import Addresses, addresses_of
from pyrosome.ops.experts.sorted_pairs import Tiles, sorted_pairs
from pyrosome.ops.experts.word_order import ordered_rows
from pyrosome.ops.gpu import Target, Variant, cdiv
from pyrosome.ops.linear import Prepare
from pyrosome.ops.linear.quantize import padded, prepared_rows
from pyrosome.quant import round_activation, unchanged

EACH_PAIRS = 12  # up to so many pairs are not sorted: two tokens seldom share an expert
MOST_SEGMENTS, PROGRAMS = 8, 128  # of a lone expert's K: until one token has so many programs


class Tiling(NamedTuple):
    """How both products are tiled: columns are as many as the tiles that pairs are sorted into."""

    gate_up: Variant
    down: Variant
    split: bool = False  # segments of K are summed by different programs, where an expert has segments


def _tiling(
    name: str, columns: int, stages: tuple[int, int], rows: tuple[int, int] = (128, 128), block_k: int = 128,
    *, split: bool = False,
) -> Tiling:  # fmt: skip
    columns_and_k = {"BLOCK_T": columns, "BLOCK_K": block_k}
    gate_up = Variant(name, {"BLOCK_I": rows[0], **columns_and_k}, rows[0] // 16, stages[0])
    return Tiling(gate_up, Variant(name, {"BLOCK_D": rows[1], **columns_and_k}, rows[1] // 16, stages[1]), split)


TILINGS = {
    "split": _tiling("split", 16, (4, 4), rows=(64, 64), split=True),
    "16": _tiling("16", 16, (4, 4), rows=(128, 64)),
    "32": _tiling("32", 32, (3, 4)),
    "64": _tiling("64", 64, (3, 3)),
    "128": _tiling("128", 128, (2, 3)),
    # For a hundred kilobytes of shared memory.
    "split-short": _tiling("split-short", 16, (3, 3), rows=(64, 128), split=True),
    "16-short": _tiling("16-short", 16, (3, 3)),
    "32-short": _tiling("32-short", 32, (2, 3)),
    "plain": _tiling("plain", 16, (2, 2), block_k=32),  # float32 products, without matrix units
}
VARIANTS = {name: tiling.gate_up for name, tiling in TILINGS.items()}
_ELEMENTS = Variant("elements", {"BLOCK": 1024}, warps=4, stages=1)
_ROW = Variant("row", {}, warps=4, stages=1)


def routed_experts(x_TD: Tensor, bank: ExpertWeights, expert_TK: Tensor, weight_TK: Tensor, limit: float) -> Tensor:
    """As the definition, for float32 x; an expert that the layer does not have adds nothing."""
    at = _addresses(bank)
    if at is None:
        return ops.routed_experts.definition(x_TD, bank, expert_TK, weight_TK, limit)  # type: ignore[no-any-return]
    return routed_at(x_TD, at, bank.prepare, expert_TK, weight_TK, limit, bank.first, bank.total)


def routed_at(
    x_TD: Tensor, at: Addresses, prepare: Prepare, expert_TK: Tensor, weight_TK: Tensor, limit: float, first: int,
    total: int,
) -> Tensor:  # fmt: skip
    """`routed_experts` of experts that are somewhere: `at` has those from `first` on, of the layer's `total`."""
    (T, K), D, E = expert_TK.shape, at.hidden, at.num
    if x_TD.shape != (T, D) or weight_TK.shape != (T, K):
        raise RuntimeError(
            f"rows {tuple(x_TD.shape)}, choices {tuple(expert_TK.shape)} and weights {tuple(weight_TK.shape)} were "
            f"given to experts of {D} inputs; rows are [T, {D}], choices and weights [T, K]"
        )
    if 0 in (T, K, E, D, at.inner):
        return x_TD.new_zeros(T, D)
    expert_TK, weight_TK = expert_TK.contiguous(), weight_TK.contiguous()
    target, N = gpu.target(x_TD.device), T * K
    tiling = _chosen("routed_experts", at, N, target)
    pairs = None if N <= EACH_PAIRS else sorted_pairs(expert_TK, first, E, tiling.down.constants["BLOCK_T"])
    run = _Run(at, prepare is round_activation, tiling, target, N, K, 1, first, expert_TK, pairs)
    out_ND = run.down(run.gate_up(x_TD, weight_TK, limit), None)
    out_TD = x_TD.new_empty(T, D)
    block = min(1024, gpu.pow2(D, 64))
    gpu.launch(
        products.combine, (T, cdiv(D, block)), out_ND, expert_TK, out_TD, first, E=E, TOTAL=total, K=K, D=D,
        BLOCK_E=gpu.pow2(K), BLOCK=block, variant=_ROW,
    )  # fmt: skip
    return out_TD


def shared_expert(x_TD: Tensor, expert: ExpertWeights, limit: float, onto_TD: Tensor | None = None) -> Tensor:
    """As the definition, for float32 x."""
    at = _addresses(expert)
    if at is None:
        return ops.shared_expert.definition(x_TD, expert, limit, onto_TD)  # type: ignore[no-any-return]
    T, D = x_TD.shape[0], at.hidden
    if x_TD.shape != (T, D) or (onto_TD is not None and onto_TD.shape != (T, D)):
        onto = "" if onto_TD is None else f", to be added to {tuple(onto_TD.shape)},"
        raise RuntimeError(f"rows {tuple(x_TD.shape)}{onto} were given to an expert of {D} inputs; they are [T, {D}]")
    if 0 in (T, D, at.inner):
        return torch.zeros_like(x_TD) if onto_TD is None else onto_TD.clone()
    target = gpu.target(x_TD.device)
    run = _Run(
        at, expert.prepare is round_activation, _chosen("shared_expert", at, T, target), target, T, 1, segments(at)
    )
    return run.down(run.gate_up(x_TD, None, limit), onto_TD)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """As the definition, for float32 inputs."""
    if gate.shape != up.shape or up.dtype != torch.float32:
        return ops.clamped_swiglu.definition(gate, up, limit)  # type: ignore[no-any-return]
    gate, up = gate.contiguous(), up.contiguous()
    out, num = torch.empty_like(gate), gate.numel()
    grid = (cdiv(num, _ELEMENTS.constants["BLOCK"]),)
    gpu.launch(products.swiglu, grid, gate, up, out, limit, num, variant=_ELEMENTS)
    return out


def segments(at: Addresses) -> int:
    """How many segments of its inputs a lone expert's first product is summed in: by its shape alone."""
    found = 1
    while found < MOST_SEGMENTS and cdiv(at.inner, 64) * found < PROGRAMS and at.hidden >= 512 * found:
        found *= 2
    return found


class _Run(NamedTuple):
    """Both products of some pairs, as they are laid out for a device."""

    at: Addresses
    rounds: bool
    tiling: Tiling
    target: Target
    num_pairs: int
    per_token: int
    segments: int
    first: int = 0
    expert_TK: Tensor | None = None  # None: one expert for every row
    pairs: Tiles | None = None  # None: every pair is a tile

    def gate_up(self, x_TD: Tensor, weight_TK: Tensor | None, limit: float) -> Tensor:
        """What w2 reads [N, Q]: rounded to values of bfloat16 where that is asked for, else float32."""
        at, variant, S = self.at, self.tiling.gate_up, self.segments
        x, parts = self._form(x_TD)
        Q = padded(at.inner)
        h_NQ = x_TD.new_empty(self.num_pairs, Q, dtype=torch.bfloat16 if self.rounds else torch.float32)
        split = self.tiling.split and S > 1
        sums = x_TD.new_empty(S, self.num_pairs, 2, Q) if split else None
        order_N, tile_G3 = (None, None) if self.pairs is None else self.pairs
        gpu.launch(
            products.gate_up, (cdiv(Q, variant.constants["BLOCK_I"]), self._tiles(), S if split else 1),
            at.table_6E, x, self.expert_TK, weight_TK, order_N, tile_G3, None if split else h_NQ, sums,
            self.num_pairs, x_TD.shape[0], self.first, float(limit), K=self.per_token, ROUND=self.rounds, SEGMENTS=S,
            PARTS=parts, variant=variant, matrix=self._matrix(), **self._constants(),
        )  # fmt: skip
        if sums is not None:
            gpu.launch(
                products.join, (self.num_pairs, Q // 128), sums, h_NQ, self.num_pairs, float(limit),
                Q=Q, SEGMENTS=S, ROUND=self.rounds, FORMAT=at.kind, variant=_ROW,
            )  # fmt: skip
        return h_NQ

    def down(self, h_NQ: Tensor, onto_ND: Tensor | None) -> Tensor:
        """[N, D], added to `onto_ND` where there is one."""
        at, variant = self.at, self.tiling.down
        h, parts = (h_NQ, 1) if self.rounds else self._form(h_NQ)
        out_ND = torch.empty(self.num_pairs, at.hidden, dtype=torch.float32, device=h_NQ.device)
        order_N, tile_G3 = (None, None) if self.pairs is None else self.pairs
        gpu.launch(
            products.down, (cdiv(at.hidden, variant.constants["BLOCK_D"]), self._tiles()),
            at.table_6E, h, self.expert_TK, order_N, tile_G3, None if onto_ND is None else onto_ND.contiguous(), out_ND,
            self.num_pairs, self.first, PARTS=parts, variant=variant, matrix=self._matrix(), **self._constants(),
        )  # fmt: skip
        return out_ND

    def _form(self, x_MK: Tensor) -> tuple[Tensor, int]:
        """Rows as the products read them, padded, and of how many parts they are."""
        if self.at.kind == "fp4":
            return ordered_rows(x_MK, rounded=self.rounds), 1 if self.rounds else 3
        if self.rounds:
            rows = prepared_rows(x_MK, rounded=True).rounded_MP
        elif self._plain():
            rows = prepared_rows(x_MK, plain=True).plain_MP
        else:
            rows = prepared_rows(x_MK, parts=True).parts_3MP
        assert rows is not None
        return rows, 1 if self.rounds or self._plain() else 3

    def _plain(self) -> bool:
        return self.at.kind in ("f32", "f16")

    def _matrix(self) -> str:
        return "" if self._plain() else "bf16"

    def _tiles(self) -> int:
        if self.pairs is not None:
            return self.pairs.tile_G3.shape[0]
        return (
            self.num_pairs
            if self.expert_TK is not None
            else cdiv(self.num_pairs, self.tiling.down.constants["BLOCK_T"])
        )

    def _constants(self) -> dict[str, int | str | bool]:
        mode = "sorted" if self.pairs is not None else "all" if self.expert_TK is None else "each"
        return {
            "E": self.at.num, "D": self.at.hidden, "INNER": self.at.inner, "MODE": mode, "FORMAT": self.at.kind,
            "ALIGN": 16 if self.at.aligned else 1, "UPCAST": self.target.interpreted,
        }  # fmt: skip


def _chosen(kernel: str, at: Addresses, num_pairs: int, target: Target) -> Tiling:
    """The tiling for so many pairs: as many columns as leave few of them empty, where registers suffice."""
    # Two accumulators and the weights of a step are in registers: these columns leave them room, by architecture.
    hopper, most = target.capability // 10 == 9, "64" if target.capability // 10 == 10 else "32"
    if at.kind in ("f32", "f16"):
        choices = {0: "plain"}
    elif kernel == "shared_expert":
        choices = {32: "split", 512: "32", 0: "64" if hopper else "32"}
    else:
        choices = {4: "16", 16: "32", 64: "64" if hopper else most, 0: "128" if hopper else most}
    bound = next((n for n in choices if num_pairs <= n * at.num), 0)
    default = choices[bound]
    if f"{default}-short" in TILINGS and target.shared_bytes < 128 << 10:
        default += "-short"
    key = f"{at.kind},E={at.num},D={at.hidden},I={at.inner},N<={bound * at.num}" if bound else f"{at.kind},more"
    return TILINGS[gpu.chosen(kernel, key, VARIANTS, default, target).name]


def _addresses(weights: ExpertWeights) -> Addresses | None:
    """Where the experts are; None where kernels do not read or prepare them as they ask."""
    known = weights.prepare is unchanged or weights.prepare is round_activation
    return addresses_of(weights[:3]) if known else None
