"""Opening by headers, and the strict report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pyrosome.checkpoint.index import CheckpointIndex, open_checkpoint
from pyrosome.errors import CheckpointError, MissingTensor, UnsupportedFormat, WrongShape
from tests.checkpoint.files import DATA, INDEX, SHARD, Entry, copied, read_entries, rewrite, split

SETS = [("golden/bf16", 1), ("golden/fp8fp4", 1), ("golden_dspark/bf16", 3), ("golden_dspark/fp8fp4", 2)]
BF16 = "golden/bf16"


def refused(index: CheckpointIndex, kind: type[CheckpointError], *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        index.check().raise_if_bad()
    assert type(caught.value) is kind
    assert all(words in str(caught.value) for words in said), str(caught.value)


def zeros(dtype: str, shape: tuple[int, ...], num_bytes: int) -> Entry:
    return dtype, shape, bytes(num_bytes)


@pytest.mark.parametrize(("name", "num_stages"), SETS)
def test_stored_checkpoints_are_sound(name: str, num_stages: int) -> None:
    index = open_checkpoint(DATA / name)
    entries = read_entries(DATA / name / SHARD)
    report = index.check()
    report.raise_if_bad()
    assert report.ok
    assert (index.num_stages, index.has_drafts) == (num_stages, True)
    assert index.path == DATA / name
    assert index.nbytes == sum(len(e[2]) for e in entries.values())
    assert {n: (t.dtype, t.shape) for n, t in index.tensors.items()} == {n: e[:2] for n, e in entries.items()}


@pytest.mark.parametrize("name", [n for n, _ in SETS])
def test_ranges_are_offsets_in_the_file(name: str) -> None:
    raw = (DATA / name / SHARD).read_bytes()
    entries = read_entries(DATA / name / SHARD)
    for tensor, info in open_checkpoint(DATA / name).tensors.items():
        assert raw[info.begin : info.end] == entries[tensor][2]


def test_num_weights_counts_packed_ones_singly() -> None:
    assert open_checkpoint(DATA / "golden/bf16").num_weights == 902_664
    entries = read_entries(DATA / "golden/fp8fp4" / SHARD)
    stored = sum(len(e[2]) * 2 for e in entries.values() if e[0] == "I8")
    assert open_checkpoint(DATA / "golden/fp8fp4").num_weights > stored


def test_single_file_with_its_configuration() -> None:
    index = open_checkpoint(DATA / BF16 / SHARD)
    assert index.path == DATA / BF16
    assert index.check().ok


@pytest.mark.parametrize("file", ["model.safetensors", "anything.safetensors"])
def test_one_shard_needs_no_index(tmp_path: Path, file: str) -> None:
    path = copied(tmp_path)
    (path / INDEX).unlink()
    (path / SHARD).rename(path / file)
    assert open_checkpoint(path).check().ok


def test_text_path(tmp_path: Path) -> None:
    assert open_checkpoint(str(DATA / BF16)).tensors.keys() == open_checkpoint(DATA / BF16).tensors.keys()


def test_shards(tmp_path: Path) -> None:
    path = copied(tmp_path)
    split(path, 4)
    index = open_checkpoint(path)
    assert index.check().ok
    assert len({t.file for t in index.tensors.values()}) == 4


def test_shards_that_are_links_into_a_store(tmp_path: Path) -> None:
    path = copied(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    for file in (SHARD, "config.json", INDEX):
        shutil.move(path / file, store / file)
        (path / file).symlink_to(Path("..") / "store" / file)
    assert open_checkpoint(path).check().ok


# Drafts.


@pytest.mark.parametrize(("name", "num_stages"), SETS)
def test_drafts_may_be_absent(tmp_path: Path, name: str, num_stages: int) -> None:
    path = copied(tmp_path, name)
    rewrite(path, dict.fromkeys(n for n in read_entries(path / SHARD) if n.startswith("mtp.")))
    index = open_checkpoint(path)
    assert (index.num_stages, index.has_drafts) == (0, False)
    assert index.check().ok


@pytest.mark.parametrize("gone", ["mtp.0.e_proj.weight", "mtp.0.norm.weight", "mtp.0.ffn.experts.3.w2.weight"])
def test_half_an_mtp_head(tmp_path: Path, gone: str) -> None:
    path = copied(tmp_path, BF16)
    rewrite(path, {gone: None})
    assert open_checkpoint(path).check().missing == (gone,)
    refused(open_checkpoint(path), MissingTensor, gone)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_dspark_without_one_of_its_stages(tmp_path: Path, stage: int) -> None:
    path = copied(tmp_path, "golden_dspark/bf16")
    rewrite(path, dict.fromkeys(n for n in read_entries(path / SHARD) if n.startswith(f"mtp.{stage}.")))
    refused(open_checkpoint(path), MissingTensor, "mtp.")


def test_dspark_stages_are_counted_from_tensors(tmp_path: Path) -> None:
    path = copied(tmp_path, "golden_dspark/bf16")
    config = json.loads((path / "config.json").read_text())
    config["compress_ratios"] = config["compress_ratios"][:3]
    (path / "config.json").write_text(json.dumps(config))
    index = open_checkpoint(path)
    assert (index.num_stages, index.check().ok) == (3, True)


def test_copies_of_embedding_and_head_are_ignored(tmp_path: Path) -> None:
    path = copied(tmp_path, BF16)
    entries = read_entries(path / SHARD)
    copies = {"mtp.0.emb.tok_emb.weight": entries["embed.weight"], "mtp.0.head.weight": entries["head.weight"]}
    rewrite(path, copies)
    report = open_checkpoint(path).check()
    assert report.ok
    assert set(report.ignored) == set(copies)


def test_copies_alone_are_no_draft_head(tmp_path: Path) -> None:
    path = copied(tmp_path, BF16)
    entries = read_entries(path / SHARD)
    gone = dict.fromkeys(n for n in entries if n.startswith("mtp."))
    rewrite(path, {**gone, "mtp.0.head.weight": entries["head.weight"]})
    index = open_checkpoint(path)
    assert not index.has_drafts
    assert index.check().ok


# What the report lists.


@pytest.mark.parametrize(
    "gone", ["embed.weight", "layers.1.attn.indexer.wq_b.weight", "layers.0.ffn.gate.tid2eid", "norm.weight"]
)
def test_missing(tmp_path: Path, gone: str) -> None:
    path = copied(tmp_path, BF16)
    rewrite(path, {gone: None})
    assert open_checkpoint(path).check().missing == (gone,)
    refused(open_checkpoint(path), MissingTensor, gone)


@pytest.mark.parametrize("weight", ["layers.1.attn.wq_a", "layers.1.ffn.experts.2.w3"])
def test_missing_scale(tmp_path: Path, weight: str) -> None:
    path = copied(tmp_path)
    rewrite(path, {f"{weight}.scale": None})
    refused(open_checkpoint(path), MissingTensor, f"{weight}.scale")


def test_unexpected(tmp_path: Path) -> None:
    path = copied(tmp_path, BF16)
    rewrite(
        path,
        {"layers.2.ffn.gate.bias_vl": zeros("F32", (8,), 32), "layers.6.attn_norm.weight": zeros("BF16", (64,), 128)},
    )
    index = open_checkpoint(path)
    assert set(index.check().unexpected) == {"layers.2.ffn.gate.bias_vl", "layers.6.attn_norm.weight"}
    refused(index, CheckpointError, "layers.2.ffn.gate.bias_vl")


def test_a_scale_without_a_quantised_weight_is_unexpected(tmp_path: Path) -> None:
    path = copied(tmp_path, BF16)
    rewrite(path, {"layers.0.attn.wq_a.scale": zeros("F8_E8M0", (1, 1), 1)})
    assert open_checkpoint(path).check().unexpected == ("layers.0.attn.wq_a.scale",)


def test_wrong_shape(tmp_path: Path) -> None:
    path = copied(tmp_path, BF16)
    rewrite(path, {"layers.0.attn.wkv.weight": zeros("BF16", (64, 80), 2 * 80 * 64)})
    refused(open_checkpoint(path), WrongShape, "layers.0.attn.wkv.weight", "[64, 80]", "[80, 64]")


def test_wrong_shape_of_a_scale(tmp_path: Path) -> None:
    path = copied(tmp_path)
    rewrite(path, {"layers.1.attn.wq_b.scale": ("F8_E8M0", (1, 3), b"\x7f" * 3)})
    refused(open_checkpoint(path), WrongShape, "layers.1.attn.wq_b.scale", "[1, 3]", "[3, 1]")


def test_weights_of_another_width(tmp_path: Path) -> None:
    path = copied(tmp_path, BF16)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 48}))
    refused(open_checkpoint(path), WrongShape, "[32, 64]", "[48, 64]")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("embed.weight", zeros("I32", (160, 64), 4 * 160 * 64)),
        ("layers.0.attn_norm.weight", zeros("F8_E4M3", (64,), 64)),
        ("layers.0.ffn.gate.tid2eid", zeros("F32", (160, 3), 4 * 480)),
        ("layers.0.attn.wq_a.weight", zeros("F8_E5M2", (48, 64), 48 * 64)),
    ],
)
def test_wrong_dtype(tmp_path: Path, name: str, entry: Entry) -> None:
    path = copied(tmp_path, BF16)
    rewrite(path, {name: entry})
    refused(open_checkpoint(path), UnsupportedFormat, name, entry[0])


def test_wrong_dtype_of_a_scale(tmp_path: Path) -> None:
    path = copied(tmp_path)
    rewrite(path, {"layers.1.attn.wq_a.scale": zeros("F32", (1, 1), 4)})
    refused(open_checkpoint(path), UnsupportedFormat, "layers.1.attn.wq_a.scale", "F32")


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    path = copied(tmp_path, BF16)
    rewrite(path, {"norm.weight": None, "stray": zeros("F32", (1,), 4), "hc_head_scale": zeros("F32", (2,), 8)})
    refused(open_checkpoint(path), MissingTensor, "norm.weight", "stray", "hc_head_scale")


def test_formats_are_told_by_the_tensors_not_by_the_configuration(tmp_path: Path) -> None:
    """Unquantised weights beside a configuration that says FP8 and FP4, and the other way round."""
    for name, other in (("golden/bf16", "golden/fp8fp4"), ("golden/fp8fp4", "golden/bf16")):
        path = copied(tmp_path / name, name)
        config = json.loads((path / "config.json").read_text())
        theirs = json.loads((DATA / other / "config.json").read_text())
        for key in ("expert_dtype", "quantization_config"):
            config.pop(key, None)
            if key in theirs:
                config[key] = theirs[key]
        (path / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(path).check().ok
