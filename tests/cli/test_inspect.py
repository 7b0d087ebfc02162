"""`pyrosome inspect`, and the headers without data it is measured on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.names import official_bytes
from pyrosome.cli.inspect import describe
from pyrosome.config import ModelConfig
from pyrosome.plan.inventory import count_parameters
from pyrosome.testing.headers import write_headers
from pyrosome.testing.shapes import tiny
from tests.checkpoint.files import copied, rewrite
from tests.cli.sessions import REAL, ROOT, at_terminal, ended, environment, piped, seen

FINAL_NORM_AND_COLLAPSE, ROUTING_BIASES = 69_637, 40 * 256


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The 0731 release's headers, and no data."""
    path = tmp_path_factory.mktemp("official")
    assert write_headers(path) == 166_878_536_440
    return path


@pytest.fixture(scope="module")
def few_experts(tmp_path_factory):
    """The same layers with fewer experts: read in no time."""
    path = tmp_path_factory.mktemp("few")
    write_headers(path, ModelConfig.preset("flash-0731", n_routed_experts=8))
    return path


def inspect(path, *args, home=None, **kwargs):
    return piped(home or ROOT, "inspect", str(path), *args, program=REAL, **kwargs)


def test_headers_are_those_of_the_release_and_take_no_space(official):
    shards = list(official.glob("*.safetensors"))
    assert 166_878_536_440 < sum(s.stat().st_size for s in shards) < 166_900_000_000
    assert sum(s.stat().st_blocks * 512 for s in official.iterdir()) < 100 << 20
    assert open_checkpoint(official).check().ok


def test_headers_of_other_shapes_and_shard_sizes(tmp_path):
    config = ModelConfig.preset("flash", num_hidden_layers=4, compress_ratios=(0, 0, 4, 128, 0))
    assert write_headers(tmp_path, config, max_shard_bytes=1 << 30) == official_bytes(config, 1)
    index = open_checkpoint(tmp_path)
    assert index.check().ok and index.num_stages == 1 and len({t.file for t in index.tensors.values()}) > 10


def test_the_release_is_described_from_headers_alone(official):
    found = describe(open_checkpoint(official))
    assert found["ok"] and found["release"] == "0731" and found["tensors"] == 72_317
    assert found["bytes"] == 166_878_536_440 == sum(g["bytes"] for g in found["by_part"].values())
    assert found["by_dtype"]["I8"]["bytes"] == 148_176_371_712
    assert found["draft"] == {"type": "DSpark", "stages": 3, "block_size": 5, "target_layers": [40, 41, 42]}
    assert [x["attention"] for x in found["layers"]] == ["window"] * 2 + ["CSA", "HCA"] * 20 + ["CSA"]
    assert [x["routing"] for x in found["layers"]] == ["hash"] * 3 + ["bias"] * 40
    assert found["kv"]["fp8"]["at"]["1048576"] == 3_700_378_624
    assert found["kv"]["bf16"]["at"]["1048576"] == 7_232_045_056


@pytest.mark.parametrize(
    ("preset", "stages", "trunk", "active", "draft"),
    [
        ("flash", 1, 284_332_240_471, 13_270_021_714 + FINAL_NORM_AND_COLLAPSE + ROUTING_BIASES, 6_610_048_891),
        ("flash-0731", 3, 284_332_240_471, 13_270_021_714 + FINAL_NORM_AND_COLLAPSE + ROUTING_BIASES, 19_845_850_983),
        ("pro", 0, 1_572_997_201_763, None, 0),
    ],
)
def test_parameters_are_counted_as_published(preset, stages, trunk, active, draft):
    counted = count_parameters(ModelConfig.preset(preset), stages)
    assert (counted["trunk"], counted["draft"]) == (trunk, draft)
    assert active is None or counted["active"] == active


