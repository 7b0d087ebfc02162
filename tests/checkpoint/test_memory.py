"""A whole model loaded as it is stored: the load peaks at the weights and one shard, and no file stays mapped.

Shards are read ahead meanwhile, which no figure here may show.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyrosome.checkpoint import load
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.config import ModelConfig
from tests.checkpoint.files import copied, random_checkpoint, split

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="VmHWM and /proc/self/maps are Linux's")

NUM_SHARDS = 9
ALLOWANCE = 16e6  # bytes, less than a shard: allocator slack, and code of libraries paged in on first use
BF16 = {"expert_dtype": None, "quantization": None}
WIDTHS = {"fp8fp4": 1024, "bf16": 512}  # experts' intermediate width: either way about 230 MB

# In a process of its own: VmHWM is the most it ever held, mapped pages of files included.
MEASURE = """
import json, sys, torch
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.model.build import build
from pyrosome.model.numerics import TRAINED
from pyrosome.quant import QuantTensor

def memory(field):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

index = open_checkpoint(sys.argv[1])
told = []
torch.ones(64, 64).clone()
before = memory("VmRSS")
assert memory("VmHWM") - before < 4e6  # nothing larger was held and freed before: the peak will be the load's
network = build(index, TRAINED, unpack=False, progress=lambda *call: told.append(call))
peak, after = memory("VmHWM") - before, memory("VmRSS") - before
kept = [*network.parameters(), *network.buffers(), *network.bank._stacks.values()]
kept += [m.value for m in network.modules() if isinstance(getattr(m, "value", None), QuantTensor)]
parts = [p for k in kept for p in ((k.data, k.scale) if isinstance(k, QuantTensor) else (k,))]
storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
maps = [line.split()[-1] for line in open("/proc/self/maps") if ".safetensors" in line]
print(json.dumps({"peak": peak, "after": after, "kept": sum(storages.values()), "maps": maps, "told": told}))
"""


@pytest.fixture(scope="module", params=WIDTHS)
def loaded(request, tmp_path_factory):
    """(what the process measured, payload bytes, the largest shard's bytes, shard names)"""
    config = ModelConfig.preset(
        "flash",
        hidden_size=512,
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4, 0),
        num_hash_layers=0,
        num_attention_heads=16,
        head_dim=128,
        q_lora_rank=256,
        o_lora_rank=256,
        n_routed_experts=48 if request.param == "fp8fp4" else 24,
        moe_intermediate_size=WIDTHS[request.param],
        vocab_size=8192,
        **(BF16 if request.param == "bf16" else {}),
    )
    directory = tmp_path_factory.mktemp("memory") / request.param
    total = random_checkpoint(directory, config, num_stages=1, num_shards=NUM_SHARDS)
    shards = {s.name: s.stat().st_size for s in sorted(directory.glob("*.safetensors"))}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(directory)], capture_output=True, text=True, env=environment
    )
    shutil.rmtree(directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), total, max(shards.values()), list(shards)


def test_the_checkpoint_is_large_enough_to_tell(loaded):
    measured, total, shard, names = loaded
    assert len(names) == NUM_SHARDS and 150e6 < total < 320e6
    assert ALLOWANCE < shard < total / 4
    assert total > load._WORTH_AHEAD  # or nothing was read ahead
    # Weights are held as stored: only small vectors and the gates become float32.
    assert total <= measured["kept"] + 1e6 and measured["kept"] < 1.02 * total


def test_the_load_peaks_at_the_weights_and_one_shard(loaded):
    measured, _, shard, _ = loaded
    allowed = measured["kept"] + shard + ALLOWANCE
    assert measured["peak"] <= allowed, f"{measured['peak'] / 1e6:.0f} MB held, {allowed / 1e6:.0f} MB allowed"
    assert measured["peak"] > 0.9 * measured["kept"]  # or nothing was measured


def test_after_the_load_only_the_weights_remain(loaded):
    measured, _, _, _ = loaded
    assert measured["maps"] == [], "shards stay mapped"
    assert 0.9 * measured["kept"] < measured["after"] <= measured["kept"] + ALLOWANCE


