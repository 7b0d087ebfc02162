"""Tokens chosen on the device: many programs for each row, every sum in a fixed order, integers to the bit.

A row is cut into pieces of its vocabulary.  Greedy is two launches: the best of each piece, and of those.  A draw puts
the race of each piece between them, in float64 and with `noise`'s own integers.  Where top-k or top-p is asked for, the
logit at its edge is found before, four bits of its order-preserving integer by each launch: pieces count (top-k) or
weigh (top-p) the ids of each digit, and the next launch adds the pieces in one order and goes on in the digit that the
edge is in.  What ties there is kept from the lowest id on.

The same token as the definition's, but where two ids' times, or an edge and a sum of probabilities, differ by no more
than float64's last bits: exp and log differ there, and so does the order of sums; and equal means equal logits here,
where the definition compares probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import device, gpu
from pyrosome.ops.gpu import Variant

BITS = 4  # of a logit's integer, found by one launch
ROUNDS = 32 // BITS
_PIECE = Variant("piece", {"PIECE": 1024}, warps=8, stages=1)
_ROW = Variant("row", {}, warps=4, stages=1)
_FIELDS = tl.constexpr(4)  # of a search's state: digits so far, what stands before them, what may, and ties that stay
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _scrambled(x):
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def _uniforms(seed, position, ids):
    """float64 between 0 and 1, `noise.uniforms` to the bit, for int64 of a seed, a position and ids."""
    start = _scrambled(seed.to(tl.uint64) + _GOLDEN) ^ (position.to(tl.uint64) * _GOLDEN)
    x = _scrambled(ids.to(tl.uint64) * _GOLDEN + _scrambled(start + _GOLDEN))
    fraction = ((x >> 12) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    return fraction - 0.99999999999999988898  # 1 - 2^-53


@triton.jit
def _key(logit):
    """int64 from 0 to 2^32 - 1, ordered as float32 logits are; zeros of either sign are one."""
    bits = device.bits_of(logit)
    bits = tl.where(bits == -2147483648, 0, bits).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _logit(key):
    """The logit of a `_key`."""
    return device.float_of(tl.where(key < 2147483648, -1 - key, key - 2147483648).to(tl.int32))


@triton.jit
def _row_best(best_ptr, row, PIECES: tl.constexpr, PP: tl.constexpr):
    """The greatest logit of a row; infinite where no choice is allowed."""
    piece = tl.arange(0, PP)
    return tl.max(tl.load(best_ptr + row * PIECES + piece, mask=piece < PIECES, other=-float("inf")))


@triton.jit
def _weight(logit, best, temperature):
    """float64 e^((logit - best) / temperature): probabilities, but for their sum."""
    return tl.exp((logit.to(tl.float64) - best.to(tl.float64)) / tl.where(temperature > 0, temperature, 1.0))


@gpu.jit
def _sample_best(logits_ptr, best_ptr, at_ptr, V: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """The greatest logit of a piece and its first id; NaN is greater than all numbers."""
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = piece * PIECE + tl.arange(0, PIECE)
    logit = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=-float("inf"))
    logit = tl.where(logit == logit, logit, float("inf"))
    best = tl.max(logit)
    tl.store(best_ptr + row * PIECES + piece, best)
    tl.store(at_ptr + row * PIECES + piece, tl.min(tl.where((logit == best) & (ids < V), ids, V)))


@triton.jit
def _descend(parts_ptr, digits, before, limit, PIECES: tl.constexpr, PP: tl.constexpr, DIGITS: tl.constexpr):
    """One more digit of the edge: (digits, what stands before them, how much there is of them), all scalars.

    The edge is in the lowest digit that holds anything and that less than `limit` stands before.
    """
    piece, digit = tl.arange(0, PP)[:, None], tl.arange(0, DIGITS)
    part = tl.load(parts_ptr + piece * DIGITS + digit[None, :], mask=piece < PIECES, other=0.0)
    held = tl.sum(part, axis=0)
    greater = digit[:, None] < digit[None, :]
    ahead = before + tl.sum(tl.where(greater, held[None, :], 0.0), axis=1)
    ahead_too = tl.reshape(ahead, (DIGITS,))
    there = (held > 0) & (ahead_too < limit)
    at = tl.minimum(tl.min(tl.where(there, digit, DIGITS)), DIGITS - 1)
    before = tl.sum(tl.where(digit == at, ahead_too, 0.0))
    return digits * DIGITS + at, before, tl.sum(tl.where(digit == at, held, 0.0)), tl.sum(held)


@triton.jit
def _limit(wanted_ptr, row, whole, MASS: tl.constexpr, V: tl.constexpr):
    """How much may stand before an id that is kept: top-k ids of V, or top-p of the whole."""
    if MASS:
        share = tl.load(wanted_ptr + row)
        return tl.where(share < 1, share * whole, float("inf"))
    num = tl.load(wanted_ptr + row)
    return tl.where((num > 0) & (num < V), num, V).to(tl.float64)


@gpu.jit
def _sample_search(
    logits_ptr, best_ptr, temperature_ptr, wanted_ptr, floor_ptr, state_ptr, parts_ptr, turn, N,
    V: tl.constexpr, PIECES: tl.constexpr, PP: tl.constexpr, MASS: tl.constexpr, BITS: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Count (or under MASS weigh) a piece's ids by the digit `turn` of their logits, where the digits before are met.

    parts [turns + 1, N, pieces, digits]; the last are the counts of the last turn's ids.  state [turns, N, fields].
    floor: the top-k edge, which top-p keeps to; or None.
    """
    DIGITS: tl.constexpr = 1 << BITS
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best = _row_best(best_ptr, row, PIECES, PP)
    digits = tl.zeros([], tl.int64)
    before = tl.zeros([], tl.float64)
    limit = _limit(wanted_ptr, row, before + float("inf"), MASS, V)
    if turn > 0:
        held = state_ptr + ((turn - 1) * N + row) * _FIELDS
        digits = tl.load(held).to(tl.int64)
        before = tl.load(held + 1)
        limit = tl.load(held + 2)
        last_ptr = parts_ptr + ((turn - 1) * N + row) * (PIECES * DIGITS)
        if MASS:  # noqa: SIM102 (a constant, and a number of the run)
            if turn == 1:  # of the top-k ids' weight, ties beyond the last one left out
                part = tl.arange(0, PP)[:, None] * DIGITS + tl.arange(0, DIGITS)[None, :]
                whole = tl.sum(tl.sum(tl.load(last_ptr + part, mask=part < PIECES * DIGITS, other=0.0), axis=0))
                if floor_ptr is not None:
                    whole -= tl.load(floor_ptr + row * _FIELDS + 1)
                limit = _limit(wanted_ptr, row, whole, MASS, V)
        digits, before, _, _ = _descend(last_ptr, digits, before, limit, PIECES, PP, DIGITS)
    if piece == 0:
        held = state_ptr + (turn * N + row) * _FIELDS
        tl.store(held, digits.to(tl.float64))
        tl.store(held + 1, before)
        tl.store(held + 2, limit)

    ids = piece * PIECE + tl.arange(0, PIECE)
    logit = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=-float("inf"))
    key = _key(logit)
    shift = 32 - BITS * (turn + 1)
    meets = (ids < V) & ((key >> (shift + BITS)) == digits)
    if MASS and floor_ptr is not None:
        meets = meets & (key >= tl.load(floor_ptr + row * _FIELDS).to(tl.int64))
    digit = tl.arange(0, DIGITS)
    weights = tl.zeros([DIGITS], tl.float64)
    counts = tl.zeros([DIGITS], tl.float64)
    if tl.max(meets.to(tl.int32)) > 0:  # few pieces have ids that share many digits with the edge
        is_digit = meets[None, :] & (((key >> shift) & (DIGITS - 1))[None, :] == digit[:, None])
        counts = tl.sum(is_digit.to(tl.int32), axis=1).to(tl.float64)
        if MASS:
            weight = _weight(logit, best, tl.load(temperature_ptr + row))
            weights = tl.sum(tl.where(is_digit, weight[None, :], 0.0), axis=1)
    at = ((turn * N + row) * PIECES + piece) * DIGITS + digit
    tl.store(parts_ptr + at, weights if MASS else counts)
    if MASS:  # noqa: SIM102
        if shift == 0:
            tl.store(parts_ptr + N * PIECES * DIGITS + at, counts)


