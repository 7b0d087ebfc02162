"""The inventory of tensors: what presets and checkpoints store, and what each form of holding takes."""

from __future__ import annotations

import pytest

from pyrosome.cache.pool import CachePool
from pyrosome.cache.streams import FP8_INDEX, check_kv_format, layer_streams, plan_cache
from pyrosome.checkpoint.names import expected_tensors, official_bytes
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, PlanError, RequestError
from pyrosome.plan.inventory import PARTS, Model, StoredTensor, add_up, held_bytes, part_of
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.headers import write_headers
from pyrosome.testing.shapes import OFFICIAL_QUANTIZATION, tiny

FLASH = Model.open("flash")
FP8_SCALES = 66_048 + 10_752  # of shared experts and of the indexers' wq_b, which the INT4 reading stores in BF16

# planner.md section 2, in weights; hyper-connections are those of layers and of the last collapse.
PARAMETERS = {
    "routed experts": 277_025_390_592, "shared experts": 1_082_130_432, "attention": 4_599_123_136,
    "indexer": 225_730_176, "compressors": 261_464_576, "routers": 45_099_008, "hyper-connections": 33_884_439,
    "norms": 356_352, "embedding": 529_530_880, "head": 529_530_880, "draft head": 6_610_048_891,
}  # fmt: skip


