"""The table of streams: exact bytes, per layer kind, and refusals that say what to use instead."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction

import pytest

from pyrosome.cache.streams import (
    BLOCK_TOKENS,
    FP4_GROUP,
    FP8_GROUP,
    KV_FORMATS,
    PAGE_ROWS,
    all_streams,
    draft_streams,
    index_row_bytes,
    kv_row_bytes,
    layer_streams,
    pages_for,
    plan_cache,
)
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError
from pyrosome.testing.shapes import tiny

FLASH, PRO = ModelConfig.preset("flash"), ModelConfig.preset("pro")
MILLION = 1_048_576


def growth(config: ModelConfig, kv_format: str) -> Fraction:
    streams = all_streams(config, kv_format, drafts=True)
    return sum((Fraction(s.row_bytes, s.per_tokens) for _, s in streams if s.is_history), Fraction())


# Per token: Flash has 21 CSA and 20 HCA layers, Pro 30 and 31.


@pytest.mark.parametrize(
    ("config", "kv_format", "per_token"),
    [
        (FLASH, "fp8", Fraction(351_425, 100)),
        (FLASH, "bf16", Fraction(6_880)),
        (FLASH, "f32", Fraction(13_760)),
        (PRO, "fp8", Fraction(50_314_375, 10_000)),
        (PRO, "bf16", Fraction(9_848)),
    ],
    ids=["flash-fp8", "flash-bf16", "flash-f32", "pro-fp8", "pro-bf16"],
)
def test_bytes_per_token(config, kv_format, per_token):
    assert growth(config, kv_format) == per_token
    for drafts in (False, True):  # a draft stage keeps a window, and no history
        assert Fraction(plan_cache(config, kv_format, 3, 5000, drafts=drafts).bytes_per_token) == per_token


@pytest.mark.parametrize(
    ("config", "kv_format", "history", "windows", "tails"),
    [
        (FLASH, "fp8", 3_684_958_208, 43 * 128 * 584, 21 * (65_536 + 16_384) + 20 * 524_288),
        (FLASH, "bf16", 7_214_202_880, 43 * 128 * 1024, 21 * (65_536 + 16_384) + 20 * 524_288),
        (PRO, "fp8", 5_275_844_608, 61 * 128 * 584, 30 * (65_536 + 16_384) + 31 * 524_288),
        (PRO, "bf16", 10_326_376_448, 61 * 128 * 1024, 30 * (65_536 + 16_384) + 31 * 524_288),
    ],
    ids=["flash-fp8", "flash-bf16", "pro-fp8", "pro-bf16"],
)
def test_bytes_of_one_sequence_of_a_million_tokens(config, kv_format, history, windows, tails):
    plan = plan_cache(config, kv_format, 1, MILLION)
    assert plan.state_bytes == windows + tails
    assert plan.sequence_bytes(MILLION) == history + windows + tails
    assert plan.sequence_bytes(0) == windows + tails


def test_the_published_bytes_of_one_flash_sequence():
    assert plan_cache(FLASH, "fp8", 1, MILLION).sequence_bytes(MILLION) == 3_700_378_624


def test_a_draft_stage_adds_its_window_and_the_last_streams():
    for config, kv_format, row in ((FLASH, "fp8", 584), (FLASH, "bf16", 1024), (PRO, "fp8", 584)):
        with_drafts, without = (plan_cache(config, kv_format, 1, MILLION, drafts=d) for d in (True, False))
        extra = 128 * row + 4 * config.hidden_size * 4
        assert with_drafts.state_bytes - without.state_bytes == extra
        assert with_drafts.sequence_bytes(MILLION) - without.sequence_bytes(MILLION) == extra


# Rows.


@pytest.mark.parametrize(
    ("shape", "kv_format", "kv_bytes", "index_bytes"),
    [
        ("flash", "fp8", 584, 68),
        ("flash", "bf16", 1024, 256),
        ("flash", "f32", 2048, 512),
        ("80-16-32", "fp8", 104, 17),
        ("96-32-32", "fp8", 136, 17),
        ("80-16-32", "bf16", 160, 64),
        ("80-16-32", "f32", 320, 128),
        ("640-64-64", "fp8", 576 + 128 + 16, 34),  # nine scales are padded to sixteen bytes
    ],
)
def test_bytes_of_a_row(shape, kv_format, kv_bytes, index_bytes):
    if shape == "flash":
        config = FLASH
    else:
        head, rope, index = map(int, shape.split("-"))
        config = tiny(head_dim=head, qk_rope_head_dim=rope, index_head_dim=index)
    assert (kv_row_bytes(config, kv_format), index_row_bytes(config, kv_format)) == (kv_bytes, index_bytes)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tiny(head_dim=100), ["84 channels", "head_dim 100", "qk_rope_head_dim 16", "64", "kv_format='f32' or 'bf16'"]),
        (tiny(index_head_dim=16), ["16 channels", "FP4", "32", "kv_format='f32' or 'bf16'"]),
    ],
    ids=["kv", "index"],
)
def test_a_shape_that_fp8_rows_cannot_hold_is_refused_with_a_way_out(config, said):
    with pytest.raises(CheckpointError) as caught:
        plan_cache(config, "fp8", 1, 100)
    assert all(part in str(caught.value) for part in said)
    for kv_format in ("f32", "bf16"):
        assert plan_cache(config, kv_format, 1, 100).total_bytes > 0


def test_an_index_width_matters_only_where_there_is_an_indexer():
    assert plan_cache(tiny((0, 128), index_head_dim=16), "fp8", 1, 100).total_bytes > 0


@pytest.mark.parametrize("kv_format", ["fp16", "", "FP8", "int8"])
def test_an_unknown_format_is_refused_with_the_known_ones(kv_format):
    for config in (tiny(), tiny((0,))):
        with pytest.raises(CheckpointError, match=rf"{kv_format!r} is unknown; it is one of f32, bf16, fp8"):
            plan_cache(config, kv_format, 1, 100)


# The table.

TABLE = {
    0: [("window_kv", 1, 512, 584, 128)],
    4: [
        ("window_kv", 1, 512, 584, 128),
        ("csa_kv", 4, 512, 584, None),
        ("index_k", 4, 128, 68, None),
        ("tail", 1, 2048, 8192, 8),
        ("index_tail", 1, 512, 2048, 8),
    ],
    128: [("window_kv", 1, 512, 584, 128), ("hca_kv", 128, 512, 584, None), ("tail", 1, 1024, 4096, 128)],
}


@pytest.mark.parametrize("ratio", TABLE)
def test_streams_of_each_kind_of_layer(ratio):
    streams = layer_streams(FLASH, ratio, "fp8")
    assert [(s.name, s.per_tokens, s.width, s.row_bytes, s.keep) for s in streams] == TABLE[ratio]
    for s in streams:
        assert s.is_history == (s.keep is None) == s.name.endswith(("csa_kv", "hca_kv", "index_k"))
        assert s.format == ("f32" if s.name.endswith("tail") else "fp8")
        assert s.bytes_per_token() == (s.row_bytes / s.per_tokens if s.is_history else 0)


@pytest.mark.parametrize("ratio", [2, 8, 16, 32, 64])
def test_every_other_ratio_is_pooled_like_hca(ratio):
    window, rows, tail = layer_streams(FLASH, ratio, "fp8")
    assert (rows.name, rows.per_tokens, tail.name, tail.keep) == ("hca_kv", ratio, "tail", ratio)
    assert window.name == "window_kv"


def test_streams_of_the_draft_stage():
    streams = [(s.name, s.width, s.row_bytes, s.keep, s.reads_own) for s in draft_streams(FLASH, "fp8")]
    assert streams == [("draft_kv", 512, 584, 128, True), ("draft_hidden", 16384, 65536, 1, False)]


def test_every_layer_of_flash_and_the_draft_stage_after_the_last():
    found: dict[int, list[str]] = {}
    for layer, s in all_streams(FLASH, "fp8", drafts=True):
        found.setdefault(layer, []).append(s.name)
    assert sorted(found) == list(range(44))
    assert found.pop(43) == ["draft_kv", "draft_hidden"]
    assert [found[i] for i in range(43)] == [[row[0] for row in TABLE[r]] for r in FLASH.layer_ratios]
    assert 43 not in dict(all_streams(FLASH, "fp8", drafts=False))


# Rings and pages.


@pytest.mark.parametrize("num_drafts", range(8))
def test_a_ring_is_the_smallest_that_survives_rejection(num_drafts):
    """Enumerated: rows written beyond the first of a step are rejected, and the next step still reads what it needs."""
    streams = [s for r in (0, 4, 128) for s in layer_streams(tiny(), r, "f32")] + list(draft_streams(tiny(), "f32"))
    for s in streams:
        if s.is_history:
            with pytest.raises(ValueError, match=s.name):
                s.ring_rows(num_drafts)
            continue

        def survives(rows: int, s=s) -> bool:
            kept = 1000  # positions 0..kept - 1 are kept; a step wrote kept - 1 and num_drafts rejected ones after it
            held = {p % rows: p for p in range(kept)} | {p % rows: p for p in range(kept, kept + num_drafts)}
            first = kept - s.keep + (1 if s.reads_own else 0)
            return all(held[p % rows] == p for p in range(first, kept))

        rows = s.ring_rows(num_drafts)
        assert survives(rows)
        if num_drafts > 1 or (num_drafts == 1 and not s.reads_own):
            assert not survives(rows - 1)
        assert rows >= s.keep


@pytest.mark.parametrize("ratio", [1, 4, 8, 128])
def test_pages_hold_all_rows_and_no_page_is_spare(ratio):
    for context in range(0, 3 * PAGE_ROWS * ratio, max(1, ratio // 3)):
        pages = pages_for(context, ratio)
        assert (pages - 1) * PAGE_ROWS < context // ratio <= pages * PAGE_ROWS or (pages == 0 and context < ratio)


def test_a_plan_adds_up():
    plan = plan_cache(FLASH, "fp8", 5, 20_000, num_drafts=3, drafts=True)
    assert plan.num_slots == 6
    assert plan.num_pages == {4: 5 * 79 + 1, 128: 5 * 3 + 1}  # 5,000 and 156 rows of 64 a page
    assert plan.page_bytes == {4: 21 * 64 * (584 + 68), 128: 20 * 64 * 584}
    assert plan.table_bytes == 8 * 6 * (79 + 3)
    assert plan.total_bytes == 6 * plan.state_bytes + 396 * 876_288 + 16 * 747_520 + plan.table_bytes


def test_a_sequence_is_counted_by_the_rows_it_has_finished():
    plan = plan_cache(FLASH, "fp8", 1, MILLION)
    rows = {4: 21 * (584 + 68), 128: 20 * 584}
    for context in (0, 1, 3, 4, 7, 8, 127, 128, 255, 256, 1000):
        grown = plan.sequence_bytes(context) - plan.state_bytes
        assert grown == rows[4] * (context // 4) + rows[128] * (context // 128)


def test_constants_fit_each_other():
    from pyrosome import config
    from pyrosome.quant import activation, rows

    assert FP8_GROUP == rows.KV_GROUP == activation.KV_GROUP and FP4_GROUP == rows.INDEX_GROUP
    assert BLOCK_TOKENS == config.BLOCK_TOKENS
    assert KV_FORMATS == ("f32", "bf16", "fp8")


def test_a_plan_needs_no_torch():
    code = """
import sys
from pyrosome.cache.streams import plan_cache
from pyrosome.config import ModelConfig
print(plan_cache(ModelConfig.preset("flash"), "fp8", 1, 1048576).sequence_bytes(1048576), "torch" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["3700378624", "False"]