@gpu.jit
def _sample_edge(
    best_ptr, temperature_ptr, floor_ptr, state_ptr, parts_ptr, edge_ptr, N,
    PIECES: tl.constexpr, PP: tl.constexpr, MASS: tl.constexpr, BITS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """The edge of a row: [its key, the weight of ties that are not kept, -, how many of its ties are kept]."""
    DIGITS: tl.constexpr = 1 << BITS
    row = tl.program_id(0).to(tl.int64)
    held = state_ptr + ((TURNS - 1) * N + row) * _FIELDS
    limit = tl.load(held + 2)
    last_ptr = parts_ptr + ((TURNS - 1) * N + row) * (PIECES * DIGITS)
    key, before, num, _ = _descend(last_ptr, tl.load(held).to(tl.int64), tl.load(held + 1), limit, PIECES, PP, DIGITS)
    weight = _weight(_logit(key), _row_best(best_ptr, row, PIECES, PP), tl.load(temperature_ptr + row))
    if MASS:
        kept = tl.ceil((limit - before) / weight)  # those that less than the limit stands before
        if floor_ptr is not None:
            same = key == tl.load(floor_ptr + row * _FIELDS).to(tl.int64)
            kept = tl.where(same, tl.minimum(kept, tl.load(floor_ptr + row * _FIELDS + 3)), kept)
    else:
        kept = tl.minimum(limit - before, num)
    edge = edge_ptr + row * _FIELDS
    tl.store(edge, key.to(tl.float64))
    tl.store(edge + 1, (num - kept) * weight)
    tl.store(edge + 3, tl.minimum(tl.maximum(kept, 1.0), 4294967296.0))


@gpu.jit
def _sample_race(
    logits_ptr, best_ptr, temperature_ptr, min_p_ptr, seed_ptr, position_ptr, edge_ptr, ties_ptr, time_ptr, winner_ptr,
    V: tl.constexpr, PIECES: tl.constexpr, PP: tl.constexpr, BITS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The least time of a piece's ids, and whose it is; infinite where none of them is kept."""
    DIGITS: tl.constexpr = 1 << BITS
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best = _row_best(best_ptr, row, PIECES, PP)
    ids = piece * PIECE + tl.arange(0, PIECE)
    logit = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=-float("inf"))
    weight = _weight(logit, best, tl.load(temperature_ptr + row))
    kept = (ids < V) & (weight > 0)
    if min_p_ptr is not None:
        kept = kept & (weight >= tl.load(min_p_ptr + row))
    if edge_ptr is not None:
        edge = tl.load(edge_ptr + row * _FIELDS).to(tl.int64)
        others, digit = tl.arange(0, PP), edge & (DIGITS - 1)
        ties = tl.load(ties_ptr + (row * PIECES + others) * DIGITS + digit, mask=others < piece, other=0.0)
        key = _key(logit)
        ties_here = ((key == edge) & (ids < V)).to(tl.int32)
        rank = tl.sum(ties) + (tl.cumsum(ties_here) - 1).to(tl.float64)
        kept = kept & ((key > edge) | ((key == edge) & (rank < tl.load(edge_ptr + row * _FIELDS + 3))))
    u = _uniforms(tl.load(seed_ptr + row), tl.load(position_ptr + row), ids)
    time = tl.where(kept, -tl.log(1.0 - u) / weight, float("inf"))
    least = tl.min(time)
    tl.store(time_ptr + row * PIECES + piece, least)
    tl.store(winner_ptr + row * PIECES + piece, tl.min(tl.where(time == least, ids, V)))


@gpu.jit
def _sample_take(
    best_ptr, at_ptr, temperature_ptr, time_ptr, winner_ptr, token_ptr, V: tl.constexpr, PIECES: tl.constexpr,
    PP: tl.constexpr,
):  # fmt: skip
    """A row's token, of its pieces: the race's winner, or the first of the best; -1 where no choice is allowed."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PP)
    there = piece < PIECES
    bests = tl.load(best_ptr + row * PIECES + piece, mask=there, other=-float("inf"))
    best = tl.max(bests)
    at = tl.load(at_ptr + row * PIECES + piece, mask=there, other=V)
    token = tl.min(tl.where(bests == best, at, V))
    if time_ptr is not None:
        time = tl.load(time_ptr + row * PIECES + piece, mask=there, other=float("inf"))
        least = tl.min(time)
        winner = tl.min(tl.where(time == least, tl.load(winner_ptr + row * PIECES + piece, mask=there, other=V), V))
        token = tl.where((tl.load(temperature_ptr + row) > 0) & (least < float("inf")), winner, token)
    tl.store(token_ptr + row, tl.where(tl.abs(best) < float("inf"), token, -1).to(tl.int64))


def choose_tokens(
    logits_NV: Tensor,
    temperature_N: Tensor | None = None,
    top_k_N: Tensor | None = None,
    top_p_N: Tensor | None = None,
    min_p_N: Tensor | None = None,
    seed_N: Tensor | None = None,
    position_N: Tensor | None = None,
) -> Tensor:
    """As the definition, for float32 logits."""
    N, V = logits_NV.shape
    asked = temperature_N, top_k_N, top_p_N, min_p_N, seed_N, position_N
    if V == 0 or any(x is not None and tuple(x.shape) != (N,) for x in asked):
        raise RuntimeError(f"logits {tuple(logits_NV.shape)} need {N} of each parameter, and an id to choose")
    if temperature_N is not None and (seed_N is None or position_N is None):
        raise RuntimeError("a draw needs the seed and the position of each row")
    logits_NV = logits_NV.contiguous()
    temperature_N, top_k_N, top_p_N, min_p_N, seed_N, position_N = (x if x is None else x.contiguous() for x in asked)
    pieces = gpu.cdiv(V, _PIECE.constants["PIECE"])
    cut: dict[str, Any] = {"PIECES": pieces, "PP": gpu.pow2(pieces)}
    best, at = logits_NV.new_empty(N, pieces), logits_NV.new_empty(N, pieces, dtype=torch.int32)
    gpu.launch(_sample_best, (pieces, N), logits_NV, best, at, V=V, PIECES=pieces, variant=_PIECE)
    time = winner = None
    if temperature_N is not None:
        edge = ties = None
        for wanted_N, is_mass in ((top_k_N, False), (top_p_N, True)):
            if wanted_N is not None:
                edge, ties = _search(logits_NV, best, temperature_N, wanted_N, edge, is_mass, cut)
        time, winner = logits_NV.new_empty(N, pieces, dtype=torch.float64), torch.empty_like(at)
        gpu.launch(
            _sample_race, (pieces, N), logits_NV, best, temperature_N, min_p_N, seed_N, position_N, edge, ties, time,
            winner, V=V, **cut, BITS=BITS, variant=_PIECE,
        )  # fmt: skip
    token_N = torch.empty(N, dtype=torch.int64, device=logits_NV.device)
    gpu.launch(_sample_take, (N,), best, at, temperature_N, time, winner, token_N, V=V, **cut, variant=_ROW)
    return token_N


def _search(
    logits_NV: Tensor,
    best: Tensor,
    temperature_N: Tensor,
    wanted_N: Tensor,
    floor: Tensor | None,
    is_mass: bool,
    cut: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(edge [N, fields], what of the edge's digits each piece holds [N, pieces, digits]) of top-k, or of top-p."""
    (N, V), pieces = logits_NV.shape, cut["PIECES"]
    state = logits_NV.new_empty(ROUNDS, N, _FIELDS.value, dtype=torch.float64)
    parts = logits_NV.new_empty(ROUNDS + 1, N, pieces, 1 << BITS, dtype=torch.float64)
    edge = torch.empty_like(state[0])
    for turn in range(ROUNDS):
        gpu.launch(
            _sample_search, (pieces, N), logits_NV, best, temperature_N, wanted_N, floor, state, parts, turn, N,
            V=V, **cut, MASS=is_mass, BITS=BITS, variant=_PIECE,
        )  # fmt: skip
    gpu.launch(
        _sample_edge, (N,), best, temperature_N, floor, state, parts, edge, N,
        **cut, MASS=is_mass, BITS=BITS, TURNS=ROUNDS, variant=_ROW,
    )  # fmt: skip
    return edge, parts[ROUNDS if is_mass else ROUNDS - 1]
