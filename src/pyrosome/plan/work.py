"""What one step has to read and to compute, part by part: bytes of weights, bytes of cached rows, FLOPs.

Shape letters: T tokens in the step, B sequences, E routed experts, k experts of a token, H heads, C head dim.
Source: model.md section 12 for FLOPs; planner.md section 3 for the experts that a batch touches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref

from pyrosome.cache.streams import layer_streams
from pyrosome.config import CSA_RATIO, ModelConfig
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout

# Kinds of arithmetic that run at rates of their own: FP8 matrices, FP4 experts, plain matrices (BF16 or float32),
# the float32 mixing of residual streams, attention over cached rows, scores of index keys.
GROUPS = ("matrices", "experts", "plain", "streams", "attention", "indexer")
PLAIN_DTYPES = ("BF16", "F16", "F32")
# Matrices that tensor parallelism cuts; the rest is whole on every rank, as in the official converted checkpoints.
SPLIT = (".wq_b.weight", ".wo_a.weight", ".wo_b.weight", ".weights_proj.weight")
SPLIT_PARTS = ("routed experts", "embedding", "head")
# Queries that share what is read of the cache in one pass: of the index keys, and of rows that neighbours read too.
INDEX_SHARING, ROW_SHARING, HEADS_SHARING = 16, 8, 128
LANES = 16  # heads that are computed together: fewer take as long
STREAM_PASSES = 6  # times that a sub-block reads or writes the residual streams of a token, both sub-blocks together
STREAM_BYTES = 4  # float32


@dataclasses.dataclass(frozen=True)
class Load:
    """One step: `tokens` of each of `sequences` spans, which stand at `context` tokens when the step begins."""

    sequences: int
    tokens: int  # 1: decoding; a few: verifying drafts
    context: int
    kv_format: str = "fp8"
    with_head: bool = True
    head_rows: int = 1  # tokens of each span whose logits are computed
    drafts: int = 0  # tokens of each sequence that the draft stage proposes after the step


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One part of a step on the busiest device."""

    part: str
    group: str  # one of GROUPS
    weight_bytes: float = 0.0
    row_bytes: float = 0.0  # cached rows
    stream_bytes: float = 0.0  # residual streams, in and out
    flops: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Matrices:
    """Weights of one part that are read and multiplied in the same way."""

    part: str
    group: str
    is_split: bool  # by tensor parallelism
    num_bytes: int
    numel: int


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a model's tensors add up to."""

    dense: tuple[Matrices, ...]  # of the trunk, without routed experts, embedding and tables
    draft: tuple[Matrices, ...]  # of the draft stages, likewise
    expert_bytes: float  # of one routed expert, the mean over the trunk's
    expert_numel: float
    moe_layers: int
    draft_layers: int


def weights_of(model: Model) -> Weights:
    """The sums over a model's tensors, kept as long as it lives: a checkpoint has tens of thousands."""
    known = _KNOWN.get(id(model))
    if known is None:
        known = _KNOWN[id(model)] = _added_up(model)
        weakref.finalize(model, _KNOWN.pop, id(model), None)
    return known


_KNOWN: dict[int, Weights] = {}


def _added_up(model: Model) -> Weights:
    sums: dict[tuple[bool, str, str, bool], list[int]] = {}
    experts = {True: [0, 0, 0], False: [0, 0, 0]}  # bytes, weights, tensors
    layers: dict[bool, set[int]] = {True: set(), False: set()}
    for t in model.held:
        is_draft = t.layer >= model.config.num_hidden_layers
        if t.expert >= 0:
            found = experts[is_draft]
            found[0], found[1], found[2] = found[0] + t.stored_bytes, found[1] + t.numel, found[2] + 1
            layers[is_draft].add(t.layer)
            continue
        if t.part == "embedding" or t.kind == "table":  # rows of them are looked up
            continue
        is_split = t.part in SPLIT_PARTS or t.name.endswith(SPLIT)
        kept = sums.setdefault((is_draft, t.part, _group(t.part, t.dtype), is_split), [0, 0])
        kept[0] += t.stored_bytes
        kept[1] += t.numel if len(t.shape) > 1 else 0  # vectors are read, not multiplied with
    num_bytes, numel, count = experts[False]
    made = {d: tuple(Matrices(p, g, s, *v) for (x, p, g, s), v in sums.items() if x is d) for d in (True, False)}
    per = max(count / 3, 1)
    return Weights(
        made[False], made[True], num_bytes / per, numel / per, len(layers[False]), len(layers[True])
    )  # fmt: skip


def _group(part: str, dtype: str) -> str:
    if part == "hyper-connections":
        return "streams"
    return "plain" if dtype in PLAIN_DTYPES else "matrices"


def touched(num_experts: int, chosen: int, tokens: float) -> float:
    """Experts that so many tokens visit in one layer, if each chooses evenly: E (1 - (1 - k/E)^T)."""
    missed: float = (1 - chosen / num_experts) ** tokens
    return num_experts * (1 - missed)


