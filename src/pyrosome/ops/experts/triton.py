"""Experts on a GPU: pairs sorted by expert, two products over each expert's pairs, and each token's rows added.

Of one token's pairs each is a tile of its own: 6 experts times 2 matrices times 32 pieces of 64 outputs occupy a
device, and every byte of an expert is read once.  More pairs are sorted into tiles of one expert, of more columns the
more pairs an expert may expect, so that an expert's bytes are decoded once for all of them.  Rows are kept by pair, not
by tile: `combine` adds them in the definition's order whatever the tiles were.
Shape letters: T tokens, K experts per token, N = T K pairs, D model dim, I intermediate dim, G tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrosome.ops import experts as ops
from pyrosome.ops import gpu
from pyrosome.ops.experts import ExpertWeights, products
from pyrosome.ops.experts.addresses import CODES_PER_WORD, Addresses, addresses_of
from pyrosome.ops.experts.sorted_pairs import Tiles, sorted_pairs
from pyrosome.ops.experts.word_order import ordered_rows
from pyrosome.ops.gpu import Target, Variant, cdiv
from pyrosome.ops.linear import Prepare
from pyrosome.ops.linear.quantize import padded, prepared_rows
from pyrosome.quant import round_activation, unchanged

EACH_PAIRS = 12  # up to so many pairs are not sorted: two tokens seldom share an expert
MOST_SEGMENTS, PROGRAMS = 8, 256  # of a lone expert's K: until one token has so many programs


class Tiling(NamedTuple):
    """How both products are tiled: columns are as many as the tiles that pairs are sorted into."""

    gate_up: Variant
    down: Variant
    split: bool = False  # w1 and w3, and segments of K where there are any, are summed by different programs


def _tiling(
    name: str, columns: int, stages: tuple[int, int], rows: tuple[int, int] = (128, 128), block_k: int = 128,
    *, warps: int = 0, split: bool = False,
) -> Tiling:  # fmt: skip
    columns_and_k = {"BLOCK_T": columns, "BLOCK_K": block_k}
    gate_up = Variant(name, {"BLOCK_I": rows[0], **columns_and_k}, warps or rows[0] // 16, stages[0])
    down = Variant(name, {"BLOCK_D": rows[1], **columns_and_k}, warps or rows[1] // 16, stages[1])
    return Tiling(gate_up, down, split)


TILINGS = {
    "16": _tiling("16", 16, (4, 4), rows=(64, 64), block_k=256, split=True),
    "64-split": _tiling("64-split", 64, (3, 3), rows=(64, 64), split=True),
    "32": _tiling("32", 32, (3, 4)),
    "64": _tiling("64", 64, (3, 3)),
    "128": _tiling("128", 128, (2, 3)),
    # For a hundred kilobytes of shared memory.
    "16-short": _tiling("16-short", 16, (4, 3), rows=(64, 64), split=True),
    "64-split-short": _tiling("64-split-short", 64, (2, 2), rows=(64, 64), warps=8, split=True),
    "32-short": _tiling("32-short", 32, (2, 3)),
    # For what takes most of it: bfloat16, and rows of three parts, of which no group is rounded.
    "16-wide": _tiling("16-wide", 16, (2, 2), rows=(128, 64)),
    "16-narrow": _tiling("16-narrow", 16, (2, 2), rows=(64, 64)),
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
    rounds = prepare is round_activation
    tiling = _chosen("routed_experts", at, rounds, N, target)
    pairs = None if N <= EACH_PAIRS else sorted_pairs(expert_TK, first, E, tiling.down.constants["BLOCK_T"])
    run = _Run(at, rounds, tiling, target, N, K, (1, 1), first, expert_TK, pairs)
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
    target, rounds = gpu.target(x_TD.device), expert.prepare is round_activation
    run = _Run(at, rounds, _chosen("shared_expert", at, rounds, T, target), target, T, 1, segments(at))
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


def segments(at: Addresses) -> tuple[int, int]:
    """How many segments of K a lone expert's two products are summed in: by its shape alone."""
    return _segments(2 * at.inner, at.hidden), _segments(at.hidden, at.inner)


