"""Routed experts read in place: the same bits as from memory, and no memory of their own."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.cli.engine_flags import load_options
from pyrosome.config import ModelConfig
from pyrosome.dist import Mesh
from pyrosome.engine.loaded import load_model, open_engine
from pyrosome.errors import CheckpointError, EngineError, RequestError, TruncatedFile, UnsupportedFormat, WrongShape
from pyrosome.llm import LLM
from pyrosome.model.build import build
from pyrosome.model.experts import ExpertBank
from pyrosome.model.numerics import EXACT, TRAINED
from pyrosome.ops import native
from pyrosome.ops.experts import ExpertWeights, routed_experts
from pyrosome.ops.seam import use
from pyrosome.options import LoadOptions
from pyrosome.quant import FORMATS, QuantTensor, round_activation, unchanged
from pyrosome.quant.mapped import MappedStack, map_file
from pyrosome.testing.checkpoints import random_checkpoint as seeded_checkpoint
from pyrosome.testing.shapes import OFFICIAL_QUANTIZATION, tiny
from tests.checkpoint.files import DATA, SHARD, copied, random_checkpoint, read_entries, rewrite, split
from tests.golden.vectors import ids
from tests.networks import run

GOLDEN = DATA / "golden/fp8fp4"
MAPPED = LoadOptions(experts="mapped")
EXPERT = "layers.1.ffn.experts.2.w1"
needs_kernels = pytest.mark.skipif(not native.available(), reason="there are no native kernels here")


def quantized(kind: str, *shape: int, seed: int = 0) -> QuantTensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return QuantTensor(kind, *FORMATS[kind].quantize(values))


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(("numerics", "kv_format"), [("exact", "f32"), ("trained", "fp8")])
def test_the_golden_model_has_the_same_bits_either_way(numerics, kv_format):
    resident, mapped = (
        load_model(GOLDEN, numerics=numerics, kv_format=kv_format, unpack=False, experts=e)
        for e in ("resident", "mapped")
    )
    assert isinstance(mapped.network.bank.weights("layers.1").w1, MappedStack)
    assert not isinstance(resident.network.bank.weights("layers.1").w1, MappedStack)
    prompt = ids("fp8fp4")
    for cuts in ([], [1, 130], range(1, 30)):
        ours, theirs = (m.logits(prompt[:200], cuts) for m in (mapped, resident))
        assert torch.equal(ours, theirs), f"cuts {cuts}"
    assert torch.equal(mapped.draft_logits(prompt[:140]), resident.draft_logits(prompt[:140]))


@needs_kernels
def test_every_level_of_instructions_reads_them_alike():
    network, prompt = build(open_checkpoint(GOLDEN), TRAINED, options=MAPPED), ids("fp8fp4")[:40]
    wanted = run(network, prompt, kv_format="fp8")
    for level in native.toolchain.supported():
        try:
            with native.use_level(level):
                assert torch.equal(run(network, prompt, kv_format="fp8"), wanted), level
        except OSError as error:
            pytest.skip(str(error))


def test_the_definition_reads_them_alike(monkeypatch):
    """Without kernels, where resident experts are held as rows."""
    monkeypatch.setattr(native, "available", lambda: False)
    resident, mapped = (
        build(open_checkpoint(GOLDEN), TRAINED, unpack=False, options=o) for o in (LoadOptions(), MAPPED)
    )
    with use(routed_experts, "torch"):
        ours, theirs = (run(n, ids("fp8fp4")[:60], kv_format="fp8") for n in (mapped, resident))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["fp8fp4", "fp8"])
def test_both_formats_and_rows_that_fill_no_tile(tmp_path, layout):
    """Widths that are no multiple of a tile, a block or a group, in shards that hold parts of experts."""
    config = tiny(
        hidden_size=96, moe_intermediate_size=80, quantization=OFFICIAL_QUANTIZATION,
        expert_dtype="fp4" if layout == "fp8fp4" else None,
    )  # fmt: skip
    path = seeded_checkpoint(tmp_path / layout, config, layout=layout, max_shard_bytes=1 << 16)
    assert len(list(path.glob("*.safetensors"))) > 2
    resident, mapped = (load_model(path, unpack=False, experts=e) for e in ("resident", "mapped"))
    tokens = list(range(2, 60))
    assert torch.equal(mapped.logits(tokens), resident.logits(tokens))


def test_every_value_is_the_file_s():
    index = open_checkpoint(GOLDEN)
    bank, seen = build(index, TRAINED, options=MAPPED).bank, 0
    for name, stored in read_tensors(index):
        if ".ffn.experts." in name:
            layer, _, rest = name.partition(".ffn.experts.")
            number, matrix, _ = rest.split(".")
            stack = getattr(bank.weights(layer), matrix)
            assert torch.equal(stack.dequantize()[int(number)], stored.dequantize())
            seen += 1
    assert seen == 3 * index.config.n_routed_experts * 4  # three layers, and the draft stage's


def test_ranks_keep_their_own_alone():
    parts, held = tuple(quantized("fp4", 32, 64, seed=i) for i in range(8)), []
    for rank in (0, 1):
        bank = ExpertBank(8, 64, 32, 1.5, Mesh(rank, 2))
        for e, part in enumerate(parts):
            for matrix in ("w1", "w3"):
                bank.keep("layers.0", e, matrix, part, TRAINED)
            bank.keep("layers.0", e, "w2", quantized("fp4", 64, 32, seed=e), TRAINED)
        weights = bank.weights("layers.0")
        assert (weights.first, weights.total, weights.w2.shape) == (4 * rank, 8, (4, 64, 32))
        held += weights.w1.matrices
        with pytest.raises(EngineError, match="share it before weights are"):
            bank.share(Mesh.single())
    assert all(ours is part for ours, part in zip(held, parts, strict=True))


# ---------------------------------------------------------------- the stack by itself


@pytest.fixture(params=["fp4", "fp8"])
def stack(request):
    """(a stack, the same as one tensor)"""
    parts = tuple(quantized(request.param, 80, 96, seed=i) for i in range(5))
    data, scale = (torch.stack([getattr(p, x).view(torch.uint8) for p in parts]) for x in ("data", "scale"))
    whole = QuantTensor(request.param, data.view(parts[0].data.dtype), scale.view(parts[0].scale.dtype))
    return MappedStack.of(request.param, parts, 80, 96), whole


def test_it_is_a_stack_like_another(stack):
    mapped, whole = stack
    assert isinstance(mapped, QuantTensor)
    assert (mapped.shape, mapped.format, mapped.nbytes) == (whole.shape, whole.format, whole.nbytes)
    assert mapped.device == whole.device
    index = torch.tensor([4, 0, 4, 2])
    for ours, theirs in (
        (mapped.dequantize(), whole.dequantize()),
        (mapped.dequantize(torch.bfloat16), whole.dequantize(torch.bfloat16)),
        (mapped.index_select(index).dequantize(), whole.index_select(index).dequantize()),
        (mapped.to("cpu").dequantize(), whole.dequantize()),
    ):
        assert torch.equal(ours, theirs)
    assert MappedStack.of(whole.format, (), 80, 96).dequantize().shape == (0, 80, 96)


@needs_kernels
def test_the_kernel_finds_matrices_by_their_addresses(stack):
    mapped, whole = stack
    ours, theirs = (native.tiled(w) for w in (mapped, whole))
    assert torch.equal(ours.data, theirs.data)
    first, second = (native.weight(mapped)[1] for _ in range(2))
    assert first is second, "the table is made anew for every call"
    with pytest.raises(RuntimeError, match="2 parts"):
        native.weight(mapped, 2)


@pytest.mark.parametrize("prepare", [unchanged, round_activation])
@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_one_op_over_either_stack(stack, prepare, tokens):
    _, whole = stack
    kind = whole.format
    up, gate, down = (
        tuple(quantized(kind, *shape, seed=10 * i + j) for j in range(4))
        for i, shape in enumerate(((64, 96), (64, 96), (96, 64)))
    )
    mapped = [MappedStack.of(kind, m, *m[0].shape) for m in (up, gate, down)]
    rows = [m.index_select(torch.arange(4)) for m in mapped]
    g = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, 96, generator=g), torch.rand(tokens, 2, generator=g)
    expert = torch.rand(tokens, 4, generator=g).argsort(-1)[:, :2]
    with torch.no_grad():
        for choice in ("auto", "torch"):
            with use(routed_experts, choice):
                ours, theirs = (
                    routed_experts(x, ExpertWeights(*w, prepare), expert, weight, 1.5) for w in (mapped, rows)
                )
            assert torch.equal(ours, theirs), choice


def test_matrices_of_one_stack_are_alike():
    good = quantized("fp4", 80, 96)
    with pytest.raises(WrongShape, match="matrix 1 of a mapped stack is fp8"):
        MappedStack.of("fp4", (good, quantized("fp8", 80, 96)), 80, 96)
    with pytest.raises(WrongShape, match="matrix 0"):
        MappedStack.of("fp4", (good,), 96, 80)
    wide = quantized("fp4", 80, 192)
    apart = QuantTensor("fp4", wide.data[:, :48], wide.scale[:, :3].contiguous())
    with pytest.raises(WrongShape, match="one piece"):
        MappedStack.of("fp4", (apart,), 80, 96)


def test_a_copy_of_a_network_shares_what_is_mapped():
    network = build(open_checkpoint(GOLDEN), TRAINED, options=MAPPED)
    wanted = run(network, ids("fp8fp4")[:9], kv_format="fp8")
    other = copy.deepcopy(network)
    ours, theirs = (n.bank.weights("layers.1").w1 for n in (other, network))
    assert ours.matrices[0].data.data_ptr() == theirs.matrices[0].data.data_ptr()
    del network, theirs
    assert torch.equal(run(other, ids("fp8fp4")[:9], kv_format="fp8"), wanted)


# ---------------------------------------------------------------- the files


def test_a_file_stays_mapped_as_long_as_a_view_of_it(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 64)
    view = map_file(file)[256:512]
    assert view.tolist() == list(range(256))
    file.unlink()
    assert view.tolist() == list(range(256))


def test_a_file_that_is_replaced_changes_nothing(tmp_path):
    path = copied(tmp_path)
    network = build(open_checkpoint(path), TRAINED, options=MAPPED)
    wanted = run(network, ids("fp8fp4")[:9], kv_format="fp8")
    new = path / "new"
    new.write_bytes(bytes((path / SHARD).stat().st_size))
    os.replace(new, path / SHARD)
    assert torch.equal(run(network, ids("fp8fp4")[:9], kv_format="fp8"), wanted)


def test_a_shard_that_was_cut_after_it_was_opened_is_an_error(tmp_path):
    path = copied(tmp_path)
    names = split(path, 3)
    index = open_checkpoint(path)
    last = max(
        (t for n, t in index.tensors.items() if ".ffn.experts." in n and t.file.name == names[1]), key=lambda t: t.end
    )
    os.truncate(path / names[1], last.end - 1)
    with pytest.raises(TruncatedFile, match=r"was cut after it was opened; download it again"):
        build(index, TRAINED, options=MAPPED)


@pytest.mark.parametrize("fault", ["empty", "gone"])
def test_a_shard_that_is_no_longer_there_is_an_error(tmp_path, fault):
    path = copied(tmp_path)
    names = split(path, 2)
    index = open_checkpoint(path)
    for name in names:
        (path / name).write_bytes(b"") if fault == "empty" else (path / name).unlink()
    with pytest.raises(CheckpointError, match="download it again"):
        build(index, TRAINED, options=MAPPED)


def test_a_scale_that_is_nan_is_an_error(tmp_path):
    path = copied(tmp_path)
    dtype, shape, data = read_entries(path / SHARD)[f"{EXPERT}.scale"]
    rewrite(path, {f"{EXPERT}.scale": (dtype, shape, b"\xff" + data[1:])})
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.2\.w1\.scale holds NaN"):
        build(open_checkpoint(path), TRAINED, options=MAPPED)


def test_experts_that_are_not_quantised_are_refused_by_name():
    with pytest.raises(UnsupportedFormat, match=r"experts.*BF16 without a scale; only quantised.*resident"):
        build(open_checkpoint(DATA / "golden/bf16"), TRAINED, options=MAPPED)


def test_experts_stored_in_different_ways_are_refused(tmp_path):
    path = copied(tmp_path)
    _, (rows, columns), _ = read_entries(path / SHARD)[f"{EXPERT}.weight"]
    other = quantized("fp8", rows, 2 * columns)
    rewrite(
        path,
        {
            f"{EXPERT}.weight": ("F8_E4M3", (rows, 2 * columns), other.data.view(torch.uint8).numpy().tobytes()),
            f"{EXPERT}.scale": ("F8_E8M0", tuple(other.scale.shape), other.scale.view(torch.uint8).numpy().tobytes()),
        },
    )
    with pytest.raises(UnsupportedFormat, match="store them alike"):
        build(open_checkpoint(path), EXACT, options=MAPPED)


# ---------------------------------------------------------------- options


def test_it_cannot_be_had_with_copies_or_elsewhere():
    with pytest.raises(RequestError, match="unpack"):
        load_model(GOLDEN, unpack=True, experts="mapped")
    with pytest.raises(RequestError, match="only the CPU"):
        build(open_checkpoint(GOLDEN), EXACT, device="meta", options=MAPPED)


def test_a_value_out_of_range_is_refused_before_anything_is_opened():
    with pytest.raises(RequestError, match="experts is 'disk'; it is one of resident, mapped"):
        load_model("nowhere", experts="disk")
    with pytest.raises(RequestError, match="numa is 'on'"):
        LLM("nowhere", numa="on")


def test_an_llm_and_an_engine_take_it():
    with LLM("builtin:nano", experts="mapped", numa="off") as llm:
        assert isinstance(llm.model.network.bank.weights("layers.1").w1, MappedStack)
    open_engine(str(GOLDEN), experts="mapped", max_sequences=1, cache_bytes=1 << 24).close()


def test_flags_name_what_they_change():
    assert load_options("resident", False, "auto") == {}
    asked = {"experts": "mapped", "lock_memory": True, "numa": "off"}
    assert load_options("mapped", True, "off") == asked
    with pytest.raises(RequestError, match="experts is 'disk'"):
        load_options("disk", False, "auto")


def test_the_command_takes_it_and_says_the_same(noise_checkpoint):
    line = ["-m", "pyrosome", "run", str(noise_checkpoint), "-p", "Hello", "--max-tokens", "4", "--json"]
    told = []
    for more in ([], ["--experts", "mapped", "--numa", "off"]):
        done = subprocess.run([sys.executable, *line, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout)["token_ids"])
    assert told[0] == told[1] and len(told[0]) == 4


def test_progress_counts_what_is_read():
    index, told = open_checkpoint(GOLDEN), []
    build(index, TRAINED, options=MAPPED, progress=lambda *call: told.append(call))
    experts = sum(t.nbytes for n, t in index.tensors.items() if ".ffn.experts." in n)
    assert told[-1][0] == told[-1][1] == index.nbytes - experts


# ---------------------------------------------------------------- memory

# In a process of its own, as in tests/checkpoint/test_memory.py.
MEASURE = """
import json, sys, torch
from pyrosome.engine.loaded import load_model

