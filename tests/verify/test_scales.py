"""Values as training leaves them pass; every sort of damage is named by its tensor."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from pyrosome.checkpoint.index import locate
from pyrosome.verify import scales
from pyrosome.verify.finding import Wanted
from pyrosome.verify.scales import check, outliers
from tests.checkpoint.files import SHARD, copied, read_entries, rewrite

FP4, FP8 = "layers.1.ffn.experts.2.w1", "layers.0.attn.wq_a"
FLOAT, TABLE = "layers.2.attn.compressor.wkv.weight", "layers.0.ffn.gate.tid2eid"


@pytest.fixture
def path(tmp_path):
    return copied(tmp_path)


def found(path, **wanted):
    return list(check(Wanted(str(path), **wanted)))


def failed(findings):
    return {f.what for f in findings if f.ok is False}


def changed(path, name, change):
    """Rewrite one tensor's bytes."""
    dtype, shape, data = read_entries(path / SHARD)[name]
    array = np.frombuffer(data, dtype=np.uint8).copy()
    rewrite(path, {name: (dtype, shape, change(array).astype(np.uint8).tobytes())})


def set_to(at, value):
    def change(array):
        array[at] = value
        return array

    return change


@pytest.mark.parametrize("name", ["golden/fp8fp4", "golden/bf16", "golden_dspark/fp8fp4"])
def test_sound_weights_pass(name, tmp_path):
    findings = found(copied(tmp_path, name))
    assert failed(findings) == set() and findings[-1].what == "value RMS" and not findings[-1].warns


def test_the_built_in_model_passes_and_every_tensor_was_looked_at():
    findings = {f.what: f for f in found("builtin:nano")}
    assert failed(findings.values()) == set()
    num = sum(findings[s].figures["tensors"] for s in ("E8M0 scales", "FP8 codes", "FP4 codes", "floats", "tables"))
    assert num == 427
    shares = findings["FP4 codes"].figures["plots"][0]["series"]["share"]
    assert len(shares) == 16 and sum(shares) == pytest.approx(1.0) and max(shares) < 0.3


