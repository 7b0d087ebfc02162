"""Writing checkpoints: the same bytes, the official layout, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.checkpoint.save import save_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.errors import PyrosomeError
from pyrosome.quant import FORMATS, QuantTensor
from tests.checkpoint.files import DATA, INDEX, SHARD, read_entries

SETS = ["golden/bf16", "golden/fp8fp4", "golden_dspark/bf16", "golden_dspark/fp8fp4"]
TINY = ModelConfig.from_json(DATA / "golden/bf16/config.json")


def entries_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= read_entries(file)
    return found


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 300_000])
def test_load_and_save_is_the_same_bytes(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    index = open_checkpoint(DATA / name)
    save_checkpoint(tmp_path / "new", index.config, read_tensors(index), max_shard_bytes=max_shard_bytes)
    assert entries_of(tmp_path / "new") == read_entries(DATA / name / SHARD)
    again = open_checkpoint(tmp_path / "new")
    again.check().raise_if_bad()
    assert again.config == index.config
    assert json.loads((tmp_path / "new/config.json").read_text()) == json.loads(
        (DATA / name / "config.json").read_text()
    )


def test_official_layout(tmp_path: Path) -> None:
    index = open_checkpoint(DATA / "golden/fp8fp4")
    save_checkpoint(tmp_path, index.config, read_tensors(index), max_shard_bytes=500_000)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert count > 3
    listing = json.loads((tmp_path / INDEX).read_text())
    assert listing["metadata"]["total_size"] == index.nbytes
    held = {name: file for file in files for name in read_entries(tmp_path / file)}
    assert listing["weight_map"] == held
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*files, INDEX, "config.json"])  # and nothing left over


def test_shards_stay_within_their_limit(tmp_path: Path) -> None:
    index = open_checkpoint(DATA / "golden/bf16")
    save_checkpoint(tmp_path, index.config, read_tensors(index), max_shard_bytes=100_000)
    for file in tmp_path.glob("*.safetensors"):
        entries = read_entries(file)
        assert len(entries) == 1 or sum(len(e[2]) for e in entries.values()) <= 100_000


def test_one_tensor_larger_than_a_shard(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TINY, [("a", torch.ones(1000)), ("b", torch.zeros(1))], max_shard_bytes=100)
    assert {n: len(e[2]) for n, e in entries_of(tmp_path).items()} == {"a": 4000, "b": 4}


def test_same_input_same_files(tmp_path: Path) -> None:
    index = open_checkpoint(DATA / "golden/fp8fp4")
    for run in ("one", "two"):
        save_checkpoint(tmp_path / run, index.config, read_tensors(index), max_shard_bytes=400_000)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / run).iterdir()} for run in ("one", "two"))
    assert one == two


def test_dtype_names_in_the_header(tmp_path: Path) -> None:
    fp8, fp4 = FORMATS["fp8"], FORMATS["fp4"]
    weight = torch.linspace(-1, 1, 64 * 256).reshape(64, 256)
    save_checkpoint(
        tmp_path,
        TINY,
        [
            ("p.weight", QuantTensor("fp8", *fp8.quantize(weight))),
            ("q.weight", QuantTensor("fp4", *fp4.quantize(weight))),
            ("b", weight.bfloat16()),
            ("f", weight),
            ("h", weight.half()),
            ("t", torch.arange(6).reshape(2, 3)),
            ("i", torch.arange(6, dtype=torch.int32)),
        ],
    )
    assert {n: e[:2] for n, e in entries_of(tmp_path).items()} == {
        "p.weight": ("F8_E4M3", (64, 256)),
        "p.scale": ("F8_E8M0", (1, 2)),
        "q.weight": ("I8", (64, 128)),
        "q.scale": ("F8_E8M0", (64, 8)),
        "b": ("BF16", (64, 256)),
        "f": ("F32", (64, 256)),
        "h": ("F16", (64, 256)),
        "t": ("I64", (2, 3)),
        "i": ("I32", (6,)),
    }


def test_another_reader_reads_any_order(tmp_path: Path) -> None:
    """Wide elements after an odd number of single bytes must still begin where other readers can map them."""
    tensors = {
        "a": torch.arange(3, dtype=torch.int8),
        "b": torch.arange(5, dtype=torch.float32),
        "c": torch.arange(7).to(torch.bfloat16),
        "d": torch.arange(2),
        "e": torch.tensor(2.5),
        "f": torch.empty(0, 4),
    }
    save_checkpoint(tmp_path, TINY, tensors.items())
    with safe_open(tmp_path / SHARD, "pt") as theirs:
        assert set(theirs.keys()) == set(tensors)
        for name, expected in tensors.items():
            assert torch.equal(theirs.get_tensor(name), expected)


@pytest.mark.parametrize("length", range(1, 9))
def test_data_begin_at_a_multiple_of_eight_bytes(tmp_path: Path, length: int) -> None:
    save_checkpoint(tmp_path, TINY, [("a" * length, torch.ones(1))])
    assert int.from_bytes((tmp_path / SHARD).read_bytes()[:8], "little") % 8 == 0


def test_views_and_transposes_are_written_as_they_read(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    save_checkpoint(tmp_path, TINY, [("t", base.T), ("s", base[::2, 1:3]), ("g", base[0].clone().requires_grad_())])
    with safe_open(tmp_path / SHARD, "pt") as theirs:
        assert torch.equal(theirs.get_tensor("t"), base.T)
        assert torch.equal(theirs.get_tensor("s"), base[::2, 1:3])
        assert torch.equal(theirs.get_tensor("g"), base[0])


def test_files_beside_the_weights(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}')
    save_checkpoint(tmp_path / "new", TINY, [("a", torch.ones(1))], copy_files=[tokenizer])
    assert (tmp_path / "new/tokenizer.json").read_text() == '{"version": "1.0"}'


def test_the_same_name_twice(tmp_path: Path) -> None:
    for limit in (1 << 30, 1):  # in one shard, and in two
        with pytest.raises(PyrosomeError, match="a was given twice"):
            save_checkpoint(
                tmp_path / str(limit), TINY, [("a", torch.ones(1)), ("a", torch.ones(1))], max_shard_bytes=limit
            )


def test_a_dtype_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(PyrosomeError, match="complex64"):
        save_checkpoint(tmp_path, TINY, [("a", torch.ones(1, dtype=torch.complex64))])


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path) -> None:
    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(100)
        yield "b", torch.ones(100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, TINY, breaks(), max_shard_bytes=100)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / INDEX).exists()
    assert not list(tmp_path.iterdir())  # nor is the disk left full of parts