def memory(field):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.ones(64, 64).clone()
before = memory("VmRSS")
assert memory("VmHWM") - before < 4e6
network = load_model(sys.argv[1], experts=sys.argv[2], unpack=False).network
peak, after = memory("VmHWM") - before, memory("VmRSS") - before
w1 = network.bank.weights("layers.1").w1
maps = {line.split()[-1] for line in open("/proc/self/maps") if ".safetensors" in line}
print(json.dumps({"peak": peak, "after": after, "maps": len(maps), "bytes": w1.nbytes}))
"""
SHARDS = 9


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """({how experts are held: what the process measured}, bytes of experts, bytes of the rest, the largest shard's)"""
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
        n_routed_experts=48,
        moe_intermediate_size=1024,
        vocab_size=8192,
    )
    directory = tmp_path_factory.mktemp("mapped") / "checkpoint"
    total = random_checkpoint(directory, config, num_stages=1, num_shards=SHARDS)
    index = open_checkpoint(directory)
    experts = sum(t.nbytes for n, t in index.tensors.items() if ".ffn.experts." in n)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    found = {}
    for how in ("resident", "mapped"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(directory), how], capture_output=True, text=True, env=environment,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[how] = json.loads(done.stdout)
    largest = max(s.stat().st_size for s in directory.glob("*.safetensors"))
    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    return found, experts, total - experts, largest


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM and /proc/self/maps are Linux's")
def test_a_load_holds_none_of_the_experts(measured):
    found, experts, rest, shard = measured
    allowance = 20e6  # allocator slack, code of libraries paged in on first use, tables of names
    assert experts > 150e6 > 2 * (rest + allowance)
    assert found["resident"]["after"] > experts  # or nothing was measured
    assert found["mapped"]["after"] < rest + allowance, found
    assert found["mapped"]["peak"] < rest + shard + allowance, found


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM and /proc/self/maps are Linux's")
def test_its_files_are_what_stays_mapped(measured):
    found, *_ = measured
    assert found["resident"]["maps"] == 0 and 1 < found["mapped"]["maps"] <= SHARDS