@functools.lru_cache(maxsize=4096)
def busiest(items: float, ranks: int) -> float:
    """The most that one of `ranks` gets of so many items dealt out by chance: the mean of the largest of Poissons."""
    if ranks == 1:
        return items
    mean = items / ranks
    at_most, term, expected = 0.0, math.exp(-mean), 0.0
    for n in range(math.ceil(items)):
        at_most += term
        expected += 1 - min(at_most, 1.0) ** ranks
        term *= mean / (n + 1)
    return max(expected, mean)


def work_of(model: Model, layout: Layout, load: Load) -> list[Work]:
    """The parts of a step on the device that has most of it.

    Ranks of a pipeline are taken together: a token goes through all of them.
    """
    config, weights = model.config, weights_of(model)
    own = -(-load.sequences // (layout.replicas * layout.layers))  # sequences of this device's step
    T = own * load.tokens
    rows = own * load.head_rows if load.with_head else 0
    found = [_dense(m, layout, rows if m.part == "head" else T) for m in weights.dense if m.part != "head" or rows]
    found.append(_experts("routed experts", config, layout, weights, weights.moe_layers, T))
    found.append(_streams(config, T))
    found += _attention(config, layout, load, own)
    if load.drafts and weights.draft:
        found += _draft_stage(config, layout, weights, own, load.drafts)
    return [w for w in found if w != Work(w.part, w.group)]


def _dense(m: Matrices, layout: Layout, T: float) -> Work:
    share = layout.tensor if m.is_split else 1
    return Work(m.part, m.group, weight_bytes=m.num_bytes / share, flops=2 * m.numel * T / share)


def _experts(part: str, config: ModelConfig, layout: Layout, weights: Weights, layers: int, T: float) -> Work:
    """Experts dealt out to ranks serve the tokens of all replicas that share them."""
    E, k = config.n_routed_experts, config.num_experts_per_tok
    together = T * (layout.replicas if layout.experts > 1 else 1)
    visited = busiest(touched(E, k, together), layout.experts)
    return Work(
        part, "experts", weight_bytes=layers * visited * weights.expert_bytes,
        flops=2 * layers * k * together * weights.expert_numel / layout.experts,
    )  # fmt: skip


def _streams(config: ModelConfig, T: float) -> Work:
    width = config.hc_mult * config.hidden_size * STREAM_BYTES
    return Work("hyper-connections", "streams", stream_bytes=config.num_hidden_layers * T * STREAM_PASSES * width)


def _attention(config: ModelConfig, layout: Layout, load: Load, own: int) -> list[Work]:
    """Cached rows that a step's tokens read, and the products with them; a rank has all rows and its share of heads."""
    H, C, T = config.num_attention_heads, config.head_dim, own * load.tokens
    middle = load.context + (load.tokens + 1) / 2  # tokens that a token of the step sees, itself included: the mean
    shared = min(ROW_SHARING, max(1, HEADS_SHARING // H), load.tokens)
    window = min(config.sliding_window, middle)
    sums: dict[str, list[float]] = {}

    def add(part: str, rows: float, row_bytes: int, sharing: int, ranks: int, flops: float = 0.0) -> None:
        lanes = -(-H * sharing // LANES) * LANES / sharing
        kept = sums.setdefault(part, [0.0, 0.0])
        kept[0] += T * rows * row_bytes / sharing / ranks
        kept[1] += T * (flops or 4 * lanes * C * rows) / ranks / layout.tensor  # a row's score and its part of the sum

    for ratio in config.layer_ratios:
        size = {s.name: s.row_bytes for s in layer_streams(config, ratio, load.kv_format)}
        add("window attention", window, size["window_kv"], shared, 1)
        if ratio == CSA_RATIO:
            keys, dim = middle / ratio, config.index_head_dim
            chosen = min(config.index_topk, keys)
            sharing = min(INDEX_SHARING, load.tokens)
            score = config.index_n_heads * (2 * dim + 3)  # of each head: the product, its relu, weight and sum
            add("indexer", keys, size["index_k"], sharing, layout.context, score * keys)
            add("CSA attention", chosen, size["csa_kv"], 1, layout.context)
        elif ratio:
            rows = middle / ratio
            add("HCA attention", rows, size["hca_kv"], shared, layout.context)
    group = {"indexer": "indexer"}
    return [Work(p, group.get(p, "attention"), row_bytes=b, flops=f) for p, (b, f) in sums.items()]


def _draft_stage(config: ModelConfig, layout: Layout, weights: Weights, own: int, drafts: int) -> list[Work]:
    """The stage and the head once for each draft, one after the other."""
    num_bytes = sum(m.num_bytes / (layout.tensor if m.is_split else 1) for m in weights.draft)
    numel = sum(m.numel / (layout.tensor if m.is_split else 1) for m in weights.draft)
    experts = _experts("draft head", config, layout, weights, weights.draft_layers, own)
    head = [_dense(m, layout, own) for m in weights.dense if m.part == "head"]
    num_bytes += experts.weight_bytes + sum(w.weight_bytes for w in head)
    flops = 2 * numel * own + experts.flops + sum(w.flops for w in head)
    return [Work("draft head", "matrices", weight_bytes=drafts * num_bytes, flops=drafts * flops)]