def test_progress_names_every_shard_and_grows_to_the_payload(loaded):
    measured, total, _, names = loaded
    assert [name for *_, name in measured["told"]] == names
    done = [done for done, *_ in measured["told"]]
    assert done == sorted(set(done)) and done[-1] == total
    assert {all_of_it for _, all_of_it, _ in measured["told"]} == {total}


def test_a_process_that_maps_a_shard_is_seen_to(tmp_path: Path):
    """The check above can fail: a mapping that is kept shows in /proc/self/maps."""
    file = tmp_path / "kept.safetensors"
    file.write_bytes(bytes(1 << 16))
    import torch

    kept = torch.from_file(str(file), shared=False, size=1 << 16, dtype=torch.uint8)
    assert any(str(file) in line for line in Path("/proc/self/maps").read_text().splitlines())
    del kept
    assert not any(str(file) in line for line in Path("/proc/self/maps").read_text().splitlines())


# ---------------------------------------------------------------- reading ahead


class Asked:
    """What the system was asked to read: {file name: bytes}, in order of the files."""

    def __init__(self):
        self.found: dict[str, set[int]] = {}

    def __call__(self, fd, at, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED and length == load._PIECE
        self.found.setdefault(Path(os.readlink(f"/proc/self/fd/{fd}")).name, set()).update(range(at, at + length))

    def files(self, count):
        """Their names, once there are so many."""
        end = time.monotonic() + 60
        while len(self.found) < count and time.monotonic() < end:
            time.sleep(0.001)
        return list(self.found)


@pytest.fixture
def asked(monkeypatch):
    """Every load is worth reading ahead for, in pieces of 4 KB."""
    asked = Asked()
    monkeypatch.setattr(load, "_WORTH_AHEAD", 0)
    monkeypatch.setattr(load, "_PIECE", 4096)
    monkeypatch.setattr(os, "posix_fadvise", asked)
    return asked


def no_thread_is_left():
    return not [t for t in threading.enumerate() if t.name == "pyrosome-read-ahead"]


def test_a_shard_and_the_next_are_read_ahead(tmp_path, asked):
    directory = copied(tmp_path)
    names = split(directory, 5)
    index = open_checkpoint(directory)
    begun = []
    for name, _ in read_tensors(index):
        shard = index.tensors[name].file.name
        if shard not in begun:
            begun.append(shard)
            wanted = names[: len(begun) + 1]
            assert asked.files(len(wanted)) == wanted
            time.sleep(0.01)  # and no more: the one after waits until this shard is done
            assert asked.files(len(wanted)) == wanted
    assert begun == names and no_thread_is_left()
    for info in index.tensors.values():
        if info.file.name != names[-1]:  # what is left of the last is not asked for when it has been read
            assert asked.found[info.file.name].issuperset(range(info.begin, info.end))


def test_only_what_is_wanted_is_read_ahead(tmp_path, asked):
    directory = copied(tmp_path)
    names = split(directory, 3)
    index = open_checkpoint(directory)
    (name,) = [n for n in index.tensors if n == "layers.1.ffn.experts.0.w1.weight"]
    info = index.tensors[name]
    for _ in read_tensors(index, [name]):
        assert asked.files(1) == [info.file.name] and info.file.name in names
    assert len(asked.found[info.file.name]) < info.nbytes + load._PIECE


def test_a_load_that_ends_half_way_leaves_no_thread(tmp_path, asked):
    directory = copied(tmp_path)
    split(directory, 5)
    tensors = read_tensors(open_checkpoint(directory))
    next(tensors)
    assert not no_thread_is_left()
    tensors.close()
    assert no_thread_is_left()


def test_a_shard_that_cannot_be_read_ahead_is_read_all_the_same(tmp_path, asked, monkeypatch):
    def refuse(*_):
        raise OSError("not here")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    index = open_checkpoint(copied(tmp_path))
    assert len(list(read_tensors(index))) > 0 and no_thread_is_left()


def test_where_the_call_does_not_exist_a_load_does_without(tmp_path, asked, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    tensors = read_tensors(open_checkpoint(copied(tmp_path)))
    next(tensors)
    assert no_thread_is_left()
    assert len(list(tensors)) > 0


def test_a_small_load_starts_no_thread(tmp_path):
    tensors = read_tensors(open_checkpoint(copied(tmp_path)))
    next(tensors)
    assert no_thread_is_left()
    tensors.close()
