"""Every tensor a configuration implies: one inventory for the loader, the writer and the planner.

Shapes are logical (outputs, inputs), whatever the storage.  Nothing here needs torch.
Source: the official checkpoints' headers; the inventory reproduces V4-Flash-0731 to the byte.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from pyrosome.config import CSA_RATIO, ModelConfig

Kind = Literal["matrix", "expert", "plain", "router", "vector", "f32", "table"]
# matrix: FP8 with .scale, or plain | expert: FP4 or FP8 with .scale, or plain | plain: a matrix never quantised
# router: a plain matrix that is float32 once loaded | vector: BF16 or F32 | f32: float32 as it is | table: integers

IGNORED = ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")  # copies of the trunk's embedding and head
_FLOATS = frozenset({"BF16", "F32", "F16"})
ALLOWED_DTYPES: dict[Kind, frozenset[str]] = {
    "matrix": _FLOATS | {"F8_E4M3"},
    "expert": _FLOATS | {"F8_E4M3", "I8"},
    "plain": _FLOATS,
    "router": _FLOATS,
    "vector": _FLOATS,
    "f32": _FLOATS,
    "table": frozenset({"I64", "I32"}),
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's logical shape, and how it may be stored."""

    shape: tuple[int, ...]
    kind: Kind


def expected_tensors(config: ModelConfig, num_stages: int = 0) -> dict[str, TensorSpec]:
    """Trunk, and `num_stages` draft stages (one MTP stage, or the DSpark stages a 0731 checkpoint has)."""
    c = config
    names = {
        "embed.weight": TensorSpec((c.vocab_size, c.hidden_size), "plain"),
        "head.weight": TensorSpec((c.vocab_size, c.hidden_size), "plain"),
        "norm.weight": TensorSpec((c.hidden_size,), "vector"),
        **_collapse(c, ""),
    }
    for i, ratio in enumerate(c.layer_ratios):
        names.update(_block(c, f"layers.{i}.", ratio, c.is_hash(i)))
    for i in range(num_stages):
        names.update(_block(c, f"mtp.{i}.", 0, False))
    if num_stages and c.dspark:
        names.update(_dspark(c, num_stages))
    elif num_stages:
        names.update(_mtp(c))
    return names


def _collapse(c: ModelConfig, prefix: str) -> dict[str, TensorSpec]:
    J = c.hc_mult
    return {
        f"{prefix}hc_head_fn": TensorSpec((J, J * c.hidden_size), "f32"),
        f"{prefix}hc_head_base": TensorSpec((J,), "f32"),
        f"{prefix}hc_head_scale": TensorSpec((1,), "f32"),
    }


