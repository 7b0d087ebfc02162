"""DeepSeek-V4, top to bottom: the one definition that serves and trains.

Shape letters: T tokens in step, J residual streams, D model dim, H heads, C head dim, L query latent,
G output groups, M rows emitted, K rows or experts chosen, V vocabulary.
Module names are the official checkpoint's tensor names.  Source: DeepSeek-V4 report and the official
inference code; each function names the equation it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyrosome.cache.views import LayerCache, fresh_layers
from pyrosome.config import CSA_RATIO, ModelConfig
from pyrosome.model.experts import ExpertBank
from pyrosome.model.layers import Linear, RMSNorm, Weight
from pyrosome.model.numerics import Numerics, unchanged
from pyrosome.model.step import Step
from pyrosome.ops.compress import Emit, compressed_rows
from pyrosome.ops.experts import ExpertWeights, clamped_swiglu, shared_expert
from pyrosome.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_in,
    hyper_connection_out,
    hyper_connection_turn,
)
from pyrosome.ops.index_topk import index_topk
from pyrosome.ops.linear import dense_rows, grouped_linear, linears, scaled
from pyrosome.ops.rope import frequencies, index_rows, norm_rope, rotation
from pyrosome.ops.route import route
from pyrosome.ops.rows import RowSource
from pyrosome.ops.sparse_attention import attention, watched_attention


class Compressor(nn.Module):
    """Pools windows of tokens into rows: overlapping windows of 8 every 4 tokens (CSA), or of R every R (HCA)."""

    def __init__(
        self, config: ModelConfig, ratio: int, width: int, round_nope: Callable[[Tensor], Tensor] = unchanged
    ) -> None:
        super().__init__()
        self.ratio, self.round_nope = ratio, round_nope
        self.window = 2 * ratio if ratio == CSA_RATIO else ratio
        projected = width * self.window // ratio
        self.wkv, self.wgate = Linear(projected, config.hidden_size), Linear(projected, config.hidden_size)
        self.ape = nn.Parameter(torch.empty(ratio, projected, device="meta"))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def forward(
        self, kv_TE: Tensor, gate_TE: Tensor, emit: Emit, rotation_MF: Tensor, cache: LayerCache, tail: str
    ) -> Tensor:
        """Rows [M, C] that this step finishes, normalised and rotated at their window's first position.

        Args: kv and gate are the step's tokens by `wkv` and `wgate`, which read what the layer's attention reads.
        """
        tail_kv, tail_gate = cache.tail(tail, kv_TE)
        rows_MC = compressed_rows(
            kv_TE, gate_TE, tail_kv, tail_gate, self.ape, emit, self.window, self.norm.weight, rotation_MF,
            self.norm.eps, self.round_nope,
        )  # fmt: skip
        cache.keep_tail(tail, kv_TE, gate_TE)
        return rows_MC  # type: ignore[no-any-return]


class Choice(NamedTuple):
    """What an indexer said of a step's tokens: the rows [T, K] it chose (-1: none), in order, and their scores."""

    score: Tensor
    rows: Tensor
    mass: Tensor | None = None  # while gradients are on: attention that the rows got from all heads together [T, K]


class Indexer(nn.Module):
    """Lightning indexer: which compressed rows a query of a CSA layer reads."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.heads, self.width, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.numerics = numerics
        self.wq_b = Linear(self.heads * self.width, config.q_lora_rank)
        self.weights_proj = Linear(self.heads, config.hidden_size)
        self.compressor = Compressor(config, CSA_RATIO, self.width)

    def forward(
        self,
        q_TX: Tensor,
        kv_TE: Tensor,
        gate_TE: Tensor,
        weight_TH: Tensor,
        step: Step,
        turns: Rotations,
        cache: LayerCache,
    ) -> Choice:
        """The rows chosen; index -1 where fewer are visible.

        Args: the step's tokens by `wq_b` (from the query latent), by the compressor's `wkv` and `wgate`, and by
            `weights_proj`.
        """
        key_MC = self.compressor(kv_TE, gate_TE, step.emit(CSA_RATIO), turns.emitted, cache, "index_tail")
        if key_MC.shape[0]:
            key_MC = index_rows(key_MC, None, self.numerics.index)
        keys = cache.history("index_k", key_MC, step.emit(CSA_RATIO), CSA_RATIO)
        q_THC = index_rows(q_TX.view(-1, self.heads, self.width), turns.token, self.numerics.index)
        weight_TH = scaled(weight_TH, self.width**-0.5 * self.heads**-0.5)
        return Choice(*index_topk(q_THC, keys, weight_TH, step.visible_T(CSA_RATIO), step.layout, self.topk))


class Rotations(NamedTuple):
    """The turns a layer needs, as unit complex numbers: of the step's tokens, and of the rows its compressor emits."""

    token: Tensor
    emitted: Tensor | None


