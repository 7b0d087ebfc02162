"""Planned bytes are allocated bytes: weights in every form they are held in, and cache pools, to the byte."""

from __future__ import annotations

import pytest
from torch import Tensor

from pyrosome.cache.pool import CachePool
from pyrosome.cache.streams import plan_cache
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.config import ModelConfig
from pyrosome.dist import Mesh
from pyrosome.model.build import Network, build, fill
from pyrosome.model.layers import Weight
from pyrosome.model.numerics import numerics_named
from pyrosome.ops import native
from pyrosome.plan.inventory import Model, add_up, buffer_bytes, held_bytes
from pyrosome.quant import QuantTensor
from pyrosome.testing.checkpoints import random_tensors
from pyrosome.testing.live_bytes import storage_bytes
from pyrosome.testing.on_meta import meta_tensors
from pyrosome.testing.shapes import OFFICIAL_QUANTIZATION, tiny
from tests.golden.vectors import GOLDEN

OFFICIAL = {"quantization": OFFICIAL_QUANTIZATION, "expert_dtype": "fp4"}
# The official rows (heads of 512, rotary 64, index keys of 128, window 128) between narrow matrices.
NARROW = ModelConfig.preset(
    "flash", hidden_size=128, moe_intermediate_size=64, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0),
    num_attention_heads=4, q_lora_rank=96, o_groups=2, o_lora_rank=40, index_n_heads=8, n_routed_experts=16,
    num_experts_per_tok=2, num_hash_layers=1, vocab_size=320,
)  # fmt: skip
SHAPES = {"tiny": tiny(**OFFICIAL), "narrow": NARROW}
LAYOUTS = {"native": "fp8fp4", "fp8": "fp8", "bf16": "bf16"}
DEVICES = {"tiles": "cpu", "float32": "cpu", "stored": "meta"}

needs_library = pytest.mark.skipif(not native.available(), reason="no native library here")


def weights_of(model: Network) -> list[Tensor]:
    """Every tensor that a network keeps: parameters, buffers, and what is quantised."""
    quantised = [m.value for m in model.modules() if isinstance(m, Weight) and isinstance(m.value, QuantTensor)]
    quantised += [s for s in model.bank._stacks.values() if isinstance(s, QuantTensor)]
    planes = [p for q in quantised for p in (q.data, q.scale)]
    return [*model.parameters(), *model.buffers(), *planes]


def planned(model: Model, form: str, mesh: Mesh) -> int:
    own = mesh.part(model.config.n_routed_experts)
    return buffer_bytes(model.config) + sum(
        held_bytes(t, form) for t in model.held if t.expert == -1 or t.expert in own
    )


@pytest.mark.parametrize("form", DEVICES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("numerics", ["exact", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_take_the_planned_bytes(shape, numerics, weights, ranks, form):
    if form == "tiles" and not native.available():
        pytest.skip("no native library here")
    config = SHAPES[shape]
    plan = Model.of(config, 1, weights)
    mesh = Mesh(ranks - 1, ranks)
    model = Network(config, numerics_named(numerics), drafts=True)
    model.bank.share(mesh)
    tensors = random_tensors(config, 0, LAYOUTS[weights])
    fill(model, tensors, device=DEVICES[form], unpack=form == "float32")
    assert storage_bytes(weights_of(model)) == planned(plan, form, mesh)
    if ranks == 1:
        assert planned(plan, form, mesh) == plan.held_bytes(form)


@pytest.mark.parametrize("form", ["tiles", "float32"])
@pytest.mark.parametrize("numerics", ["exact", "trained"])
@pytest.mark.parametrize("name", ["fp8fp4", "bf16"])
def test_weights_of_a_checkpoint_take_the_planned_bytes(name, numerics, form):
    if form == "tiles" and not native.available():
        pytest.skip("no native library here")
    plan = Model.open(GOLDEN / name)
    model = build(open_checkpoint(GOLDEN / name), numerics_named(numerics), unpack=form == "float32")
    assert storage_bytes(weights_of(model)) == plan.held_bytes(form)


@needs_library
def test_two_ranks_of_a_checkpoint_share_its_experts_and_nothing_else():
    plan, index = Model.open(GOLDEN / "fp8fp4"), open_checkpoint(GOLDEN / "fp8fp4")
    taken = []
    for rank in range(2):
        model = Network(index.config, numerics_named("trained"), drafts=index.has_drafts)
        model.bank.share(Mesh(rank, 2))
        fill(model, read_tensors(index))
        taken.append(storage_bytes(weights_of(model)))
        assert taken[-1] == planned(plan, "tiles", Mesh(rank, 2))
    experts = add_up(plan.held, lambda t: t.expert >= 0, "tiles")[True]
    assert sum(taken) == 2 * plan.held_bytes("tiles") - experts


def test_flash_itself_takes_the_planned_bytes_on_a_device():
    model = Network(ModelConfig.preset("flash"), numerics_named("trained"), drafts=True)
    fill(model, meta_tensors(model.config), device="meta")
    assert storage_bytes(weights_of(model)) == Model.open("flash").held_bytes("stored") == 159_702_697_032


@pytest.mark.parametrize(("num_drafts", "cache_tokens"), [(0, None), (3, None), (3, 30_000)])
@pytest.mark.parametrize("kv_format", ["f32", "bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pools_take_the_planned_bytes(shape, kv_format, num_drafts, cache_tokens):
    asked = (SHAPES[shape], kv_format, 3, 9000)
    pool = CachePool(*asked, num_drafts=num_drafts, drafts=num_drafts > 0, cache_tokens=cache_tokens)
    tensors = [plane for planes in pool.planes.values() for plane in planes] + list(pool._tables.values())
    plan = plan_cache(*asked, num_drafts, num_drafts > 0, cache_tokens)
    assert storage_bytes(tensors) == pool.allocated_bytes == plan.total_bytes
