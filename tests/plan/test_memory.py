"""Bytes of each place: nothing lost between ranks, pools as the engine allocates them, the published checks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from pyrosome.cache.blocks import block_bytes
from pyrosome.cache.pool import CachePool
from pyrosome.cache.state import snapshot_bytes as copied_bytes
from pyrosome.cache.streams import BLOCK_TOKENS, cache_tokens_in
from pyrosome.cache.tiers import Label, Tiers, block_name
from pyrosome.plan.inventory import Model, held_bytes
from pyrosome.plan.layout import MODES, Layout, Placement
from pyrosome.plan.memory import Site, fits, places
from pyrosome.plan.plan import Asked, Place
from pyrosome.plan.rows import Cache, parked, snapshot_bytes
from pyrosome.plan.shards import ledger, stages, weight_bytes
from pyrosome.testing.shapes import OFFICIAL_QUANTIZATION, tiny
from tests.plan.machines import A100, GIB, H200, gpus, processor, unified

MILLION = 1_048_576
FLASH = Model.open("flash")
# Channels that FP8 rows and tiles divide; one draft stage.
SMALL = Model.of(
    tiny((0, 4, 128, 4, 8), moe_intermediate_size=40, quantization=OFFICIAL_QUANTIZATION, expert_dtype="fp4"), 1
)


def site(model: Model = FLASH, mode: str = "tp", count: int = 1, sessions: int = 1, **asked) -> Site:
    """Of H200 cards, unless a machine is given."""
    placement = asked.pop("placement", Placement(csa_on_host=asked.get("csa_host", False)))
    machine = asked.pop("machine", gpus(count))
    return Site(Asked(model, machine, sessions=sessions, **asked), Layout.of(mode, count), placement, sessions)


def held(at: Place, *kinds: str) -> int:
    return sum(i.num_bytes for i in at.items if i.kind in kinds)


def named(at: Place, name: str) -> int:
    return sum(i.num_bytes for i in at.items if i.name == name)


# Weights


@pytest.mark.parametrize(("name", "weights"), [("flash", "native"), ("flash", "w4a16"), ("flash", "bf16")])
def test_one_device_holds_the_whole_model(name, weights):
    model = Model.open(name, weights)
    (only,) = places(Asked(model, gpus(1)), Layout.of("tp", 1), Placement(), 1)
    assert held(only, "weights") == model.held_bytes("stored")


def test_stages_that_are_not_loaded_are_held_nowhere():
    model = Model.open("flash-0731")
    (only,) = places(Asked(model, gpus(1)), Layout.of("pp", 1), Placement(), 1)
    assert named(only, "draft head") == named(only, "draft window") == 0
    assert held(only, "weights") == model.held_bytes("stored") < model.stored_bytes


@pytest.mark.parametrize("count", [2, 3, 5, 6, 8])
def test_a_pipeline_holds_every_byte_once(count):
    here = site(mode="pp", count=count)
    parts = [here.weights(rank) for rank in range(count)]
    assert sum(sum(p.values()) for p in parts) == FLASH.held_bytes("stored")
    assert [i for rank in range(count) for i in here.layers(rank)] == list(range(43))
    assert [rank for rank in range(count) if "embedding" in parts[rank]] == [0]
    assert [rank for rank in range(count) if {"head", "draft head"} & set(parts[rank])] == [count - 1]


@pytest.mark.parametrize("count", [2, 3, 5, 6, 8])
def test_tensor_shards_add_up_with_what_is_whole_on_each(count):
    parts = [site(mode="tp", count=count).weights(rank) for rank in range(count)]
    cut = (".wq_b.weight", ".wo_a.weight", ".wo_b.weight", ".attn_sink", ".weights_proj.weight")
    whole = 0
    by_part = {"embedding": 0, "head": 0, "routed experts": 0}
    for tensor in FLASH.held:
        if not (tensor.expert >= 0 or tensor.name.endswith(cut) or tensor.name in ("embed.weight", "head.weight")):
            whole += held_bytes(tensor, "stored")
        if tensor.part in by_part:
            by_part[tensor.part] += held_bytes(tensor, "stored")
    whole += parts[0]["rotations"]
    assert sum(sum(p.values()) for p in parts) == FLASH.held_bytes("stored") + (count - 1) * whole
    for part, num_bytes in by_part.items():
        assert sum(p[part] for p in parts) == num_bytes
        assert max(p[part] for p in parts) < 1.1 * num_bytes / count + 1e9 / count


def test_shards_have_the_shapes_of_the_converted_checkpoints():
    shapes = {
        (c.tensor.name, ranks, rank): c.shard(rank, ranks).shape
        for cuts in ledger(FLASH, "stored").cuts
        for c in cuts
        for ranks, rank in ((4, 1), (3, 2))
    }
    expected = {
        ("embed.weight", 4): (32320, 4096), ("head.weight", 4): (32320, 4096),
        ("layers.2.attn.wq_b.weight", 4): (8192, 1024), ("layers.2.attn.wo_a.weight", 4): (2048, 4096),
        ("layers.2.attn.wo_b.weight", 4): (4096, 2048), ("layers.2.attn.attn_sink", 4): (16,),
        ("layers.2.attn.indexer.wq_b.weight", 4): (2048, 1024),
        ("layers.2.attn.indexer.weights_proj.weight", 4): (16, 4096),
        ("mtp.0.attn.wo_b.weight", 4): (4096, 2048),
        # Of three, the last has two of the eight groups, 21 of the 64 heads of the indexer, 43,093 rows.
        ("layers.2.attn.wq_b.weight", 3): (8192, 1024), ("layers.2.attn.wo_b.weight", 3): (4096, 2048),
        ("layers.2.attn.indexer.weights_proj.weight", 3): (21, 4096), ("embed.weight", 3): (43093, 4096),
    }  # fmt: skip
    for (name, ranks), shape in expected.items():
        assert shapes[name, ranks, {4: 1, 3: 2}[ranks]] == shape, name


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("mode", ["ep", "cp", "dp"])
def test_experts_are_dealt_out_and_the_rest_is_whole(mode, count):
    here = site(mode=mode, count=count)
    total = FLASH.held_bytes("stored")
    routed = sum(ledger(FLASH, "stored").experts(range(43), range(256)).values())
    found = sum(sum(here.weights(rank).values()) for rank in range(count))
    assert found == (count * total if mode == "dp" else count * (total - routed) + routed)


def test_small_odd_shapes_are_cut_to_the_row():
    model = Model.of(tiny((0, 4, 128), num_attention_heads=6, o_groups=3, index_n_heads=5), 1, "bf16")
    for ranks in (2, 3):
        sums: dict[str, int] = {}
        for rank, cuts in itertools.product(range(ranks), ledger(model, "stored").cuts):
            for cut in cuts:
                sums[cut.tensor.name] = sums.get(cut.tensor.name, 0) + cut.shard(rank, ranks).numel
        assert sums == {t.name: t.numel for t in model.held if t.name in sums}


def test_stages_are_as_even_as_runs_can_be():
    sizes = [9, 1, 1, 7, 3, 2, 8, 4]
    for num in range(1, len(sizes) + 1):
        cuts = itertools.combinations(range(1, len(sizes)), num - 1)
        best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *c, len(sizes)))) for c in cuts)
        runs = stages(sizes, num)
        assert [i for run in runs for i in run] == list(range(len(sizes)))
        assert all(len(run) > 0 for run in runs)
        assert max(sum(sizes[i] for i in run) for run in runs) == best


# Rows


@pytest.mark.parametrize("ratios", [(0, 4, 128), (0, 0), (128, 128), (4, 8, 128, 4)])
@pytest.mark.parametrize(("sessions", "context", "shared"), [(1, 1, 0), (3, 700, 0), (5, 8192, 5000), (2, 128, 128)])
@pytest.mark.parametrize(("num_drafts", "drafts"), [(0, False), (3, True), (0, True)])
def test_a_pool_takes_what_was_planned(ratios, sessions, context, shared, num_drafts, drafts):
    config = tiny(ratios)
    cache = Cache.of(config, "f32", sessions, context, shared, num_drafts, drafts)
    tokens = cache_tokens_in(config, "f32", max(1, cache.cache_bytes), sessions)
    pool = CachePool(
        config, "f32", sessions, context, num_drafts=num_drafts, drafts=drafts,
        cache_tokens=tokens, device="meta",
    )  # fmt: skip
    layers = range(len(ratios))
    planned = sum(cache.history_bytes(layers).values()) + sum(cache.state_bytes(layers).values()) + cache.table_bytes()
    assert planned == pool.allocated_bytes
    assert pool.plan.num_pages == cache.pages


def test_a_pool_holds_the_sessions_it_was_planned_for():
    config = tiny((0, 4, 128))
    sessions, context, shared = 3, 1500, 1100
    cache = Cache.of(config, "f32", sessions, context, shared, 0, False)
    pool = CachePool(config, "f32", sessions, context, cache_tokens=cache.tokens)
    first = pool.open()
    pool.prepare(first, 0, context)
    others = [pool.fork(first, shared // BLOCK_TOKENS * BLOCK_TOKENS) for _ in range(sessions - 1)]
    for other in others:
        pool.prepare(other, shared // BLOCK_TOKENS * BLOCK_TOKENS, context)  # DoesNotFit where a page is missing


@pytest.mark.parametrize("length", [1, 63, 127, 128, 129, 255, 640, 1000])
@pytest.mark.parametrize(("kv_format", "drafts"), [("f32", True), ("bf16", False)])
def test_a_snapshot_has_the_bytes_that_are_copied(length, kv_format, drafts):
    config = tiny((0, 4, 128, 8, 4))
    pool = CachePool(config, kv_format, 1, 1024, drafts=drafts, device="meta")
    assert snapshot_bytes(config, kv_format, length, drafts) == copied_bytes(pool, length)


def test_a_parked_session_takes_its_blocks_and_its_state_in_memory_and_no_less_on_disk(tmp_path):
    config, context = tiny((0, 4, 128)), 700
    pool = CachePool(config, "f32", 1, 1024, drafts=True, device="meta")
    found = parked(config, "f32", context, 0, True)
    blocks = context // BLOCK_TOKENS
    assert found.ram_bytes == blocks * block_bytes(pool) + copied_bytes(pool, context)
    assert found.ram_bytes - parked(config, "f32", context, 300, True).ram_bytes == 2 * block_bytes(pool)
    tiers = Tiers(0, str(tmp_path), 1 << 40, "model", block_bytes(pool))
    name = tiers.root("")
    for at in range(blocks):
        ids = torch.full((BLOCK_TOKENS,), at, dtype=torch.int32).numpy().tobytes()
        label = Label(block_name(name, ids), name, ids, (at + 1) * BLOCK_TOKENS)
        tiers.put("block", label, torch.zeros(block_bytes(pool), dtype=torch.uint8))
        name = label.name
    tiers.put("state", label, torch.zeros(copied_bytes(pool, context), dtype=torch.uint8))
    files = [f.stat().st_size for f in tmp_path.iterdir()]
    assert len(files) == blocks + 1
    assert sum(-(-size // 4096) * 4096 for size in files) <= found.disk_bytes < sum(files) + 8192 * len(files)


def test_tensor_parallelism_repeats_the_history_and_a_pipeline_splits_it():
    whole = held(site(sessions=3, context=MILLION).places()[0], "kv")
    by_tensor = [held(p, "kv") for p in site(mode="tp", count=4, sessions=3, context=MILLION).places()]
    by_layer = [held(p, "kv") for p in site(mode="pp", count=4, sessions=3, context=MILLION).places()]
    assert by_tensor == [whole] * 4
    assert sum(by_layer) == whole
    assert max(by_layer) < 0.32 * whole


def test_a_context_split_deals_pages_out():
    whole = site(sessions=3, context=100_000).places()[0]
    split = site(mode="cp", count=3, sessions=3, context=100_000).places()
    for name, page in (("csa_kv", 21 * 584 * 64), ("index_k", 21 * 68 * 64), ("hca_kv", 20 * 584 * 64)):
        mine = [named(p, name) for p in split]
        assert sum(mine) == named(whole, name)
        assert max(mine) - min(mine) <= page
    assert [named(p, "windows") for p in split] == [named(whole, "windows")] * 3


@pytest.mark.parametrize("mode", ["ep", "dp"])
def test_sessions_are_dealt_out_to_replicas(mode):
    here = site(mode=mode, count=3, sessions=7, context=10_000)
    alone = {n: held(site(sessions=n, context=10_000).places()[0], "kv", "state") for n in (2, 3)}
    assert [held(p, "kv", "state") for p in here.places()] == [alone[3], alone[2], alone[2]]


def test_a_shared_prefix_is_held_once():
    apart = held(site(sessions=10, context=100_096).places()[0], "kv")
    shared = held(site(sessions=10, context=100_096, shared_prefix=90_112).places()[0], "kv")
    one = held(site(sessions=1, context=90_112).places()[0], "kv")
    assert 0.95 * 9 * one < apart - shared < 1.05 * 9 * one


def test_a_prefill_is_reserved_for_each_prompt_computed_and_for_no_session():
    def reserved(**asked):
        return held(site(context=65_536, **asked).places()[0], "reserve")

    assert reserved(sessions=1) == reserved(sessions=8) > 0
    assert reserved(sessions=8, prefilling=0) == 0
    assert 1.9 * reserved(sessions=8) < reserved(sessions=8, prefilling=2) <= 2 * reserved(sessions=8)
    assert reserved(sessions=8, step_tokens=2048) < 0.35 * reserved(sessions=8)


# Places


def test_csa_rows_on_the_host_leave_448_bytes_of_a_token_on_the_device():
    def rows(csa_host, sessions):
        here = site(sessions=sessions, context=MILLION, csa_host=csa_host, machine=gpus(1, ram=1 << 40))
        at = here.places()
        return sum(named(at[0], name) for name in ("csa_kv", "index_k", "hca_kv")), named(at[1], "csa_kv")

    assert rows(False, 2)[0] - rows(False, 1)[0] == 3514.25 * MILLION
    assert rows(True, 2)[0] - rows(True, 1)[0] == 448.25 * MILLION
    assert rows(True, 2)[1] - rows(True, 1)[1] == 3066 * MILLION


@pytest.mark.parametrize("mode", ["tp", "pp", "ep", "cp"])
def test_two_h200_hold_48_sessions_of_a_million_tokens_with_csa_rows_in_256_gb(mode):
    def at(csa_host):
        machine = gpus(2, H200, ram=256 * 10**9)
        return site(mode=mode, count=2, sessions=48, context=MILLION, csa_host=csa_host, machine=machine).places()

    assert fits(at(True))
    assert named(at(True)[-1], "csa_kv") == pytest.approx(48 * 3066 * MILLION, rel=1e-3)
    assert not fits(at(False))


def test_four_a100_by_the_vendors_arithmetic_hold_about_15_sessions_in_a_pipeline_and_4_by_tensors():
    # sessions = (0.90 M - W / n - 2.5 GiB) / K, with what a stage really has of weights and of the rows.
    K, room = 7_835_731_200, 0.9 * 80 * GIB - 2.5 * GIB
    assert (room - FLASH.stored_bytes / 4) / K == pytest.approx(4.43, abs=0.01)
    here = site(mode="pp", count=4, sessions=15, context=MILLION, machine=gpus(4, A100))
    cache, whole = here.cache(0), range(43)
    total = sum(cache.history_bytes(whole).values())
    found = [
        (room - sum(here.weights(rank).values())) / (K * sum(cache.history_bytes(here.layers(rank)).values()) / total)
        for rank in range(4)
    ]
    assert 14.5 < min(found) < 17.5


def test_without_accelerators_all_is_in_ram_with_the_systems_share():
    (ram,) = places(
        Asked(SMALL, processor(64 * GIB), kv_format="f32", context=4096), Layout.of("tp", 1), Placement(), 2
    )
    assert ram.name == "RAM" and ram.total_bytes == 64 * GIB
    assert held(ram, "weights") == SMALL.held_bytes("tiles")
    assert named(ram, "operating system") >= 2 * GIB
    assert named(ram, "snapshots") > 0


def test_one_memory_has_both_shares():
    here = site(mode="tp", count=2, machine=unified(131_072, 2))
    at = here.places()
    assert sum(named(p, "snapshots") for p in at) == here.snapshot_bytes
    assert [p.name for p in at] == ["one 0", "one 1"]
    assert all(named(p, "operating system") and named(p, "driver and allocator") for p in at)


def test_experts_off_the_devices_are_on_the_host_once():
    machine = gpus(2, ram=1 << 40, nvme=10**12)
    spread = Placement.of(100, 120, 256)
    for mode in MODES:
        at = site(mode=mode, count=2, machine=machine, placement=spread).places()
        assert [p.name for p in at] == ["card 0", "card 1", "RAM", "NVMe"]
        copies = 2 if mode == "dp" else 1
        routed = sum(named(p, "routed experts") for p in at[:2])
        total = routed / copies + named(at[2], "routed experts") + named(at[3], "routed experts")
        assert total == ledger(FLASH, "stored").experts(range(43), range(256))["routed experts"]
        assert routed / copies == pytest.approx(total * 100 / 256)


def test_experts_read_from_files_are_as_stored_and_those_in_memory_as_kernels_hold_them():
    machine = processor(64 * GIB, 10**12)
    near, far = (
        site(SMALL, machine=machine, kv_format="f32", context=4096, placement=Placement.of(n, 0, 8)).places()
        for n in (8, 3)
    )
    stored, tiles = (ledger(SMALL, form) for form in ("stored", "tiles"))
    assert stored.expert_sums != tiles.expert_sums
    assert named(far[1], "routed experts") == stored.experts(range(5), range(3, 8))["routed experts"]
    assert named(far[0], "routed experts") == stored.experts(range(5), range(3))["routed experts"]
    assert held(near[0], "weights") == SMALL.held_bytes("tiles")


def test_parked_sessions_fill_ram_and_then_the_disk():
    each = parked(FLASH.config, "fp8", MILLION, 0, True)
    machine = gpus(2, ram=64 * GIB, nvme=10**12)
    here = site(mode="pp", count=2, context=MILLION, machine=machine, parked=40)
    ram, disk = here.places()[2:]
    room = here.parked_in_ram
    assert 0 < room < 40
    assert named(ram, "parked sessions") == room * each.ram_bytes and 0 <= ram.free_bytes < each.ram_bytes
    assert named(disk, "parked sessions") == (40 - room) * each.disk_bytes
    no_disk = dataclasses.replace(here.asked, machine=gpus(2, ram=64 * GIB))
    assert not fits(places(no_disk, here.layout, here.placement, 1))


def test_unknown_ram_is_no_place_until_something_must_be_there():
    assert [p.name for p in site(count=1).places()] == ["card 0"]
    at = site(count=1, csa_host=True).places()
    assert [p.name for p in at] == ["card 0", "RAM"] and not fits(at)


def test_a_device_of_another_size_changes_nothing_but_what_is_free():
    small, large = (site(machine=gpus(1, mib)).places()[0] for mib in (A100, H200))
    assert small.items == large.items
    assert large.free_bytes - small.free_bytes == (H200 - A100) << 20


def test_parts_of_one_rank_are_those_of_the_ledger():
    book = ledger(FLASH, "stored")
    found = weight_bytes(book, Layout.of("tp", 1), 0, range(43), 256)
    assert sum(found.values()) == sum(book.layer_bytes(i) for i in range(43))