class Attention(nn.Module):
    """Window attention, joined by compressed rows where the layer has a ratio: CSA (4) or HCA (others)."""

    def __init__(self, config: ModelConfig, ratio: int, numerics: Numerics) -> None:
        super().__init__()
        self.ratio, self.numerics, self.window = ratio, numerics, config.sliding_window
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.groups, self.eps = config.o_groups, config.rms_norm_eps
        D, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.wq_a = Linear(config.q_lora_rank, D)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = Linear(inner, config.q_lora_rank)
        self.wkv = Linear(config.head_dim, D)
        self.kv_norm = RMSNorm(config.head_dim, self.eps)
        self.attn_sink = nn.Parameter(torch.empty(self.heads, device="meta"))
        self.wo_a = Weight(config.o_groups * config.o_lora_rank, inner // config.o_groups, parts=config.o_groups)
        self.wo_b = Linear(D, config.o_groups * config.o_lora_rank)
        # What reads the layer's input, and what reads the query latent: each of them together, as one operation.
        read, read_latent = [self.wq_a, self.wkv], [self.wq_b]
        if ratio:
            self.compressor = Compressor(config, ratio, config.head_dim, numerics.kv)
            read += [self.compressor.wkv, self.compressor.wgate]
        if ratio == CSA_RATIO:
            self.indexer = Indexer(config, numerics)
            read += [self.indexer.compressor.wkv, self.indexer.compressor.wgate, self.indexer.weights_proj]
            read_latent.append(self.indexer.wq_b)
        self._read, self._read_latent = tuple(read), tuple(read_latent)

    def forward(self, x_TD: Tensor, step: Step, turns: Rotations, cache: LayerCache, scores: list[Choice]) -> Tensor:
        """x [T, D] after its norm -> [T, D].  What the indexer chose is appended to `scores`."""
        latent_TL, row_TC, *inputs = linears(x_TD, [(w.value, w.prepare) for w in self._read])
        q_TX, *index_q = linears(
            latent_TL, [(w.value, w.prepare) for w in self._read_latent], self.q_norm.weight, self.eps
        )
        q_THC = norm_rope(q_TX.view(-1, self.heads, self.width), None, turns.token, self.eps)
        del q_TX  # a prompt's queries are large
        row_TC = norm_rope(row_TC, self.kv_norm.weight, turns.token, self.eps, self.numerics.kv)
        # As it will be read back: a span's own queries see what the spans after it will.
        row_TC = cache.stored(row_TC)

        near = step.window_index(self.window, cache.ring_rows)
        parts: list[tuple[RowSource, Tensor]] = [(cache.window(row_TC), near)]
        if self.ratio:
            kv_TE, gate_TE, *index_inputs = inputs
            rows = self._compressed(kv_TE, gate_TE, step, turns, cache)
            if self.ratio == CSA_RATIO:
                choice = self.indexer(*index_q, *index_inputs, step, turns, cache)
                parts.append((rows, choice.rows))
            else:
                parts.append((rows, step.all_rows(self.ratio)))
        if self.ratio == CSA_RATIO and torch.is_grad_enabled():
            o_THC, mass_TK = watched_attention(q_THC, parts, self.attn_sink, turns.token)
            choice = choice._replace(mass=mass_TK)
        else:
            o_THC = attention(q_THC, parts, self.attn_sink, turns.token)
        if self.ratio == CSA_RATIO:
            scores.append(choice)
        o_THC = o_THC.to(x_TD.dtype)
        del q_THC
        cache.keep_window(row_TC)  # after it was read: a long span overwrites what its own first queries need
        z_TGO = grouped_linear(o_THC.view(o_THC.shape[0], self.groups, -1), self.wo_a.value)
        return self.wo_b(z_TGO.flatten(1))  # type: ignore[no-any-return]

    def _compressed(self, kv_TE: Tensor, gate_TE: Tensor, step: Step, turns: Rotations, cache: LayerCache) -> RowSource:
        emit = step.emit(self.ratio)
        row_MC = self.compressor(kv_TE, gate_TE, emit, turns.emitted, cache, "tail")
        name = "csa_kv" if self.ratio == CSA_RATIO else "hca_kv"
        return cache.history(name, row_MC, emit, self.ratio)


class Gate(nn.Module):
    """Scores experts; chooses them by token id in hash layers, by score and balancing bias elsewhere."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.chosen, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, device="meta"))
        if hashed:
            self.register_buffer(
                "tid2eid", torch.empty(config.vocab_size, self.chosen, dtype=torch.int64, device="meta")
            )
        else:
            self.bias = nn.Parameter(torch.empty(config.n_routed_experts, device="meta"), requires_grad=False)
        self.hashed = hashed

    def forward(self, x_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """(expert [T, K], weight [T, K]); padding visits nobody."""
        choice = step.picked(self.tid2eid, "ids_T") if self.hashed else self.bias  # type: ignore[arg-type]
        return route(x_TD, self.weight, choice, self.chosen, self.scale, step.position_T)  # type: ignore[no-any-return]


class SharedExpert(nn.Module):
    """The expert every token visits, with weight 1; its gate and up branches are clamped like the others'."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.moe_intermediate_size, config.hidden_size)
        self.w3 = Linear(config.moe_intermediate_size, config.hidden_size)
        self.w2 = Linear(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x_TD: Tensor, onto_TD: Tensor | None = None) -> Tensor:
        """[T, D]; added to `onto_TD` where given."""
        if not self.w1.prepare is self.w3.prepare is self.w2.prepare:  # stored in different ways
            out_TD = self.w2(clamped_swiglu(self.w1(x_TD), self.w3(x_TD), self.limit))
            return out_TD if onto_TD is None else onto_TD + out_TD  # type: ignore[no-any-return]
        weights = ExpertWeights(self.w1.value, self.w3.value, self.w2.value, self.w1.prepare)
        return shared_expert(x_TD, weights, self.limit, onto_TD)  # type: ignore[no-any-return]


class MoE(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.gate = Gate(config, hashed)
        self.shared_experts = SharedExpert(config)

    def forward(self, x_TD: Tensor, step: Step, bank: ExpertBank, layer: str) -> Tensor:
        expert_TK, weight_TK = self.gate(x_TD, step)
        routed_TD = bank.run(layer, x_TD, expert_TK, weight_TK)
        return self.shared_experts(x_TD, routed_TD).to(x_TD.dtype)  # type: ignore[no-any-return]


class HyperConnection(nn.Module):
    """One sub-block's residual mixing: what it reads from the streams, and how it writes back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        J, D = config.hc_mult, config.hidden_size
        self.eps, self.hc_eps, self.iters = config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters
        self.fn = nn.Parameter(torch.empty((2 + J) * J, J * D, device="meta"))
        self.base = nn.Parameter(torch.empty((2 + J) * J, device="meta"))
        self.scale = nn.Parameter(torch.empty(3, device="meta"))

    def forward(self, streams_TJD: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
        """(input of the sub-block [T, D] after its norm, post [T, J], comb [T, J, J])."""
        return hyper_connection_in(  # type: ignore[no-any-return]
            streams_TJD, self.fn, self.base, self.scale, self.eps, self.hc_eps, self.iters, norm.weight
        )

    def turn(
        self, streams_TJD: Tensor, out_TD: Tensor, post_TJ: Tensor, comb_TJJ: Tensor, norm: RMSNorm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The streams after the sub-block before this one, and what `forward` says of them."""
        return hyper_connection_turn(  # type: ignore[no-any-return]
            streams_TJD, out_TD, post_TJ, comb_TJJ, self.fn, self.base, self.scale, self.eps, self.hc_eps, self.iters,
            norm.weight,
        )  # fmt: skip


class HeadCollapse(nn.Module):
    """The streams' weighted sum before the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.hc_eps = config.rms_norm_eps, config.hc_eps
        self.fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size, device="meta"))
        self.base = nn.Parameter(torch.empty(config.hc_mult, device="meta"))
        self.scale = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, streams_TJD: Tensor) -> Tensor:
        return hyper_connection_head(streams_TJD, self.fn, self.base, self.scale, self.eps, self.hc_eps)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention, then experts, each between two halves of a hyper-connection."""

    def __init__(self, config: ModelConfig, name: str, ratio: int, hashed: bool, numerics: Numerics) -> None:
        super().__init__()
        self.name, self.ratio = name, ratio
        self.attn = Attention(config, ratio, numerics)
        self.ffn = MoE(config, hashed)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_attn, self.hc_ffn = HyperConnection(config), HyperConnection(config)

    def forward(
        self,
        streams_TJD: Tensor,
        step: Step,
        turns: Rotations,
        cache: LayerCache,
        bank: ExpertBank,
        scores: list[Choice],
    ) -> Tensor:
        x_TD, post_TJ, comb_TJJ = self.hc_attn(streams_TJD, self.attn_norm)
        out_TD = self.attn(x_TD, step, turns, cache, scores)
        streams_TJD, x_TD, post_TJ, comb_TJJ = self.hc_ffn.turn(streams_TJD, out_TD, post_TJ, comb_TJJ, self.ffn_norm)
        out_TD = self.ffn(x_TD, step, bank, self.name)
        return hyper_connection_out(streams_TJD, out_TD, post_TJ, comb_TJJ)  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """Rotation angles: plain base for window-only layers, the compress base with YaRN for all others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.qk_rope_head_dim
        self.register_buffer("near", frequencies(config.rope_theta, dim, None), persistent=False)
        self.register_buffer("far", frequencies(config.compress_rope_theta, dim, config.rope_scaling), persistent=False)

    def forward(self, step: Step, ratios: set[int]) -> dict[int, Rotations]:
        """What the layers of each ratio need; a row is rotated at its window's first position."""
        near = rotation(self.near, step.position_T)  # type: ignore[arg-type]
        far = rotation(self.far, step.position_T) if ratios - {0} else near  # type: ignore[arg-type]
        return {
            r: Rotations(far, rotation(self.far, step.emit(r).end - (r - 1))) if r else Rotations(near, None)  # type: ignore[arg-type]
            for r in ratios
        }


class Trunk(NamedTuple):
    """What a forward over layers returns."""

    streams: Tensor  # [T, J, D] after the last layer run
    taps: dict[int, Tensor]  # layer -> streams after it, for the layers asked for
    scores: list[Choice]  # of each CSA layer run, in order


class DeepseekV4(nn.Module):
    """The network on the meta device; `model.build` gives it weights."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        self.embed = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, f"layers.{i}", ratio, config.is_hash(i), numerics)
            for i, ratio in enumerate(config.layer_ratios)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Weight(config.vocab_size, config.hidden_size)
        self.hc_head = HeadCollapse(config)
        self.bank = ExpertBank(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, config.swiglu_limit
        )
        self.rotary = Rotary(config)

    def embed_ids(self, ids_T: Tensor) -> Tensor:
        """Embedding rows [T, D], in float32 or wider."""
        rows_TD = dense_rows(self.embed.value, ids_T)
        return rows_TD.to(torch.promote_types(rows_TD.dtype, torch.float32))

    def forward(
        self,
        step: Step,
        streams: Tensor | None = None,
        layers: Sequence[int] | None = None,
        taps: Sequence[int] = (),
        cache: Sequence[LayerCache] | Mapping[int, LayerCache] | None = None,
    ) -> Trunk:
        """Run `layers` (all by default) over a step of ragged spans.

        Args:
            streams: [T, J, D] to start from (a pipeline stage, a layer-by-layer check); None: embed the ids.
            taps: layers after which the streams are kept in the result.
            cache: a view of each layer run, by its number; None: whole sequences from position 0, as in training.
        """
        layers = range(len(self.layers)) if layers is None else layers
        cache = fresh_layers(step, len(self.layers)) if cache is None else cache
        turns = self.rotary(step, {self.config.layer_ratios[i] for i in layers})
        if streams is None:
            streams = self.embed_ids(step.ids_T)[:, None].expand(-1, self.config.hc_mult, -1).contiguous()
        kept: dict[int, Tensor] = {}
        scores: list[Choice] = []
        for i in layers:
            block = self.layers[i]
            streams = block(streams, step, turns[block.ratio], cache[i], self.bank, scores)  # type: ignore[index,arg-type]
            if i in taps:
                kept[i] = streams
        return Trunk(streams, kept, scores)

    def logits(self, streams_NJD: Tensor) -> Tensor:
        """Logits [N, V] of the streams after the last layer, in promote(x, float32)."""
        (logits_NV,) = linears(
            self.hc_head(streams_NJD), [(self.head.value, self.head.prepare)], self.norm.weight, self.norm.eps
        )
        return logits_NV  # type: ignore[no-any-return]
