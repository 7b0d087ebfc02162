"""Proof that a decode step read its cache: what it computed is computed again from rows that no cache held.

The sequence was filled from a seed (`testing.filled`).  Forward hooks keep what one step's indexer and attention
were given and returned.  Then, from the seed alone:

* every key of the history is scored, and no key left out may score above one that was chosen;
* each layer's attention is computed in float64 over the window and the rows chosen (CSA) or all rows (HCA);
* a checksum is taken of the rows that step had to read, and of the same rows as the pool gives them.

Random rows carry shares of one size, so leaving out one row in ten thousand moves an output by about a hundredth.
Shape letters: N rows, K rows chosen, C row width, H heads, D model dim, L latent, G output groups.
"""

from __future__ import annotations

import dataclasses
import zlib
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyrosome.cache.streams import layer_streams
from pyrosome.engine.runner import Runner, Sequence
from pyrosome.model.deepseek_v4 import CSA_RATIO, Attention, Indexer
from pyrosome.model.step import Span, Step
from pyrosome.ops.linear import dense
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.ops.rope import norm_rope, rope
from pyrosome.ops.rows import RowSource
from pyrosome.quant import hadamard
from pyrosome.quant.rows import index_rows, kv_rows
from pyrosome.testing.filled import BLOCK_ROWS, RandomRows, emitted

# Relative RMS of a layer's attention output against float64.  The softmax's weights are rounded to bfloat16 (an error
# of 2^-9 at most each, about 1e-3 together); a row left out of ten thousand moves the output by 1e-2.
ATTENTION_TOLERANCE = 3e-3
SCORE_TOLERANCE = 1e-5  # of the largest score: how far float32 may misorder two keys


class Watch:
    """Hooks on a network that keep the arguments and results of each layer's attention and indexer."""

    def __init__(self, runner: Runner) -> None:
        self.layers: list[Attention] = [block.attn for block in runner.model.layers]  # type: ignore[misc,union-attr]
        self.attention: dict[int, tuple[Any, Tensor]] = {}  # layer -> (arguments, output)
        self.indexer: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> Watch:
        self._hooks = []
        for layer, attn in enumerate(self.layers):
            self._hooks.append(attn.register_forward_hook(_keeping(self.attention, layer)))
            if attn.ratio == CSA_RATIO:
                self._hooks.append(attn.indexer.register_forward_hook(_keeping(self.indexer, layer)))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()


def _keeping(kept: dict[int, Any], layer: int) -> Any:
    def hook(module: object, arguments: Any, output: Any) -> None:
        kept[layer] = arguments, output

    return hook


@dataclasses.dataclass
class Proof:
    """What was found; `problems` is empty where the step read all that it should have."""

    problems: list[str] = dataclasses.field(default_factory=list)
    keys_scored: int = 0
    rows_attended: int = 0  # window, own, chosen and HCA rows, over all layers
    attention_error: float = 0.0  # the worst layer's
    checksum: int = 0  # CRC-32 of the history rows the step had to read, as float32: keys, then rows, layer by layer
    pool_checksum: int = 0  # of the same rows as the pool gives them

    def take(self, expected_NC: Tensor, pooled_NC: Tensor) -> None:
        """Count rows into both checksums."""
        self.checksum, self.pool_checksum = _crc(expected_NC, self.checksum), _crc(pooled_NC, self.pool_checksum)