def _block(c: ModelConfig, p: str, ratio: int, hashed: bool) -> dict[str, TensorSpec]:
    D, C, J, inner = c.hidden_size, c.head_dim, c.hc_mult, c.num_attention_heads * c.head_dim
    out = {f"{p}attn_norm.weight": TensorSpec((D,), "vector"), f"{p}ffn_norm.weight": TensorSpec((D,), "vector")}
    for part in ("attn", "ffn"):
        out[f"{p}hc_{part}_fn"] = TensorSpec(((2 + J) * J, J * D), "f32")
        out[f"{p}hc_{part}_base"] = TensorSpec(((2 + J) * J,), "f32")
        out[f"{p}hc_{part}_scale"] = TensorSpec((3,), "f32")
    a = f"{p}attn."
    out |= {
        f"{a}attn_sink": TensorSpec((c.num_attention_heads,), "f32"),
        f"{a}wq_a.weight": TensorSpec((c.q_lora_rank, D), "matrix"),
        f"{a}q_norm.weight": TensorSpec((c.q_lora_rank,), "vector"),
        f"{a}wq_b.weight": TensorSpec((inner, c.q_lora_rank), "matrix"),
        f"{a}wkv.weight": TensorSpec((C, D), "matrix"),
        f"{a}kv_norm.weight": TensorSpec((C,), "vector"),
        f"{a}wo_a.weight": TensorSpec((c.o_groups * c.o_lora_rank, inner // c.o_groups), "matrix"),
        f"{a}wo_b.weight": TensorSpec((D, c.o_groups * c.o_lora_rank), "matrix"),
    }
    if ratio:
        out |= _compressor(c, f"{a}compressor.", ratio, C)
    if ratio == CSA_RATIO:
        heads, dim = c.index_n_heads, c.index_head_dim
        out[f"{a}indexer.wq_b.weight"] = TensorSpec((heads * dim, c.q_lora_rank), "matrix")
        out[f"{a}indexer.weights_proj.weight"] = TensorSpec((heads, D), "plain")
        out |= _compressor(c, f"{a}indexer.compressor.", ratio, dim)
    f = f"{p}ffn."
    out[f"{f}gate.weight"] = TensorSpec((c.n_routed_experts, D), "router")
    if hashed:
        out[f"{f}gate.tid2eid"] = TensorSpec((c.vocab_size, c.num_experts_per_tok), "table")
    else:
        out[f"{f}gate.bias"] = TensorSpec((c.n_routed_experts,), "f32")
    width = c.moe_intermediate_size
    experts: dict[str, Kind] = {"shared_experts.": "matrix"}
    experts |= {f"experts.{e}.": "expert" for e in range(c.n_routed_experts)}
    for name, kind in experts.items():
        out[f"{f}{name}w1.weight"] = TensorSpec((width, D), kind)
        out[f"{f}{name}w3.weight"] = TensorSpec((width, D), kind)
        out[f"{f}{name}w2.weight"] = TensorSpec((D, width), kind)
    return out


def _compressor(c: ModelConfig, p: str, ratio: int, width: int) -> dict[str, TensorSpec]:
    projected = 2 * width if ratio == CSA_RATIO else width
    return {
        f"{p}wkv.weight": TensorSpec((projected, c.hidden_size), "plain"),
        f"{p}wgate.weight": TensorSpec((projected, c.hidden_size), "plain"),
        f"{p}ape": TensorSpec((ratio, projected), "f32"),
        f"{p}norm.weight": TensorSpec((width,), "vector"),
    }


def _mtp(c: ModelConfig) -> dict[str, TensorSpec]:
    D, p = c.hidden_size, "mtp.0."
    return {
        f"{p}e_proj.weight": TensorSpec((D, D), "matrix"),
        f"{p}h_proj.weight": TensorSpec((D, D), "matrix"),
        **{f"{p}{n}.weight": TensorSpec((D,), "vector") for n in ("enorm", "hnorm", "norm")},
        **_collapse(c, p),
    }


def _dspark(c: ModelConfig, num_stages: int) -> dict[str, TensorSpec]:
    assert c.dspark is not None
    D, rank, last = c.hidden_size, c.dspark.markov_rank, f"mtp.{num_stages - 1}."
    return {
        "mtp.0.main_proj.weight": TensorSpec((D, len(c.dspark.target_layer_ids) * D), "matrix"),
        "mtp.0.main_norm.weight": TensorSpec((D,), "vector"),
        f"{last}norm.weight": TensorSpec((D,), "vector"),
        **_collapse(c, last),
        f"{last}markov_head.markov_w1.weight": TensorSpec((c.vocab_size, rank), "plain"),
        f"{last}markov_head.markov_w2.weight": TensorSpec((c.vocab_size, rank), "plain"),
        f"{last}confidence_head.proj.weight": TensorSpec((1, D + rank), "plain"),
    }


def official_storage(config: ModelConfig, num_stages: int = 0) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, stored shape) of every tensor, scales included, as the official checkpoints store them.

    Experts are FP4 where the configuration says so and FP8 otherwise; projections FP8; the rest as it is.
    """
    for name, spec in expected_tensors(config, num_stages).items():
        quantised = config.quantization is not None
        n, k = spec.shape[0], spec.shape[-1]
        if spec.kind == "expert" and quantised and config.expert_dtype == "fp4":
            yield name, "I8", (n, k // 2)
            yield scale_name(name), "F8_E8M0", (n, -(-k // 32))
        elif spec.kind in ("matrix", "expert") and quantised:
            yield name, "F8_E4M3", spec.shape
            yield scale_name(name), "F8_E8M0", (-(-n // 128), -(-k // 128))
        else:
            yield name, {"f32": "F32", "table": "I64"}.get(spec.kind, "BF16"), spec.shape


DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


def official_bytes(config: ModelConfig, num_stages: int = 0) -> int:
    """Payload bytes of an official checkpoint of this configuration."""
    return sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in official_storage(config, num_stages))


def scale_name(weight_name: str) -> str:
    """Where the scale of a quantised weight is kept."""
    return weight_name.removesuffix(".weight") + ".scale"