def counted(model: Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for t in model.tensors:
        found[t.part] = found.get(t.part, 0) + t.numel * (t.kind != "table")
    return found


def test_parameters_of_flash_are_those_published_part_by_part():
    assert counted(FLASH) == PARAMETERS
    assert set(PARAMETERS) == set(PARTS)
    assert FLASH.parameters == {
        "trunk": 284_332_240_471, "draft": 6_610_048_891, "active": 13_270_021_714 + 69_637 + 40 * 256,
    }  # fmt: skip
    assert sum(PARAMETERS.values()) == 284_332_240_471 + 6_610_048_891


@pytest.mark.parametrize(
    ("weights", "num_stages", "num_bytes"),
    [
        ("native", 1, 159_609_485_896),
        ("native", 0, 156_015_698_140),
        ("bf16", 0, 568_753_728_604),
        ("w4a16", 0, 152_945_390_812),
        ("fp8", 0, 285_888_258_268),
    ],
)
def test_weights_of_flash_take_the_published_bytes(weights, num_stages, num_bytes):
    assert Model.of(FLASH.config, num_stages, weights).stored_bytes == num_bytes


def test_int4_experts_make_up_the_published_checkpoint_to_a_megabyte():
    model = Model.of(FLASH.config, 0, "w4a16")
    assert abs(model.stored_bytes - 152.945e9) < 1e6
    assert model.stored_bytes == 151_687_176_412 + 1_082_130_432 + 176_160_768 - FP8_SCALES
    (expert,) = {t.stored_bytes for t in model.tensors if t.expert == 0 and t.layer == 5 and ".w1." in t.name}
    assert expert == 2048 * (4096 // 2 + 4096 // 128 * 2)


def test_the_0731_release_is_stored_whole_and_loaded_without_its_draft_stages():
    model = Model.open("flash-0731")
    assert model.stored_bytes == 166_878_536_440
    assert sum(1 + (t.dtype in ("I8", "F8_E4M3")) for t in model.tensors) == 72_317
    assert (model.num_stages, model.num_stored_stages) == (0, 3)
    assert sum(t.stored_bytes for t in model.held) == 156_015_698_140
    assert "3 DSpark draft stages (10,862,838,300 bytes)" in model.left_out
    assert not FLASH.left_out and FLASH.held == FLASH.tensors


def test_layers_and_experts_are_told_by_number():
    found = {t.name: t for t in FLASH.tensors}
    assert found["layers.7.ffn.experts.31.w2.weight"].layer == 7
    assert found["layers.7.ffn.experts.31.w2.weight"].expert == 31
    assert found["mtp.0.ffn.experts.5.w1.weight"].layer == FLASH.config.num_hidden_layers
    assert found["mtp.0.ffn.experts.5.w1.weight"].expert == 5
    assert (found["embed.weight"].layer, found["layers.7.ffn.gate.weight"].expert) == (-1, -1)
    by_layer = add_up(FLASH.tensors, lambda t: t.layer)
    assert set(by_layer) == set(range(-1, 44)) and sum(by_layer.values()) == FLASH.stored_bytes


def test_every_tensor_has_a_part_and_a_foreign_name_has_none():
    for preset in ("flash", "flash-0731", "pro"):
        assert {t.part for t in Model.open(preset).tensors} == set(PARTS)
    assert part_of("visual.patch_embed.weight") == part_of("layers.0.mlp.up_proj.weight") == ""


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_official_storage_and_the_inventory_are_one(preset):
    model = Model.open(preset)
    assert model.stored_bytes == official_bytes(model.config, 1)
    assert {t.name: t.shape for t in model.tensors} == {
        n: s.shape for n, s in expected_tensors(model.config, 1).items()
    }


def test_headers_of_a_release_are_the_preset(tmp_path):
    few = ModelConfig.preset("flash", n_routed_experts=8, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0))
    assert write_headers(tmp_path, few) == Model.of(few, 1).stored_bytes
    model = Model.open(str(tmp_path))
    assert sorted(model.tensors, key=lambda t: t.name) == sorted(Model.of(few, 1).tensors, key=lambda t: t.name)


def test_a_checkpoint_is_taken_as_it_is_stored(tmp_path):
    config = tiny((0, 4))
    path = random_checkpoint(tmp_path / "m", config, layout="f32")
    model = Model.open(str(path))
    assert {t.dtype for t in model.tensors} == {"F32", "I64"}
    assert model.stored_bytes == sum(t.numel * (8 if t.kind == "table" else 4) for t in model.tensors)
    assert Model.open("builtin:nano").stored_bytes > 0


def tensor(name: str, shape: tuple[int, ...], dtype: str, stored: int, **more) -> StoredTensor:
    return StoredTensor(name, "attention", 0, -1, shape, dtype, stored, **more)


@pytest.mark.parametrize(
    ("held", "form", "num_bytes"),
    [
        (tensor("wq_a", (1024, 4096), "F8_E4M3", 4_194_560), "stored", 4_194_560),
        (tensor("wq_a", (1024, 4096), "F8_E4M3", 4_194_560), "tiles", 1024 * (4096 + 32)),
        (tensor("wq_a", (1024, 4096), "F8_E4M3", 4_194_560), "float32", 4 * 1024 * 4096),
        # 24 rows of 2 groups of 12: each group is a tile of 32 rows, its 40 inputs one group of 128
        (tensor("wo_a", (24, 40), "F8_E4M3", 961, groups=2), "tiles", 2 * 32 * (128 + 1)),
        (tensor("w1", (65, 64), "I8", 65 * 34, kind="expert"), "tiles", (64 + 32) * 2 * (16 + 1)),
        (tensor("embed", (160, 64), "BF16", 20_480, kind="plain"), "tiles", 20_480),
        (tensor("gate", (8, 64), "BF16", 1024, kind="router"), "tiles", 2048),
        (tensor("norm", (64,), "BF16", 128, kind="vector"), "stored", 256),
        (tensor("tid2eid", (160, 3), "I32", 1920, kind="table"), "float32", 3840),
    ],
)
def test_a_loaded_tensor_takes_what_its_form_says(held, form, num_bytes):
    assert held_bytes(held, form) == num_bytes


def test_weights_the_kernels_do_not_read_are_refused():
    with pytest.raises(PlanError, match=r"is I4 and the CPU kernels read .*; take native weights"):
        Model.of(tiny((0,), quantization=OFFICIAL_QUANTIZATION), 0, "w4a16").held_bytes("tiles")
    with pytest.raises(PlanError, match="form 'rows' was asked for; weights are held as one of stored, tiles"):
        held_bytes(tensor("wq_a", (8, 8), "F8_E4M3", 65), "rows")


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: Model.open("flush"), CheckpointError, "flush is neither a file nor a known model; give flash, "),
        (lambda: Model.open("flash", "q4"), RequestError, "weights are 'q4'; they are one of native, fp8"),
        (lambda: Model.open("builtin:nano", "bf16"), RequestError, "whose headers say what it stores; leave them out"),
        (lambda: Model.open("builtin:giant"), CheckpointError, "built in are builtin:nano"),
        (lambda: Model.of(FLASH.config, 2), RequestError, "2 draft stages were asked for; .* has 0 to 1"),
        (lambda: Model.of(FLASH.config, -1), RequestError, "-1 draft stages were asked for"),
        (lambda: Model.of(FLASH.config, True), RequestError, "True draft stages were asked for"),
        (lambda: Model.of(FLASH.config, float("nan")), RequestError, "nan draft stages were asked for"),
        (lambda: Model.open(""), CheckpointError, "a model was asked for as ''; give flash"),
        (lambda: Model.open(7), CheckpointError, "a model was asked for as 7; give flash"),
    ],
)
def test_nonsense_is_refused_with_what_to_do(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


def test_a_checkpoint_with_a_tensor_missing_is_refused(tmp_path):
    path = random_checkpoint(tmp_path / "m", tiny((0,)), num_stages=0)
    (path / "config.json").write_text(
        (path / "config.json").read_text().replace('"n_routed_experts": 8', '"n_routed_experts": 9')
    )
    with pytest.raises(CheckpointError, match="missing: layers"):
        Model.open(str(path))


# planner.md section 2: (whole sequence, a CSA layer, an HCA layer) at 1,048,576 tokens.
KV_BYTES = {
    "bf16": (7_232_045_056, 335_757_312, 9_043_968),
    FP8_INDEX: (4_052_700_160, 187_851_776, 5_383_168),
    "fp8": (3_700_378_624, 171_074_560, 5_383_168),
}


@pytest.mark.parametrize("kv_format", KV_BYTES)
def test_history_of_a_million_tokens_takes_the_published_bytes(kv_format):
    tokens = 1 << 20
    layers = [
        sum(
            s.row_bytes * (tokens // s.per_tokens if s.is_history else s.ring_rows())
            for s in layer_streams(FLASH.config, ratio, kv_format)
        )
        for ratio in (4, 128)
    ]
    assert (plan_cache(FLASH.config, kv_format, 1, tokens).sequence_bytes(tokens), *layers) == KV_BYTES[kv_format]


def test_other_engines_index_keys_are_planned_with_and_not_allocated():
    rows = {s.name: s.row_bytes for s in layer_streams(FLASH.config, 4, FP8_INDEX)}
    assert (rows["csa_kv"], rows["index_k"]) == (584, 132)
    with pytest.raises(CheckpointError, match="kv_format 'fp8-index8' is unknown; it is one of f32, bf16, fp8"):
        check_kv_format(FLASH.config, FP8_INDEX)
    with pytest.raises(CheckpointError, match="kv_format 'fp8-index8' is unknown; it is one of f32, bf16, fp8"):
        CachePool(tiny((0, 4), head_dim=80), FP8_INDEX, 1, 64)