@torch.inference_mode()
def verify(runner: Runner, sequence: Sequence, position: int, watch: Watch, rows: RandomRows) -> Proof:
    """Hold one watched step of one token against the seed its sequence was filled from.

    Args:
        position: of that token; the sequence had been filled so far.  A multiple of 4, so that the token finished
            no compressed row and all it read besides its own row is the seed's.
    """
    if position % CSA_RATIO:
        raise ValueError(f"the token at position {position} may have finished a row; take a multiple of {CSA_RATIO}")
    proof = Proof()
    for layer, attn in enumerate(watch.layers):
        seen = _Layer(runner, sequence, layer, position, rows)
        (x_1D, _, turns, *_), out_1D = watch.attention[layer]
        own_1C = seen.round_trip(
            norm_rope(attn.wkv(x_1D), attn.kv_norm.weight, turns.token, attn.eps, attn.numerics.kv)
        )
        read = [seen.expected("window_kv", max(position + 1 - attn.window, 0), position), own_1C]
        if attn.ratio:
            name, index_K = "hca_kv", torch.arange(position // attn.ratio)
            if attn.ratio == CSA_RATIO:
                name, index_K = "csa_kv", _check_indexer(attn.indexer, layer, watch, seen, turns.token, proof)
            read.append(seen.picked(name, index_K))
            flat_NC, at_1K = seen.pooled(name).read(index_K[None])
            proof.take(read[-1], flat_NC[at_1K[0]])
        read_NC = torch.cat(read)
        error = _distance(out_1D[0], attention_output(attn, x_1D, turns.token, read_NC))
        proof.rows_attended += len(read_NC)
        proof.attention_error = max(proof.attention_error, error)
        if not error <= ATTENTION_TOLERANCE:
            proof.problems.append(
                f"layer {layer}: the output of attention is {error:.2e} away from that over the {len(read_NC):,} rows "
                f"it had to read (limit {ATTENTION_TOLERANCE})"
            )
    if proof.checksum != proof.pool_checksum:
        proof.problems.append(f"the pool's rows have checksum {proof.pool_checksum:08x}, not {proof.checksum:08x}")
    return proof


def _check_indexer(
    indexer: Indexer, layer: int, watch: Watch, seen: _Layer, rotation_1F: Tensor, proof: Proof
) -> Tensor:
    """Score every key of the history; the rows [K] that the step chose."""
    arguments, choice = watch.indexer[layer]
    index_1K = choice.rows
    index_K = index_1K[0][index_1K[0] >= 0]
    q_HC, weight_H = index_query(indexer, arguments[0], arguments[3], rotation_1F)
    count = seen.position // CSA_RATIO
    score_N = torch.empty(count, dtype=torch.float64)
    pooled = seen.pooled("index_k")
    for low in range(0, count, BLOCK_ROWS):
        high = min(low + BLOCK_ROWS, count)
        key_NC = seen.expected("index_k", low, high)
        score_N[low:high] = (key_NC.double() @ q_HC.T).relu() @ weight_H
        proof.take(key_NC, pooled.span_rows(low, high)[0])
    proof.keys_scored += count
    proof.problems += [f"layer {layer}: {p}" for p in selection_problems(score_N, index_K, indexer.topk)]
    return index_K


def selection_problems(score_N: Tensor, index_K: Tensor, topk: int) -> list[str]:
    """What is wrong with a choice of the `topk` best of all rows, given every row's score."""
    expected, found = min(topk, len(score_N)), len(index_K.unique())
    if found != expected or len(index_K) != found:
        return [f"{len(index_K)} rows were chosen, {found} of them different; of {len(score_N):,} rows {expected} are"]
    if expected == len(score_N):
        return []
    left_out_N = score_N.clone()
    left_out_N[index_K] = float("-inf")
    short = float(left_out_N.max() - score_N[index_K].min())
    if not short <= SCORE_TOLERANCE * float(score_N.abs().max()):
        return [f"row {int(left_out_N.argmax()):,} was left out and scores {short:.2e} above one that was chosen"]
    return []


def index_query(indexer: Indexer, q_1X: Tensor, weight_1H: Tensor, rotation_1F: Tensor) -> tuple[Tensor, Tensor]:
    """(query [H, C], weight [H]) of one token's indexer, float64, of what its two projections gave."""
    q_1HC = rope(q_1X.unflatten(-1, (indexer.heads, indexer.width)), rotation_1F)
    scale = (indexer.width * indexer.heads) ** -0.5
    return indexer.numerics.index(hadamard(q_1HC))[0].double(), weight_1H[0].double() * scale


def attention_output(attn: Attention, x_1D: Tensor, rotation_1F: Tensor, row_NC: Tensor) -> Tensor:
    """One token's attention over all of `row_NC` at once, float64 [D]: one softmax with the sink, then both outputs."""
    q_1HC = attn.wq_b(attn.q_norm(attn.wq_a(x_1D))).unflatten(-1, (attn.heads, attn.width))
    q_HC = rope(rms_norm(q_1HC, None, attn.eps), rotation_1F)[0].bfloat16().double()  # as over narrow rows
    row_NC = row_NC.double()
    score_HN = q_HC @ row_NC.T * attn.width**-0.5
    p_HN = torch.cat([score_HN, attn.attn_sink.double()[:, None]], dim=1).softmax(dim=1)[:, :-1]
    o_HC = rope((p_HN @ row_NC)[None].float(), rotation_1F, inverse=True)[0].double()
    wo_a_GOK = dense(attn.wo_a.value, torch.float64).unflatten(0, (attn.groups, -1))
    z_GO = torch.einsum("gk,gok->go", o_HC.reshape(attn.groups, -1), wo_a_GOK)
    return attn.wo_b(z_GO.flatten().float()).double()  # type: ignore[no-any-return]


class _Layer:
    """One layer's rows up to a position: as the seed has them, and as the pool gives them."""

    def __init__(self, runner: Runner, sequence: Sequence, layer: int, position: int, rows: RandomRows) -> None:
        config, kv_format = runner.model.config, runner.pool.kv_format
        self.layer, self.position, self.rows = layer, position, rows
        self._specs = {s.name: s for s in layer_streams(config, config.layer_ratios[layer], kv_format)}
        self._kv = kv_rows(kv_format, config.head_dim, config.qk_rope_head_dim)
        self._index = index_rows(kv_format, config.index_head_dim)
        step = Step.of([Span(sequence.slot, position, [0])], runner.device)
        self._view = runner.pool.layers(step)[layer]

    def round_trip(self, row_NC: Tensor) -> Tensor:
        """KV rows as they are read back."""
        return self._kv.round_trip(row_NC)

    def expected(self, stream: str, low: int, high: int) -> Tensor:
        """Rows low..high from the seed, as they are read back."""
        row_NC = self.rows.rows(self.layer, stream, low, high, self._specs[stream].width)
        return (self._index if stream == "index_k" else self._kv).round_trip(row_NC)

    def picked(self, stream: str, index_K: Tensor) -> Tensor:
        """Rows at ascending `index_K` from the seed."""
        count = self.position // self._specs[stream].per_tokens
        parts = []
        for low in range(0, count, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, count)
            here_K = index_K[(index_K >= low) & (index_K < high)]
            if len(here_K):
                parts.append(self.expected(stream, low, high)[here_K - low])
        return torch.cat([torch.empty(0, self._specs[stream].width), *parts])

    def pooled(self, stream: str) -> RowSource:
        """The stream as the pool gives it."""
        spec, none = self._specs[stream], torch.empty(0, dtype=torch.int64)
        return self._view.history(
            stream, torch.empty(0, spec.width), emitted(none, spec.per_tokens, 0), spec.per_tokens
        )


def _distance(found_D: Tensor, expected_D: Tensor) -> float:
    """Relative RMS difference."""
    return float((found_D.double() - expected_D).norm() / expected_D.norm())


def _crc(row_NC: Tensor, start: int) -> int:
    return zlib.crc32((row_NC.contiguous() + 0.0).numpy(), start)  # + 0.0: a zero has one sign
