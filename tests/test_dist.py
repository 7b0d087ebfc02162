"""Meshes: who owns what, exact exchange between real processes, and errors that say what to do.

`on_ranks` starts the processes, for other tests too.
"""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyrosome import dist
from pyrosome.dist import VIRTUAL_SHARDS, Mesh, tree_sum
from pyrosome.errors import EngineError, PlanError

ROOT = Path(__file__).parent.parent
SIZES = (1, 2, 4, 8)


def on_ranks(call: str, size: int, folder: Path, timeout_s: float = 120) -> None:
    """Run "module:function" in `size` processes, each given its mesh and `folder`; a failure shows what they said."""
    code = "import sys; from tests.test_dist import as_rank; as_rank(*sys.argv[1:])"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, call, str(rank), str(size), str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        said = [p.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for p in started]
    finally:
        for p in started:
            p.kill()
    assert not any(p.returncode for p in started), "\n".join(said)


def as_rank(call: str, rank: str, size: str, folder: str) -> None:
    module, _, function = call.partition(":")
    mesh = dist.init(int(rank), int(size), f"file://{folder}/meet")
    try:
        getattr(importlib.import_module(module), function)(mesh, Path(folder))
    finally:
        dist.close()


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_whole_virtual_shards_and_cover_everything_once(size):
    for num in range(300):
        parts = [Mesh(rank, size).part(num) for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(num))
        for rank, part in enumerate(parts):
            assert all(i * VIRTUAL_SHARDS // num * size // VIRTUAL_SHARDS == rank for i in part)


def test_a_tree_adds_neighbours_first():
    parts = torch.tensor([1.0, 2.0**-24, 2.0**-24, 2.0**-24, -1.0, 2.0**-25, 2.0**-25, 3.0])
    a, b, c, d, e, f, g, h = parts
    assert tree_sum(parts) == ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert tree_sum(parts) != parts.cumsum(0)[-1]
    assert tree_sum(parts[:1]) == a and tree_sum(parts[:2]) == a + b


@pytest.mark.parametrize("size", SIZES)
def test_subtrees_of_ranks_make_the_whole_tree(size):
    parts = torch.randn(VIRTUAL_SHARDS, 1000, generator=torch.Generator().manual_seed(0))
    of_ranks = torch.stack([tree_sum(part) for part in parts.chunk(size)])
    assert torch.equal(tree_sum(of_ranks), tree_sum(parts))


def test_one_rank_exchanges_with_nobody():
    mesh, x = dist.init(0, 1, "nowhere"), torch.ones(2, 3, requires_grad=True)
    assert mesh == Mesh.single() == Mesh(0, 1)
    assert mesh.sum(x) is x
    assert mesh.all_reduce_exact([x])[0] is x
    assert torch.equal(mesh.all_gather(x), x[None])
    assert mesh.part(5) == range(5)


@pytest.mark.parametrize(("rank", "size", "told"), [(0, 3, "use 1, 2, 4 or 8"), (0, 0, "0 ranks"), (0, 16, "16 ranks"),
                                                    (2, 2, "0 to 1"), (-1, 4, "rank -1")])  # fmt: skip
def test_a_mesh_that_cannot_be_is_refused(rank, size, told):
    with pytest.raises(PlanError, match=told):
        Mesh(rank, size)
    with pytest.raises(PlanError, match=told):
        dist.init(rank, size, "nowhere")


def test_gradients_do_not_cross_ranks():
    with pytest.raises(PlanError, match="use one rank"):
        Mesh(0, 2).sum(torch.ones(2, requires_grad=True))


def test_ranks_that_do_not_come_are_told_of(tmp_path):
    with pytest.raises(PlanError, match=r"rank 0 of 2 waited at file://.*meet"):
        dist.init(0, 2, f"file://{tmp_path}/meet", timeout_s=0.2)
    dist.close()


def test_two_processes_exchange_every_bit(tmp_path):
    on_ranks("tests.test_dist:exchange", 2, tmp_path)


def exchange(mesh: Mesh, folder: Path) -> None:
    """What each of two processes does in the test above."""
    bits = torch.tensor([0, -(2**31), 1, 0x7FC01234, -1, 0x7F800000, 0x3F800000], dtype=torch.int32)  # -0, NaNs, ...
    odd = bits.view(torch.float32)
    with torch.inference_mode():
        sent = torch.stack([odd, odd.flip(0)])
        assert torch.equal(mesh.all_gather(sent[mesh.rank]).view(torch.int32), sent.view(torch.int32))

        # row i is rank i % 2's: in float32, bfloat16 and bytes at once
        rows = odd.expand(6, -1).contiguous()
        whole = [rows, rows.view(torch.bfloat16), rows.view(torch.uint8)[:, 1:6]]
        mine = [plane.clone() for plane in whole]
        for plane in mine:
            plane[1 - mesh.rank :: 2] = 0
        for ours, theirs in zip(mesh.all_reduce_exact(mine), whole, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))

        part = torch.tensor([1.0, 2.0**-24]) if mesh.rank else torch.tensor([2.0**-24, 1.0])
        assert torch.equal(mesh.sum(part), torch.tensor([1.0, 1.0]))
    with pytest.raises(PlanError, match="in a group already"):
        dist.init(mesh.rank, 2, f"file://{folder}/elsewhere")
    if mesh.rank == 0:  # the other one leaves
        with pytest.raises(EngineError, match="rank 0 of 2 lost the others in an all-gather of 2 elements"):
            mesh.all_gather(part)
