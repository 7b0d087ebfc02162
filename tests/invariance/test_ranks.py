"""Several ranks equal one to the last bit: experts owned by rank, pages of history owned by rank.

Two are real processes on the golden checkpoints; four and eight are threads of this process.
"""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pyrosome.cache.pool import CachePool
from pyrosome.cache.shards import shard_layers
from pyrosome.cache.streams import PAGE_ROWS, pages_for
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.dist import Mesh
from pyrosome.engine.runner import Runner
from pyrosome.errors import EngineError
from pyrosome.model.build import Network, fill
from pyrosome.model.experts import ExpertBank
from pyrosome.model.numerics import numerics_named
from pyrosome.ops import native
from pyrosome.testing.checkpoints import random_tensors
from pyrosome.testing.shapes import tiny
from tests.golden.vectors import GOLDEN, ids
from tests.networks import tokens
from tests.test_dist import on_ranks

try:
    native.library()
except OSError as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)

# Checkpoint, arithmetic, stored rows, whether weights are unpacked.
GOLDEN_CASES = [
    ("bf16", "exact", "f32", True),
    ("fp8fp4", "exact", "bf16", False),
    ("bf16", "trained", "fp8", True),
    ("fp8fp4", "trained", "fp8", False),
]


@dataclasses.dataclass(frozen=True)
class Counted(Mesh):
    """A mesh that counts the stored rows asked of all ranks, plane by plane, and those this one had."""

    count: dict[str, int] = dataclasses.field(default_factory=lambda: {"asked": 0, "given": 0}, compare=False)

    def all_reduce_exact(self, planes):
        self.count["asked"] += sum(p.shape[0] for p in planes)
        self.count["given"] += sum(int((p.contiguous().view(torch.uint8) != 0).any(1).sum()) for p in planes)
        return super().all_reduce_exact(planes)


def golden(name, numerics, unpack, mesh):
    index = open_checkpoint(GOLDEN / name)
    return shared(index.config, numerics, read_tensors(index, None, None), unpack, mesh)


def shared(config, numerics, tensors, unpack, mesh):
    network = Network(config, numerics_named(numerics), drafts=True)
    network.bank.share(mesh)
    fill(network, tensors, unpack=unpack)
    return network.eval()


def sharing_runner(network, kv_format, num_sequences, context, mesh):
    runner = Runner(network, kv_format, num_sequences, context)
    runner.pool.poison()
    runner.pool.layers = lambda step: shard_layers(CachePool.layers(runner.pool, step), mesh)
    return runner


