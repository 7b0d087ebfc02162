"""Weights from files: the right bytes, one tensor for a weight and its scale, and no more memory than promised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.config import ModelConfig
from pyrosome.errors import MissingTensor
from pyrosome.quant import QuantTensor
from tests.checkpoint.files import DATA, SHARD, copied, random_checkpoint, read_entries, rewrite, split

SETS = ["golden/bf16", "golden/fp8fp4", "golden_dspark/bf16", "golden_dspark/fp8fp4"]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("num_shards", [1, 5])
def test_every_byte(tmp_path: Path, name: str, num_shards: int) -> None:
    path = copied(tmp_path, name)
    entries = read_entries(path / SHARD)
    if num_shards > 1:
        split(path, num_shards)
    seen: set[str] = set()
    for weight, value in read_tensors(open_checkpoint(path)):
        dtype, shape, data = entries[weight]
        seen.add(weight)
        if isinstance(value, QuantTensor):
            scale = weight.removesuffix("weight") + "scale"
            seen.add(scale)
            assert value.format == {"I8": "fp4", "F8_E4M3": "fp8"}[dtype]
            assert (raw(value.data), raw(value.scale)) == (data, entries[scale][2])
            assert value.data.shape == shape
        else:
            assert raw(value) == data
            assert value.shape == shape
    assert seen == set(entries)


def test_agrees_with_another_reader() -> None:
    theirs = safe_open(DATA / "golden/bf16" / SHARD, "pt")
    for name, value in read_tensors(open_checkpoint(DATA / "golden/bf16")):
        assert isinstance(value, torch.Tensor)
        expected = theirs.get_tensor(name)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_a_scale_in_another_shard(tmp_path: Path) -> None:
    path = copied(tmp_path)
    entries = read_entries(path / SHARD)
    split(path, 3, apart=["wq_a.scale", "experts.1.w2.scale"])
    index = open_checkpoint(path)
    weight, scale = "layers.1.attn.wq_a.weight", "layers.1.attn.wq_a.scale"
    assert index.tensors[weight].file != index.tensors[scale].file
    values = dict(read_tensors(index))
    assert isinstance(values[weight], QuantTensor)
    assert raw(values[weight].scale) == entries[scale][2]


def test_unaligned_tensors(tmp_path: Path) -> None:
    path = copied(tmp_path, "golden/bf16")
    first = "a.stray"
    entries = read_entries(path / SHARD)
    rewrite(path, dict.fromkeys(entries))
    rewrite(path, {first: ("U8", (1,), b"x"), **entries})
    index = open_checkpoint(path)
    assert index.tensors["embed.weight"].begin % 2 == 1
    for name, value in read_tensors(index, [n for n in index.tensors if n != first]):
        assert isinstance(value, torch.Tensor)
        assert raw(value) == entries[name][2]


def test_some_names() -> None:
    index = open_checkpoint(DATA / "golden/fp8fp4")
    asked = ["layers.1.attn.wq_a.weight", "layers.1.attn.wq_a.scale", "norm.weight"]
    values = dict(read_tensors(index, asked))
    assert set(values) == {"layers.1.attn.wq_a.weight", "norm.weight"}
    assert isinstance(values["layers.1.attn.wq_a.weight"], QuantTensor)
    only_weight = dict(read_tensors(index, ["layers.1.attn.wq_a.weight"]))
    assert isinstance(only_weight["layers.1.attn.wq_a.weight"], QuantTensor)
    assert list(read_tensors(index, [])) == []


def test_ignored_copies_are_not_read(tmp_path: Path) -> None:
    path = copied(tmp_path, "golden/bf16")
    entries = read_entries(path / SHARD)
    rewrite(path, {"mtp.0.head.weight": entries["head.weight"]})
    assert dict(read_tensors(open_checkpoint(path))).keys() == entries.keys()


def test_progress(tmp_path: Path) -> None:
    path = copied(tmp_path)
    files = split(path, 3)
    index = open_checkpoint(path)
    told: list[tuple[int, int, str]] = []
    for _ in read_tensors(index, progress=lambda *call: told.append(call)):
        pass
    assert [name for *_, name in told] == files
    assert {total for _, total, _ in told} == {index.nbytes}
    assert [done for done, *_ in told] == sorted({done for done, *_ in told})
    assert told[-1][0] == index.nbytes


def test_progress_of_a_part(tmp_path: Path) -> None:
    index = open_checkpoint(DATA / "golden/fp8fp4")
    told: list[tuple[int, int, str]] = []
    asked = ["layers.1.attn.wq_a.weight", "layers.1.attn.wq_a.scale"]
    list(read_tensors(index, asked, progress=lambda *call: told.append(call)))
    assert told == [(128 * 128 + 1, 128 * 128 + 1, SHARD)]


def test_writing_to_a_tensor_changes_no_file(tmp_path: Path) -> None:
    path = copied(tmp_path, "golden/bf16")
    before = (path / SHARD).read_bytes()
    for _, value in read_tensors(open_checkpoint(path)):
        assert isinstance(value, torch.Tensor)
        value.zero_()
    assert (path / SHARD).read_bytes() == before


def test_values_outlive_the_reader(tmp_path: Path) -> None:
    path = copied(tmp_path, "golden/bf16")
    entries = read_entries(path / SHARD)
    kept = dict(read_tensors(open_checkpoint(path)))
    (path / SHARD).unlink()
    assert all(raw(value) == entries[name][2] for name, value in kept.items() if isinstance(value, torch.Tensor))


def test_missing_scale_without_a_check_first(tmp_path: Path) -> None:
    path = copied(tmp_path)
    rewrite(path, {"layers.1.ffn.experts.2.w3.scale": None})
    with pytest.raises(MissingTensor, match=r"layers\.1\.ffn\.experts\.2\.w3"):
        list(read_tensors(open_checkpoint(path)))


# Memory, measured in a process of its own: VmHWM is the most it ever held, mapped pages included.

MEASURE = """
import sys, torch
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.quant import QuantTensor

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

index, kept, keep = open_checkpoint(sys.argv[1]), [], sys.argv[2] == "keep"
torch.ones(64, 64).clone()
before = peak()
for name, value in read_tensors(index):
    for part in (value.data, value.scale) if isinstance(value, QuantTensor) else (value,):
        copy = torch.empty_like(part).copy_(part)  # what a loader does: every byte is touched, and copied
        if keep:
            kept.append(copy)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """(directory, payload bytes, bytes of the largest of four shards)"""
    config = ModelConfig.preset(
        "flash",
        hidden_size=512,
        num_hidden_layers=6,
        compress_ratios=(0, 4, 128, 4, 128, 0, 0),
        num_attention_heads=16,
        head_dim=128,
        q_lora_rank=256,
        n_routed_experts=64,
        moe_intermediate_size=512,
        vocab_size=8192,
    )
    directory = tmp_path_factory.mktemp("large") / "checkpoint"
    total = random_checkpoint(directory, config, num_stages=1, num_shards=4)
    assert 200e6 < total < 300e6
    return directory, total, max(f.stat().st_size for f in directory.glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_a_load_peaks_at_the_weights_and_one_shard(large: tuple[Path, int, int], keep: str) -> None:
    directory, total, shard = large
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(directory), keep],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    peak = int(done.stdout)
    allowed = shard + 24e6 + (total if keep == "keep" else 0)  # 24 MB: allocator slack and lazily loaded code
    assert peak < allowed, f"{peak / 1e6:.0f} MB held, {allowed / 1e6:.0f} MB allowed"
    assert peak > shard / 2  # or nothing was measured