def test_reading_headers_needs_no_torch_and_little_memory(official, tmp_path):
    code = """
import sys
from pyrosome.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = [m for m in ("torch", "numpy", "safetensors") if m in sys.modules]
with open("/proc/self/status") as f:  # not getrusage: a child begins with its parent's peak there
    peak = next(line.split()[1] for line in f if line.startswith("VmHWM"))
print(peak, *heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(official)],
        capture_output=True,
        env=environment(tmp_path),
        check=True,
    )
    peak_kib, *imported = done.stdout.splitlines()[-1].split()
    assert imported == []
    assert int(peak_kib) < 500 * 1024


def test_the_layer_map_is_drawn(few_experts, tmp_path):
    shown = inspect(few_experts, home=tmp_path).stdout.decode()
    assert "attend  ··" + "CH" * 20 + "C\n" in shown and "route   hhh" + "b" * 40 + "\n" in shown
    assert (
        "0         10        20        30        40\n" in shown
        and "3,700,378,624" in shown
        and "DSpark, 3 stage(s)" in shown
    )


@pytest.mark.parametrize("columns", [20, 60])
def test_a_narrow_terminal_gets_a_map_in_pieces_and_no_line_too_long(few_experts, tmp_path, columns):
    child = at_terminal(tmp_path, "inspect", str(few_experts), program=REAL, columns=columns)
    assert ended(child) == 0
    lines = seen(child).plain.splitlines()
    assert max(map(len, lines)) <= columns
    assert "".join(line[8:] for line in lines if line.startswith("attend  ")) == "··" + "CH" * 20 + "C"


def test_without_colour_there_is_no_escape_sequence(tmp_path):
    child = at_terminal(tmp_path, "inspect", "builtin:nano", program=REAL, NO_COLOR="1")
    assert ended(child) == 0 and "\x1b" not in seen(child).text


def test_what_does_not_fit_is_listed_with_status_1(tmp_path):
    path = copied(tmp_path)
    rewrite(path, {
        "norm.weight": None, "stray\x1b[31m.weight": ("F32", (1,), bytes(4)), "hc_head_scale": ("F32", (2,), bytes(8)),
        "layers.0.attn_norm.weight": ("I32", (64,), bytes(256)),
    })  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "surprise": 1}))
    done = inspect(path, home=tmp_path)
    shown = done.stdout.decode()
    assert done.returncode == 1
    assert "missing: norm.weight" in shown and "unexpected: stray·[31m.weight" in shown
    assert "wrong shape: hc_head_scale: found [2], expected [1]" in shown
    assert "wrong dtype: layers.0.attn_norm.weight: I32" in shown and "surprise" in shown
    done = inspect(path, "--json", home=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and not found["ok"]
    assert found["missing"] == ["norm.weight"] and found["unknown_config_keys"] == ["surprise"]


def test_draft_stages_that_fit_no_release_are_a_finding_too(tmp_path):
    path = copied(tmp_path, "golden_dspark/fp8fp4")
    config = json.loads((path / "config.json").read_text())
    kept = {k: v for k, v in config.items() if not k.startswith("dspark_")}
    kept["compress_ratios"] = kept["compress_ratios"][: kept["num_hidden_layers"] + kept["num_nextn_predict_layers"]]
    (path / "config.json").write_text(json.dumps(kept))
    done = inspect(path, "--json", home=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and "no dspark_* keys" in found["problem"] and found["parameters"]["draft"] == 0


def test_a_row_format_that_cannot_store_a_shape_is_said_and_no_failure(tmp_path):
    write_headers(tmp_path, tiny(head_dim=64))
    done = inspect(tmp_path, home=tmp_path)
    assert done.returncode == 0
    assert b"fp8: kv_format 'fp8' stores" in done.stdout and b"bf16" in done.stdout


@pytest.mark.parametrize("name", ["/no/such/model", "builtin:none", str(ROOT / "pyproject.toml"), str(ROOT / "tests")])
def test_what_is_no_checkpoint_is_one_line_and_status_2(tmp_path, name):
    done = inspect(name, home=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"pyrosome: ") and done.stderr.count(b"\n") == 1