def logits(network, kv_format, mesh, prompt, cuts):
    """Rows after every token of two sequences in spans that end at the cuts: `prompt`, and half of it reversed."""
    runner = sharing_runner(network, kv_format, 2, len(prompt), mesh)
    prompts = [prompt, prompt[: len(prompt) // 2][::-1]]
    sequences, rows = [runner.open() for _ in prompts], [[] for _ in prompts]
    for a, b in pairwise([0, *cuts, len(prompt)]):
        going = [i for i, p in enumerate(prompts) if p[a:b]]
        for i, out in zip(
            going, runner.step([(sequences[i], prompts[i][a:b]) for i in going], every_row=True), strict=True
        ):
            rows[i].append(out)
    for sequence in sequences:
        holds_its_own_pages(runner.pool, sequence, mesh)
    return torch.cat([torch.cat(r) for r in rows])


def holds_its_own_pages(pool, sequence, mesh):
    """Rows of its pages are there; where another rank's would be, nothing was ever written."""
    for (layer, name), planes in pool.planes.items():
        spec = pool.streams[layer][name]
        if not spec.is_history:
            continue
        pages = sequence.holding.pages[spec.per_tokens]
        assert len(pages) == pages_for(sequence.length, spec.per_tokens)
        for at, page in enumerate(pages):
            rows = max(0, min(PAGE_ROWS, sequence.length // spec.per_tokens - at * PAGE_ROWS))
            data = planes[0][page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
            untouched = (data.isnan() if data.dtype.is_floating_point else data == 255).all(1)
            assert not untouched[:rows].any() if at % mesh.size == mesh.rank else untouched.all()


def holds_its_own_experts(network, mesh):
    part = mesh.part(network.config.n_routed_experts)
    stacks = list(network.bank._stacks.values())
    assert stacks and all(len(s if isinstance(s, torch.Tensor) else s.data) == len(part) for s in stacks)
    return len(part)


def golden_routes(mesh):
    """Logits of every golden case, of the draft stage too."""
    found = {}
    for name, numerics, kv_format, unpack in GOLDEN_CASES:
        network, prompt = golden(name, numerics, unpack, mesh), ids(name)
        assert holds_its_own_experts(network, mesh) * mesh.size == network.config.n_routed_experts
        key = f"{name} {numerics}"
        cuts = [100, 233, 255, 257, *range(len(prompt) - 20, len(prompt))] if mesh.size > 1 else []
        found[key] = logits(network, kv_format, mesh, prompt, cuts)
        runner = sharing_runner(network, kv_format, 1, 140, mesh)
        sequence = runner.open()
        drafts = [runner.step_with_drafts(sequence, prompt[a:b]) for a, b in ((0, 130), (130, 131), (131, 140))]
        found[f"{key} drafts"] = torch.cat(drafts)
    return found


def on_one_of_two(mesh: Mesh, folder: Path) -> None:
    """What each of two processes does in the test below."""
    counted = Counted(mesh.rank, mesh.size)
    torch.save(golden_routes(counted), folder / f"{mesh.rank}.pt")
    torch.save(counted.count, folder / f"count{mesh.rank}.pt")


def test_two_processes_equal_one_on_the_golden_checkpoints(tmp_path):
    on_ranks("tests.invariance.test_ranks:on_one_of_two", 2, tmp_path)
    alone = golden_routes(Mesh.single())
    counts = [torch.load(tmp_path / f"count{rank}.pt") for rank in range(2)]
    assert counts[0]["asked"] == counts[1]["asked"]
    assert all(0 < c["given"] < c["asked"] for c in counts)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == alone.keys()
        for key, rows in alone.items():
            assert torch.isfinite(rows).all()
            assert torch.equal(found[key], rows), f"rank {rank}, {key}"


@dataclasses.dataclass(frozen=True)
class Thread(Counted):
    """A rank that is a thread: all of them put what they send into one list."""

    barrier: threading.Barrier = None
    sent: list = None

    def _gather(self, out, tensor):
        self.sent[self.rank] = tensor
        self.barrier.wait(60)
        for mine, theirs in zip(out, self.sent, strict=True):
            mine.copy_(theirs)
        self.barrier.wait(60)

    def _add(self, tensor):
        all_of_them = tensor.new_empty(self.size, *tensor.shape)
        self._gather(list(all_of_them), tensor)
        tensor.copy_(all_of_them.sum(0, dtype=tensor.dtype))


def in_threads(size, work):
    """`work` of each rank's mesh, and what each rank had to give."""
    barrier, sent = threading.Barrier(size), [None] * size
    meshes = [Thread(rank, size, barrier=barrier, sent=sent) for rank in range(size)]

    def of_rank(mesh):
        try:
            return work(mesh)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, meshes)), [mesh.count["given"] for mesh in meshes]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("num_experts", "layout", "numerics"), [(6, "fp8fp4", "trained"), (8, "bf16", "exact")])
def test_any_number_of_ranks_equals_one(size, num_experts, layout, numerics):
    """Six experts leave some of eight ranks without any; five pages give some of four ranks two."""
    config = tiny((0, 4, 128), n_routed_experts=num_experts, hidden_size=128, moe_intermediate_size=64, o_lora_rank=64)
    prompt, kv_format = tokens(1100), "fp8" if numerics == "trained" else "f32"

    def work(mesh):
        with torch.inference_mode():
            network = shared(config, numerics, random_tensors(config, 0, layout), False, mesh)
            holds_its_own_experts(network, mesh)
            cuts = [255, 259, 1025, 1090, *range(1095, 1100)] if mesh.size > 1 else []
            return logits(network, kv_format, mesh, prompt, cuts)

    alone = work(Mesh.single())
    everyone, given = in_threads(size, work)
    assert all((n > 0) == (rank < 5) for rank, n in enumerate(given))
    assert torch.isfinite(alone).all()
    for rows in everyone:
        assert torch.equal(rows, alone)


def test_a_bank_is_shared_before_it_is_filled():
    bank, value = ExpertBank(8, 6, 5, 1.0), torch.ones(5, 6)
    bank.share(Mesh(1, 2))
    assert bank.held == range(4, 8)
    for expert in range(8):
        bank.assign("layers.0", expert, "w1", value * expert, numerics_named("exact"), unpack=False)
    assert torch.equal(bank.get_parameter("layers_0_w1")[:, 0, 0], torch.arange(4.0, 8.0))
    with pytest.raises(EngineError, match="before weights are assigned"):
        bank.share(Mesh(0, 2))


def test_one_rank_reads_its_pool_as_it_is():
    runner = Runner(shared(tiny((4,)), "exact", random_tensors(tiny((4,)), 0), True, Mesh.single()), "f32", 1, 8)
    layers = runner.pool.layers(None)
    assert shard_layers(layers, Mesh.single()) == layers
