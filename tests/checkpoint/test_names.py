"""The inventory, against what is published and against the stored checkpoints' own headers."""

from __future__ import annotations

import math

import pytest

from pyrosome.checkpoint.names import expected_tensors, official_bytes, official_storage, scale_name
from pyrosome.config import DSparkConfig, ModelConfig
from tests.checkpoint.files import DATA, SHARD, read_entries

SETS = [("golden/bf16", 1), ("golden/fp8fp4", 1), ("golden_dspark/bf16", 3), ("golden_dspark/fp8fp4", 2)]


def flash_0731() -> ModelConfig:
    """V4-Flash-0731's config.json: the preview's, with a DSpark head of three stages."""
    ratios = (*ModelConfig.preset("flash").compress_ratios, 0, 0)
    return ModelConfig.preset("flash", compress_ratios=ratios, dspark=DSparkConfig(5, 128799, (40, 41, 42), 256))


def num_parameters(config: ModelConfig, num_stages: int) -> int:
    specs = expected_tensors(config, num_stages).values()
    return sum(math.prod(s.shape) for s in specs if s.kind != "table")


def test_published_inventory_to_the_byte() -> None:
    config = flash_0731()
    assert len(config.compress_ratios) == 46
    assert len(list(official_storage(config, 3))) == 72_317
    assert official_bytes(config, 3) == 166_878_536_440


def test_published_parameter_counts() -> None:
    flash, pro = ModelConfig.preset("flash"), ModelConfig.preset("pro")
    assert num_parameters(flash, 0) == 284_332_240_471
    assert num_parameters(flash, 1) - num_parameters(flash, 0) == 6_610_048_891
    assert num_parameters(flash_0731(), 3) - num_parameters(flash_0731(), 0) == 19_845_850_983
    assert num_parameters(pro, 0) == 1_572_997_201_763


def test_published_scales() -> None:
    scales = [math.prod(s) for n, d, s in official_storage(ModelConfig.preset("flash"), 0) if d == "F8_E8M0"]
    assert sum(scales) == 8_657_400_960


@pytest.mark.parametrize(("name", "num_stages"), SETS)
def test_stored_checkpoints_hold_exactly_the_inventory(name: str, num_stages: int) -> None:
    config = ModelConfig.from_json(DATA / name / "config.json")
    entries = read_entries(DATA / name / SHARD)
    assert {n: (d, s) for n, d, s in official_storage(config, num_stages)} == {n: e[:2] for n, e in entries.items()}
    assert official_bytes(config, num_stages) == sum(len(e[2]) for e in entries.values())


def test_base_release_has_fp8_experts() -> None:
    stored = {n: (d, s) for n, d, s in official_storage(ModelConfig.preset("flash", expert_dtype=None), 0)}
    assert stored["layers.5.ffn.experts.255.w2.weight"] == ("F8_E4M3", (4096, 2048))
    assert stored["layers.5.ffn.experts.255.w2.scale"] == ("F8_E8M0", (32, 16))


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "scale"),
    [
        ("embed.weight", "BF16", (129280, 4096), None),
        ("layers.0.ffn.gate.tid2eid", "I64", (129280, 6), None),
        ("layers.3.ffn.gate.bias", "F32", (256,), None),
        ("layers.3.attn.compressor.ape", "F32", (128, 512), None),
        ("layers.2.attn.compressor.wkv.weight", "BF16", (1024, 4096), None),
        ("layers.2.attn.indexer.wq_b.weight", "F8_E4M3", (8192, 1024), (64, 8)),
        ("layers.2.attn.indexer.compressor.norm.weight", "BF16", (128,), None),
        ("layers.42.attn.wo_a.weight", "F8_E4M3", (8192, 4096), (64, 32)),
        ("layers.42.attn.wq_b.weight", "F8_E4M3", (32768, 1024), (256, 8)),
        ("layers.42.ffn.experts.7.w1.weight", "I8", (2048, 2048), (2048, 128)),
        ("layers.42.ffn.experts.7.w2.weight", "I8", (4096, 1024), (4096, 64)),
        ("layers.42.hc_ffn_fn", "F32", (24, 16384), None),
        ("mtp.0.main_proj.weight", "F8_E4M3", (4096, 12288), (32, 96)),
        ("mtp.2.markov_head.markov_w2.weight", "BF16", (129280, 256), None),
        ("mtp.2.confidence_head.proj.weight", "BF16", (1, 4352), None),
        ("mtp.2.hc_head_fn", "F32", (4, 16384), None),
    ],
)
def test_published_shapes(name: str, dtype: str, shape: tuple[int, ...], scale: tuple[int, ...] | None) -> None:
    stored = {n: (d, s) for n, d, s in official_storage(flash_0731(), 3)}
    assert stored[name] == (dtype, shape)
    assert stored.get(scale_name(name)) == (scale and ("F8_E8M0", scale))


def test_what_is_not_there() -> None:
    names = set(expected_tensors(flash_0731(), 3))
    assert not any(
        n.startswith(("layers.0.attn.compressor", "layers.3.attn.indexer", "mtp.0.attn.compressor")) for n in names
    )
    assert (
        not {"layers.0.ffn.gate.bias", "layers.3.ffn.gate.tid2eid", "mtp.0.e_proj.weight", "mtp.1.norm.weight"} & names
    )
    assert {n for n in names if n.startswith("mtp.")} & set(expected_tensors(flash_0731(), 0)) == set()
