"""Damaged, incomplete and absurd files: each is a specific error that says what was found and what to do next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.errors import CheckpointError, MissingTensor, TruncatedFile, UnsupportedFormat
from pyrosome.llm import load_model
from tests.checkpoint.files import INDEX, SHARD, copied, read_entries, rewrite, split, write_index, write_raw

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def use(path: Path | str) -> None:
    """Everything a load does."""
    index = open_checkpoint(path)
    index.check().raise_if_bad()
    for _ in read_tensors(index):
        pass


def refused(path: Path | str, kind: type[CheckpointError], *said: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        use(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert all(words in message for words in said), message
    return message


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return copied(tmp_path)


# Paths and names.


@pytest.mark.parametrize("path", ["/no/such/checkpoint", "no-such-model", "deepseek-ai/DeepSeek-V4-Flash", "a\0b"])
def test_no_such_path(path: str) -> None:
    refused(path, CheckpointError, path, "does not exist", "builtin:")


@pytest.mark.parametrize("name", ["builtin:no-such", "builtin:", "builtin:..", "builtin:../quant", "builtin:/etc"])
def test_no_such_builtin(name: str) -> None:
    refused(name, CheckpointError, name, "built in are")


def test_a_builtin_that_is_still_to_be_trained_says_how() -> None:
    refused("builtin:tiny", CheckpointError, "not trained yet", "pyrosome train tiny", "runs/tiny/fp8fp4")


def test_a_directory_without_a_configuration(golden: Path) -> None:
    (golden / "config.json").unlink()
    refused(golden, CheckpointError, "config.json")


def test_a_directory_without_weights(golden: Path) -> None:
    (golden / INDEX).unlink()
    (golden / SHARD).unlink()
    refused(golden, MissingTensor, "safetensors")


def test_several_files_and_no_index(golden: Path) -> None:
    split(golden, 3)
    (golden / INDEX).unlink()
    refused(golden, MissingTensor, INDEX, "3 .safetensors files")


def test_a_file_of_another_kind(golden: Path) -> None:
    other = golden / "pytorch_model.bin"
    other.write_bytes(b"PK")
    refused(other, CheckpointError, "pytorch_model.bin", ".safetensors")


def test_a_single_file_without_a_configuration(tmp_path: Path, golden: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (golden / SHARD).rename(alone / "model.safetensors")
    refused(alone / "model.safetensors", CheckpointError, "config.json")


def test_a_single_shard_of_several(golden: Path) -> None:
    files = split(golden, 3)
    refused(golden / files[1], MissingTensor, "embed.weight")


def test_a_link_to_itself(tmp_path: Path, golden: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(loop, CheckpointError, "loop")
    (golden / "config.json").unlink()
    (golden / "config.json").symlink_to("config.json")
    refused(golden, CheckpointError, "config.json")


# The index.


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"weight_map": []}', b'{"weight_map": {}}', b"{}"],
)
def test_an_index_that_is_none(golden: Path, text: bytes) -> None:
    (golden / INDEX).write_bytes(text)
    refused(golden, CheckpointError, INDEX)


@pytest.mark.parametrize("shard", [None, 1, ["a.safetensors"], {}, True])
def test_a_shard_that_is_no_name(golden: Path, shard: Any) -> None:
    write_index(golden, {"embed.weight": shard})
    refused(golden, CheckpointError, INDEX)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/etc/a.safetensors",
        "a/../../outside.safetensors",
        INDEX,
        "config.json",
        ".",
        "..",
        "",
        "a\0.safetensors",
    ],
)
def test_a_shard_that_points_elsewhere(golden: Path, shard: str) -> None:
    write_index(golden, {"embed.weight": shard})
    refused(golden, CheckpointError)


def test_a_shard_that_is_a_directory(golden: Path) -> None:
    (golden / SHARD).unlink()
    (golden / SHARD).mkdir()
    refused(golden, CheckpointError, SHARD)


def test_a_shard_that_links_to_itself(golden: Path) -> None:
    (golden / SHARD).unlink()
    (golden / SHARD).symlink_to(SHARD)
    refused(golden, CheckpointError, SHARD)


def test_shards_that_link_to_each_other(golden: Path) -> None:
    names = split(golden, 2)
    for name, other in zip(names, reversed(names), strict=True):
        (golden / name).unlink()
        (golden / name).symlink_to(other)
    refused(golden, CheckpointError, names[0])


def test_a_link_to_nothing(golden: Path) -> None:
    (golden / SHARD).unlink()
    (golden / SHARD).symlink_to("gone")
    refused(golden, MissingTensor, SHARD)


def test_a_pipe_is_not_waited_for(golden: Path) -> None:
    (golden / SHARD).unlink()
    os.mkfifo(golden / SHARD)
    refused(golden, CheckpointError, SHARD)


def test_a_missing_shard(golden: Path) -> None:
    names = split(golden, 4)
    (golden / names[2]).unlink()
    refused(golden, MissingTensor, names[2])


def test_the_same_tensor_in_two_shards(golden: Path) -> None:
    names = split(golden, 2)
    first, second = (read_entries(golden / n) for n in names)
    twice = next(iter(first))
    rewrite(golden, {**second, twice: first[twice]}, file=names[1])
    write_index(golden, {**dict.fromkeys(first, names[0]), **dict.fromkeys(second, names[1])})
    refused(golden, CheckpointError, twice, "two shards")


def test_one_shard_under_two_names(golden: Path) -> None:
    (golden / "b.safetensors").symlink_to(SHARD)
    write_index(golden, {"embed.weight": SHARD, "head.weight": "b.safetensors"})
    refused(golden, CheckpointError, "two shards")


def test_an_index_of_another_download(golden: Path) -> None:
    names = split(golden, 2)
    first, second = (read_entries(golden / n) for n in names)
    write_index(golden, {**dict.fromkeys(first, names[1]), **dict.fromkeys(second, names[0])})
    refused(golden, MissingTensor, INDEX, names[1])


def test_a_tensor_only_the_index_knows(golden: Path) -> None:
    entries = read_entries(golden / SHARD)
    write_index(golden, dict.fromkeys([*entries, "layers.0.attn.extra"], SHARD))
    refused(golden, MissingTensor, "layers.0.attn.extra")


# Headers.


@pytest.mark.parametrize("text", [b"", b"1234567"])
def test_a_file_too_short_for_a_length(golden: Path, text: bytes) -> None:
    (golden / SHARD).write_bytes(text)
    assert SHARD in refused_somehow(golden)


def refused_somehow(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        use(path)
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 2**40, 2**63, 2**64 - 1])
def test_an_absurd_header_length(golden: Path, length: int) -> None:
    write_raw(golden / SHARD, {"a": ONE}, bytes(4), length=length)
    assert SHARD in refused_somehow(golden)


def test_a_header_longer_than_the_file(golden: Path) -> None:
    write_raw(golden / SHARD, {"a": ONE}, length=5000)
    refused(golden, TruncatedFile, "5008", str((golden / SHARD).stat().st_size))


def test_a_file_cut_within_its_header(golden: Path) -> None:
    raw = (golden / SHARD).read_bytes()
    (golden / SHARD).write_bytes(raw[:1000])
    refused(golden, TruncatedFile, "1000", str(8 + int.from_bytes(raw[:8], "little")))


@pytest.mark.parametrize("text", [b"not json", b"{", b"[]", b"3", b'{"a": 1}', b"\xff" * 16, b"[" * 100_000])
def test_a_header_that_is_none(golden: Path, text: bytes) -> None:
    write_raw(golden / SHARD, text)
    refused(golden, CheckpointError, SHARD)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [1], "data_offsets": [0, 4]},
        {**ONE, "shape": [-1]},
        {**ONE, "shape": [True]},
        {**ONE, "shape": [1.0]},
        {**ONE, "shape": "1"},
        {**ONE, "shape": None},
        {**ONE, "shape": [10**4000] * 3},  # whose product is too long a number to be written
        {**ONE, "shape": [2**62] * 300},
        {**ONE, "data_offsets": [4]},
        {**ONE, "data_offsets": [4, 0]},
        {**ONE, "data_offsets": [-4, 0]},
        {**ONE, "data_offsets": [0, 8]},
        {**ONE, "data_offsets": [0, "4"]},
        {**ONE, "shape": [2]},
        {**ONE, "shape": [2**62, 2**62]},
        [],
        None,
    ],
)
def test_a_malformed_entry(golden: Path, entry: Any) -> None:
    write_raw(golden / SHARD, {"the.tensor": entry}, bytes(8))
    write_index(golden, {"the.tensor": SHARD})
    refused(golden, CheckpointError, "the.tensor", SHARD)


@pytest.mark.parametrize("dtype", ["F4", "Q4_K", "f32", "", None, 32, ["F32"], {}])
def test_an_unknown_dtype(golden: Path, dtype: Any) -> None:
    write_raw(golden / SHARD, {"the.tensor": {**ONE, "dtype": dtype}}, bytes(4))
    write_index(golden, {"the.tensor": SHARD})
    with pytest.raises(CheckpointError, match=r"the\.tensor") as caught:
        use(golden)
    if isinstance(dtype, str):
        assert isinstance(caught.value, UnsupportedFormat)
        assert repr(dtype) in str(caught.value)


def test_overlapping_tensors(golden: Path) -> None:
    write_raw(golden / SHARD, {"a": ONE, "b": {**ONE, "data_offsets": [2, 6]}}, bytes(8))
    write_index(golden, {"a": SHARD, "b": SHARD})
    refused(golden, CheckpointError, "a", "b", SHARD)


def test_two_names_for_the_same_bytes(golden: Path) -> None:
    write_raw(golden / SHARD, {"a": ONE, "b": ONE}, bytes(4))
    write_index(golden, {"a": SHARD, "b": SHARD})
    refused(golden, CheckpointError, "a", "b", SHARD)


# Data.


@pytest.mark.parametrize("gone", [1, 1000, 1_900_000])
def test_a_truncated_shard(golden: Path, gone: int) -> None:
    whole = (golden / SHARD).stat().st_size
    os.truncate(golden / SHARD, whole - gone)
    refused(golden, TruncatedFile, str(whole), str(whole - gone), SHARD)


def test_a_shard_cut_after_it_was_opened(golden: Path) -> None:
    index = open_checkpoint(golden)
    os.truncate(golden / SHARD, (golden / SHARD).stat().st_size - 8192)
    with pytest.raises(TruncatedFile, match=SHARD):
        list(read_tensors(index))


def test_a_shard_removed_after_it_was_opened(golden: Path) -> None:
    index = open_checkpoint(golden)
    (golden / SHARD).unlink()
    with pytest.raises(CheckpointError, match=SHARD):
        list(read_tensors(index))


@pytest.mark.parametrize(
    ("scale", "at"),
    [
        ("layers.1.attn.wq_b.scale", (2, 0)),
        ("layers.2.ffn.experts.3.w2.scale", (77, 3)),
        ("mtp.0.h_proj.scale", (0, 0)),
    ],
)
def test_a_scale_that_is_no_number(golden: Path, scale: str, at: tuple[int, int]) -> None:
    dtype, shape, data = read_entries(golden / SHARD)[scale]
    spoilt = bytearray(data)
    spoilt[at[0] * shape[1] + at[1]] = 255
    rewrite(golden, {scale: (dtype, shape, bytes(spoilt))})
    refused(golden, CheckpointError, scale, str(at), "1 in all")


def test_a_repaired_file_reads_anew(golden: Path) -> None:
    """A read that failed half-way leaves nothing behind that a later read of the same path would see."""
    name = "layers.1.attn.wq_b.scale"
    sound = read_entries(golden / SHARD)
    dtype, shape, data = sound[name]
    rewrite(golden, {name: (dtype, shape, b"\xff" * len(data))})
    refused(golden, CheckpointError, name)
    (golden / SHARD).unlink()
    rewrite_from(golden, sound)
    use(golden)


def rewrite_from(directory: Path, entries: dict[str, Any]) -> None:
    write_raw(directory / SHARD, {})
    rewrite(directory, entries)


@pytest.mark.parametrize("expert", [-1, 4, 2**40])
def test_a_table_that_names_an_expert_there_is_not(golden: Path, expert: int) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    dtype, shape, data = read_entries(golden / SHARD)[name]
    rewrite(golden, {name: (dtype, shape, data[:80] + expert.to_bytes(8, "little", signed=True) + data[88:])})
    with pytest.raises(CheckpointError, match=rf"{name}.*{expert}.*0 to 3"):
        load_model(golden)


def test_a_name_nobody_has(golden: Path) -> None:
    with pytest.raises(MissingTensor, match="no such tensor"):
        list(read_tensors(open_checkpoint(golden), ["no such tensor"]))


# Configuration and weights of different models.


def test_another_architecture(golden: Path) -> None:
    config = json.loads((golden / "config.json").read_text())
    (golden / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v41"}))
    refused(golden, UnsupportedFormat, "V4.1")


def test_stages_without_dspark_keys(tmp_path: Path) -> None:
    path = copied(tmp_path / "dspark", "golden_dspark/bf16")
    config = {k: v for k, v in json.loads((path / "config.json").read_text()).items() if not k.startswith("dspark_")}
    config["compress_ratios"] = config["compress_ratios"][:4]
    (path / "config.json").write_text(json.dumps(config))
    refused(path, CheckpointError, "dspark")


@pytest.mark.parametrize("stage", ["mtp.7.", "mtp.123456789."])
def test_a_stage_far_away(tmp_path: Path, stage: str) -> None:
    path = copied(tmp_path / "dspark", "golden_dspark/bf16")
    rewrite(path, {f"{stage}norm.weight": ("BF16", (64,), bytes(128))})
    assert "mtp." in refused_somehow(path)