def _segments(outputs: int, inputs: int) -> int:
    found = 1
    while found < MOST_SEGMENTS and cdiv(outputs, 64) * found < PROGRAMS and inputs >= 512 * found:
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
    segments: tuple[int, int]  # of the first product's K and of the second's
    first: int = 0
    expert_TK: Tensor | None = None  # None: one expert for every row
    pairs: Tiles | None = None  # None: every pair is a tile

    def gate_up(self, x_TD: Tensor, weight_TK: Tensor | None, limit: float) -> Tensor:
        """What w2 reads [N, Q]: rounded to values of bfloat16 where that is asked for, else float32."""
        at, S, split = self.at, self.segments[0], self.tiling.split
        variant = self._of_128(self.tiling.gate_up, at.hidden, S)
        x, parts = self._form(x_TD)
        Q = padded(at.inner)
        h_NQ = x_TD.new_empty(self.num_pairs, Q, dtype=torch.bfloat16 if self.rounds else torch.float32)
        sums = x_TD.new_empty(S, self.num_pairs, 2, Q) if split else None
        order_N, tile_G3 = (None, None) if self.pairs is None else self.pairs
        gpu.launch(
            products.gate_up, (cdiv(Q, variant.constants["BLOCK_I"]), self._tiles(), 2 * S if split else 1),
            at.table_6E, x, self.expert_TK, None if split else weight_TK, order_N, tile_G3, None if split else h_NQ,
            sums, self.num_pairs, x_TD.shape[0], self.first, float(limit), K=self.per_token, ROUND=self.rounds,
            SEGMENTS=S, PARTS=parts, variant=variant, matrix=self._matrix(), **self._constants(),
        )  # fmt: skip
        if sums is not None:
            gpu.launch(
                products.join, (self.num_pairs, Q // 128), sums, weight_TK, h_NQ, self.num_pairs, float(limit),
                Q=Q, SEGMENTS=S, ROUND=self.rounds, FORMAT=at.kind, variant=_ROW,
            )  # fmt: skip
        return h_NQ

    def down(self, h_NQ: Tensor, onto_ND: Tensor | None) -> Tensor:
        """[N, D], added to `onto_ND` where there is one."""
        at, S = self.at, self.segments[1]
        variant = self._of_128(self.tiling.down, at.inner, S)
        h, parts = (h_NQ, 1) if self.rounds else self._form(h_NQ)
        out_ND = torch.empty(self.num_pairs, at.hidden, dtype=torch.float32, device=h_NQ.device)
        onto_ND = None if onto_ND is None else onto_ND.contiguous()
        split = self.tiling.split and S > 1
        sums = out_ND.new_empty(S, *out_ND.shape) if split else None
        order_N, tile_G3 = (None, None) if self.pairs is None else self.pairs
        gpu.launch(
            products.down, (cdiv(at.hidden, variant.constants["BLOCK_D"]), self._tiles(), S if split else 1),
            at.table_6E, h, self.expert_TK, order_N, tile_G3, None if split else onto_ND, None if split else out_ND,
            sums, self.num_pairs, self.first, SEGMENTS=S, PARTS=parts, variant=variant, matrix=self._matrix(),
            **self._constants(),
        )  # fmt: skip
        if sums is not None:
            gpu.launch(
                products.add, (cdiv(out_ND.numel(), _ELEMENTS.constants["BLOCK"]),), sums, onto_ND, out_ND,
                out_ND.numel(), SEGMENTS=S, variant=_ELEMENTS,
            )  # fmt: skip
        return out_ND

    def _of_128(self, variant: Variant, inputs: int, segments: int) -> Variant:
        """The variant with blocks of 256 inputs only where sums are those of blocks of 128, to the bit."""
        one_by_one = self.at.kind == "fp4" and self.rounds  # one product for each block, under scales of inputs
        if variant.constants["BLOCK_K"] <= 128 or (one_by_one and inputs % (256 * segments) == 0):
            return variant
        return variant._replace(constants={**variant.constants, "BLOCK_K": 128})

    def _form(self, x_MK: Tensor) -> tuple[Tensor, int]:
        """Rows as the products read them, padded, and of how many parts they are."""
        if codes := CODES_PER_WORD.get(self.at.kind):
            return ordered_rows(x_MK, codes, rounded=self.rounds), 1 if self.rounds else 3
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


def _chosen(kernel: str, at: Addresses, rounds: bool, num_pairs: int, target: Target) -> Tiling:
    """The tiling for so many pairs: as many columns as leave few of them empty, where registers suffice."""
    E, generation = at.num, target.capability // 10
    # Two accumulators and the weights of a step are in registers: these columns leave them room, by architecture.
    most = {9: "128" if at.kind == "fp4" else "64", 10: "64"}.get(generation, "32")
    if at.kind in ("f32", "f16"):
        choices = {0: "plain"}
    elif not rounds or at.kind == "bf16":
        choices = {(32 if kernel == "shared_expert" else 4 * E): "16-short", 0: "16-wide" if rounds else "16-narrow"}
    elif kernel == "shared_expert":
        choices = {32: "16", 256: "64-split", 0: "64" if generation == 9 else "32"}
    else:
        choices = {4 * E: "16", 16 * E: "32", 64 * E: "64" if generation == 9 else most, 0: most}
    bound = next((n for n in choices if num_pairs <= n), 0)
    default = choices[bound]
    if f"{default}-short" in TILINGS and target.shared_bytes < 128 << 10:
        default += "-short"
    if default == "16" and generation not in (9, 10):  # blocks of 256 are too much for its registers
        default = "16-short"
    key = f"{at.kind},E={E},D={at.hidden},I={at.inner},N<={bound}" if bound else f"{at.kind},more"
    key = key if rounds else f"{key},unrounded"
    return TILINGS[gpu.chosen(kernel, key, {n: VARIANTS[n] for n in _fitting(at.kind, rounds)}, default, target).name]


def _fitting(kind: str, rounds: bool) -> list[str]:
    """The tilings that give the same bits: without matrix units, or with them, and those that round groups."""
    if kind in ("f32", "f16"):
        return ["plain"]
    return [n for n in TILINGS if n != "plain" and (n != "16-narrow" or not rounds)]


def _addresses(weights: ExpertWeights) -> Addresses | None:
    """Where the experts are; None where kernels do not read or prepare them as they ask."""
    known = weights.prepare is unchanged or weights.prepare is round_activation
    return addresses_of(weights[:3]) if known else None
