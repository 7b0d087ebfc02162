"""Weights from a checkpoint to the modules that keep them: every value, and nothing shared with the file."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.errors import CheckpointError, MissingTensor
from pyrosome.model import build as build_module
from pyrosome.model.build import build
from pyrosome.model.numerics import EXACT, TRAINED, unchanged
from pyrosome.ops import native
from pyrosome.quant import FORMATS, QuantTensor
from pyrosome.quant.tiles import TiledWeight
from tests.checkpoint.files import DATA, SHARD, copied, read_entries, rewrite, split

SETS = ["golden/bf16", "golden/fp8fp4"]
each_set = pytest.mark.parametrize("name", SETS)
each_way = pytest.mark.parametrize("unpack", [True, False], ids=["unpacked", "stored"])


def values(stored) -> torch.Tensor:
    """Exact float32 values of what is held, whichever way."""
    return stored.dequantize(torch.float32) if isinstance(stored, QuantTensor) else stored.float()


def held(network, name: str):
    """What the network keeps of the tensor an official name stands for."""
    parts = name.split(".")
    if "experts" in parts and "shared_experts" not in parts:
        at = parts.index("experts")
        stacks = network.bank.weights(".".join(parts[: at - 1]))
        stack = getattr(stacks, parts[at + 2])
        number = int(parts[at + 1])
        if isinstance(stack, QuantTensor):
            return dataclasses.replace(stack, data=stack.data[number], scale=stack.scale[number:][:1].squeeze(0))
        return stack[number]
    *path, leaf = parts
    if leaf.startswith("hc_"):
        _, part, leaf = leaf.split("_")
        path.append(f"hc_{part}")
    module = network.get_submodule(".".join(path))
    return getattr(module, "value" if hasattr(module, "value") and leaf == "weight" else leaf)


@each_set
@each_way
def test_every_value_is_the_file_s(name, unpack):
    index = open_checkpoint(DATA / name)
    network = build(index, TRAINED, unpack=unpack)
    seen = 0
    for tensor, stored in read_tensors(index):
        ours = held(network, tensor)
        assert torch.equal(values(ours), values(stored)), tensor
        assert isinstance(ours, QuantTensor) == (isinstance(stored, QuantTensor) and not unpack), tensor
        seen += 1
    assert seen == len(index.expected)


@each_set
@each_way
def test_nothing_is_left_on_the_meta_device_or_asks_for_gradients(name, unpack):
    network = build(open_checkpoint(DATA / name), TRAINED, unpack=unpack)
    assert not network.training
    for tensor in [*network.parameters(), *network.buffers()]:
        assert tensor.device.type == "cpu" and not tensor.requires_grad


@each_set
@each_way
def test_no_value_is_a_view_of_the_file(tmp_path: Path, name, unpack):
    path = copied(tmp_path, name)
    network = build(open_checkpoint(path), TRAINED, unpack=unpack)
    before = {n: values(held(network, n)).clone() for n in open_checkpoint(path).expected}
    num_bytes = (path / SHARD).stat().st_size
    with (path / SHARD).open("r+b") as f:  # in place: a mapping of it would see this
        f.write(bytes(num_bytes))
    assert all(torch.equal(values(held(network, n)), v) for n, v in before.items())


def test_stored_weights_keep_their_format_and_small_ones_are_float32():
    network = build(open_checkpoint(DATA / "golden/fp8fp4"), TRAINED, unpack=False)
    block = network.layers[1]
    assert (block.attn.wq_a.value.format, network.bank.weights("layers.1").w1.format) == ("fp8", "fp4")
    for small in (block.attn_norm.weight, block.ffn.gate.weight, block.hc_attn.fn, block.attn.attn_sink):
        assert small.dtype == torch.float32
    assert network.embed.value.dtype == torch.bfloat16
    assert network.layers[0].ffn.gate.tid2eid.dtype == torch.int64


@pytest.mark.parametrize(("numerics", "rounds"), [(EXACT, False), (TRAINED, True)], ids=["exact", "trained"])
@each_way
def test_activations_are_rounded_in_front_of_quantised_weights_alone(numerics, rounds, unpack):
    quantised, plain = (build(open_checkpoint(DATA / name), numerics, unpack=unpack) for name in SETS[::-1])
    for network, here in ((quantised, rounds), (plain, False)):
        assert (network.layers[1].attn.wq_a.prepare is not unchanged) == here
        assert (network.bank.weights("layers.1").prepare is not unchanged) == here
        assert network.layers[1].attn.indexer.weights_proj.prepare is unchanged
        assert network.embed.prepare is network.head.prepare is unchanged


@pytest.mark.parametrize("threshold", ["above", "at", "below"])
def test_size_decides_what_is_unpacked(monkeypatch, threshold):
    index = open_checkpoint(DATA / "golden/fp8fp4")
    limit = 4 * index.num_weights + {"above": 1, "at": 0, "below": -1}[threshold]
    monkeypatch.setattr(build_module, "UNPACK_BYTES", limit)
    monkeypatch.setattr(native, "available", lambda: False)
    held_as = build(index, TRAINED).layers[1].attn.wq_a.value
    assert isinstance(held_as, QuantTensor) == (threshold == "below")


def test_native_kernels_take_weights_as_stored():
    held_as = build(open_checkpoint(DATA / "golden/fp8fp4"), TRAINED).layers[1].attn.wq_a.value
    assert isinstance(held_as, TiledWeight) == native.available()


def test_progress_is_passed_on(tmp_path):
    path = copied(tmp_path)
    names, told = split(path, 4), []
    build(open_checkpoint(path), EXACT, progress=lambda *call: told.append(call))
    assert [name for *_, name in told] == names and told[-1][0] == told[-1][1] == open_checkpoint(path).nbytes


def test_shards_make_no_difference(tmp_path):
    path = copied(tmp_path)
    whole = build(open_checkpoint(path), TRAINED)
    split(path, 6, apart=["w2.scale", "wq_b.weight"])
    cut = build(open_checkpoint(path), TRAINED)
    assert all(torch.equal(values(held(cut, n)), values(held(whole, n))) for n in open_checkpoint(path).expected)


def test_a_checkpoint_with_a_fault_is_refused_before_a_byte_is_read(tmp_path, monkeypatch):
    path = copied(tmp_path, "golden/bf16")
    rewrite(path, {"layers.2.attn.wo_b.weight": None})
    monkeypatch.setattr(build_module, "read_tensors", None)
    monkeypatch.setattr(build_module, "Network", None)
    with pytest.raises(MissingTensor, match=r"layers\.2\.attn\.wo_b\.weight"):
        build(open_checkpoint(path), EXACT)


def test_unknown_keys_are_said_once_with_their_names(tmp_path, caplog):
    path = copied(tmp_path, "golden/bf16")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"a_new_key": 1, "another": 2}))
    with caplog.at_level(logging.WARNING, "pyrosome"):
        build(open_checkpoint(path), EXACT)
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "config.json has keys unknown here, kept and without effect: a_new_key, another"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pyrosome"):
        build(open_checkpoint(DATA / "golden/bf16"), EXACT)
    assert caplog.records == []


# Experts of one layer must be of one kind: they are held in one stack, and rounded in front of alike.


def with_one_other_expert(tmp_path, dtype: str) -> Path:
    """The stored checkpoint, with one expert's matrix stored in another way."""
    path = copied(tmp_path, "golden/bf16" if dtype == "F32" else "golden/fp8fp4")
    name = "layers.1.ffn.experts.2.w1"
    found, (rows, columns), _ = read_entries(path / SHARD)[f"{name}.weight"]
    shape = (rows, columns * 2) if found == "I8" else (rows, columns)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8

    def as_bytes(t: torch.Tensor) -> bytes:
        return t.contiguous().view(torch.uint8).numpy().tobytes()

    if dtype == "F8_E4M3":
        codes, scale = FORMATS["fp8"].quantize(noise)
        changes = {
            f"{name}.weight": (dtype, shape, as_bytes(codes)),
            f"{name}.scale": ("F8_E8M0", tuple(scale.shape), as_bytes(scale)),
        }
    else:
        stored = noise.bfloat16() if dtype == "BF16" else noise
        changes = {f"{name}.weight": (dtype, shape, as_bytes(stored))}
        changes |= {f"{name}.scale": None} if found == "I8" else {}
    rewrite(path, changes)
    return path


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3"])
def test_experts_stored_in_different_ways_are_right_or_refused(tmp_path, dtype):
    path = with_one_other_expert(tmp_path, dtype)
    try:
        network = build(open_checkpoint(path), EXACT, unpack=False)
    except CheckpointError:
        return
    stored = dict(read_tensors(open_checkpoint(path)))
    for n in (f"layers.1.ffn.experts.{e}.w1.weight" for e in range(4)):
        assert torch.equal(values(held(network, n)), values(stored[n])), n