DAMAGE = {
    "a scale that is NaN": (f"{FP4}.scale", set_to(3, 255), "E8M0 scales", "1 of .* NaN"),
    "a scale far above the others": (f"{FP4}.scale", set_to(0, 200), "E8M0 scales", "times the median scale"),
    "an FP8 code that is NaN": (f"{FP8}.weight", set_to(9, 0x7F), "FP8 codes", "1 of .* codes are NaN"),
    "FP8 codes that are all one": (f"{FP8}.weight", lambda a: a * 0 + 0x38, "FP8 codes", "the same one"),
    "FP4 codes that are all zero": (f"{FP4}.weight", lambda a: a * 0, "FP4 codes", "are zero"),
    "FP4 codes that are noise": (
        f"{FP4}.weight",
        lambda a: np.random.default_rng(0).permutation(np.arange(len(a)) % 256),
        "FP4 codes",
        "as in noise",
    ),
    "a float that is infinite": (FLOAT, lambda a: set_to(slice(0, 2), (0x80, 0x7F))(a), "floats", "NaN or infinite"),
    "a float whose exponent lost a bit": (FLOAT, set_to(slice(0, 2), (0x00, 0x7E)), "floats", "no weight is above"),
    "floats that are all zero": (FLOAT, lambda a: a * 0, "floats", "are zero"),
    "an expert that there is not": (TABLE, set_to(0, 99), "tables", "names experts 0 to 99"),
    "an expert named twice": (TABLE, lambda a: set_to(slice(0, 8), a[8:16])(a), "tables", "twice"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, path):
    name, change, sort, said = DAMAGE[damage]
    changed(path, name, change)
    findings = found(path)
    (named,) = (f for f in findings if f.what == name)
    assert named.ok is False and re.search(said, named.detail), named.detail
    assert failed(findings) == {name, sort}


def test_a_block_that_is_not_zero_under_a_tiny_scale_is_named(path):
    changed(path, f"{FP4}.scale", set_to(0, 2))
    (named,) = (f for f in found(path) if f.what == f"{FP4}.weight")
    assert named.ok is False and "the block at (0, 0)" in named.detail


TWINS = {
    "layers.2.ffn.experts.1.w1.weight": ("layers.1.ffn.experts.1.w1.weight", "FP4 codes"),
    "layers.3.attn.wq_b.weight": ("layers.1.attn.wq_b.weight", "FP8 codes"),
    "layers.3.attn.compressor.wkv.weight": ("layers.1.attn.compressor.wkv.weight", "floats"),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_tensor_in_the_place_of_another_is_named(name, tmp_path):
    other, sort = TWINS[name]
    shutil.copytree(locate("builtin:nano"), path := tmp_path / "nano")
    rewrite(path, {name: read_entries(path / SHARD)[other]})
    findings = found(path)
    (named,) = (f for f in findings if f.what in (name, other))
    assert failed(findings) == {named.what, sort}
    assert f"the same bytes as {({name, other} - {named.what}).pop()}" in named.detail


def test_scales_in_the_place_of_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(scales, "MIN_CODES", 256)  # the built-in model's are few
    shutil.copytree(locate("builtin:nano"), path := tmp_path / "nano")
    name, other = (f"layers.{i}.ffn.experts.1.w1.scale" for i in (2, 1))
    rewrite(path, {name: read_entries(path / SHARD)[other]})
    (named,) = (f for f in found(path) if f.what in (name, other))
    assert named.ok is False and "the same bytes as layers." in named.detail


def test_many_damaged_tensors_are_counted_and_not_all_listed(path):
    entries = read_entries(path / SHARD)
    bad = {n: (d, s, b"\xff" * len(b)) for n, (d, s, b) in entries.items() if n.endswith(".scale")}
    rewrite(path, bad)
    findings = found(path)
    assert len(bad) > 30 and sum(f.what in bad for f in findings) == 20
    (more,) = (f for f in findings if f.what == "more tensors")
    assert more.detail.startswith(f"{len(bad) - 20} more")


def test_a_weight_without_its_scale_is_named_and_the_rest_looked_at(path):
    rewrite(path, {f"{FP8}.scale": None})
    findings = found(path)
    assert f"{FP8}.weight" in failed(findings) and {f.what: f.ok for f in findings}["FP4 codes"]


def test_a_quick_look_takes_fewer_experts_and_other_ones_by_seed(tmp_path):
    path = tmp_path / "nano"
    shutil.copytree(locate("builtin:nano"), path)

    def looked_at(**wanted):
        return {f.what: f for f in found(path, **wanted)}["FP4 codes"].figures["tensors"]

    assert 0 < looked_at(quick=True) == looked_at() / 2
    changed(path, f"{FP4}.weight", lambda a: a * 0)
    seen = [f"{FP4}.weight" in failed(found(path, quick=True, seed=s)) for s in range(6)]
    assert True in seen and False in seen


def test_a_tensor_far_from_its_kind_is_told_and_does_not_fail():
    alike = {f"layers.{i}.x": 0.02 * (1 + 0.01 * (i % 3)) for i in range(12)}
    assert list(outliers(alike)) == []
    ((name, rms, median),) = outliers(alike | {"layers.12.x": 0.9})
    assert (name, rms) == ("layers.12.x", 0.9) and median == pytest.approx(0.0202, rel=0.05)
    assert list(outliers({"a": 1.0, "b": 100.0})) == []  # too few to say what is usual


def test_a_scaled_matrix_is_told(path):
    """An expert whose every scale is 2^9 times larger is unlike its kind, and nothing else is wrong with it."""
    changed(path, f"{FP4}.scale", lambda a: a + 9)
    findings = found(path)
    assert failed(findings) == set() and findings[-1].warns
    assert [u["tensor"] for u in findings[-1].figures["unlike"]] == [f"{FP4}.weight"]
