"""Files as they are, and every way in which they can be other files than they claim to be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil

import pytest

from pyrosome.checkpoint.index import locate
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, RequestError
from pyrosome.verify.files import check, folder_of, read_sums
from pyrosome.verify.finding import Wanted
from tests.checkpoint.files import INDEX, SHARD, copied, rewrite, split


def found(path, **wanted):
    return {f.what: f for f in check(Wanted(str(path), **wanted))}


def failed(findings):
    return {what for what, f in findings.items() if f.ok is False}


@pytest.fixture
def path(tmp_path):
    """A sound checkpoint of three shards with its checksums."""
    path = copied(tmp_path)
    shards = split(path, 3)
    sums(path, [*shards, "config.json"])
    return path


def sums(path, names):
    lines = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (path / "SHA256SUMS").write_text("".join(lines))


def test_a_sound_checkpoint_passes_with_every_shard_hashed(path):
    findings = found(path)
    assert failed(findings) == set() and not any(f.warns for f in findings.values() if f.what != f"{INDEX} total_size")
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert all(findings[s].ok and findings[s].figures["bytes"] == (path / s).stat().st_size for s in shards)
    assert findings["headers"].figures["shards"] == 3


def test_the_built_in_model_has_its_checksums():
    """They must be made again when its weights are: `sha256sum config.json *.safetensors tokenizer.json`."""
    findings = found("builtin:nano")
    assert all(f.ok for f in findings.values()) and findings[SHARD].figures["sha256"]


def test_one_changed_byte_is_found(path):
    shard = sorted(path.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    assert failed(found(path)) == {shard.name}


def test_a_file_that_the_list_names_and_one_it_does_not(path):
    extra = path / "more.safetensors"
    shutil.copy(sorted(path.glob("*.safetensors"))[0], extra)
    with (path / "SHA256SUMS").open("a") as f:
        f.write(f"{'0' * 64}  gone.json\n")
    findings = found(path)
    assert failed(findings) == {"gone.json", "more.safetensors"}
    assert findings["stray files"].figures["stray"] == ["more.safetensors"] and findings["stray files"].warns


def test_two_shards_of_the_same_bytes_are_found(path):
    first, second = sorted(path.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    (path / "SHA256SUMS").unlink()
    findings = list(check(Wanted(str(path))))
    assert [f.what for f in findings if f.ok is False and "same bytes" in f.detail] == [second.name]


def test_without_a_list_hashes_are_told_and_compared_with_nothing(path):
    (path / "SHA256SUMS").unlink()
    findings = found(path)
    assert findings["checksums"].ok is None and findings["config.json"].ok
    shard = sorted(path.glob("*.safetensors"))[0]
    assert findings[shard.name].ok is None
    assert findings[shard.name].figures["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert shard.name not in found(path, quick=True)


def test_a_list_elsewhere_is_used_instead(path, tmp_path):
    other = tmp_path / "theirs"
    shard = sorted(path.glob("*.safetensors"))[0]
    other.write_text("# of another release\n\n" + "".join(f"SHA256 ({p.name}) = {'AB' * 32}\n" for p in [shard]))
    assert shard.name in failed(found(path, checksums=other))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("abc  model.safetensors", "line 1 .* 64 hex digits"),
        (f"{'0' * 64}  ../secret", "line 1 .* directory are expected"),
        (f"{'0' * 64}  /etc/passwd", "line 1 .* directory are expected"),
        (f"{'0' * 64}  a\n{'1' * 64}  a", "line 2 .* another SHA-256"),
        ("# nothing", "holds no checksums"),
    ],
)
def test_a_list_that_is_none_is_refused_by_line(line, said, tmp_path):
    (tmp_path / "sums").write_text(line + "\n")
    with pytest.raises(RequestError, match=said):
        read_sums(tmp_path / "sums")


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "sums").write_bytes(b"\xff\xfe\x00")
    for name in ("sums", "absent"):
        with pytest.raises(RequestError, match="checksums were to be read"):
            read_sums(tmp_path / name)


def test_a_broken_list_beside_the_shards_is_a_finding(path):
    (path / "SHA256SUMS").write_text("nonsense\n")
    assert failed(found(path)) == {"checksums"}


def test_names_of_files_in_folders_and_binary_marks_are_read(tmp_path):
    (tmp_path / "sums").write_text(f"{'a' * 64} *./encoding/code.py\n{'b' * 64}\tmodel.safetensors\n")
    assert read_sums(tmp_path / "sums") == {"encoding/code.py": "a" * 64, "model.safetensors": "b" * 64}


def test_bytes_after_the_last_tensor_are_found(path):
    shard = sorted(path.glob("*.safetensors"))[0]
    with shard.open("ab") as f:
        f.write(b"\0" * 5)
    assert {"sizes", shard.name} == failed(found(path))


def test_a_cut_shard_is_found_and_the_rest_is_still_looked_at(path):
    shard = sorted(path.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    findings = found(path)
    assert failed(findings) == {"headers", shard.name} and findings["config.json"].ok
    assert "its header promises" in findings["headers"].detail


def test_a_tensor_too_few_is_an_inventory_that_fails(tmp_path):
    path = copied(tmp_path)
    rewrite(path, {"layers.1.attn_norm.weight": None})
    assert failed(found(path)) == {"inventory"}


def test_keys_unknown_here_are_told_and_do_not_fail(path):
    config = json.loads((path / "config.json").read_text()) | {"mystery": 3}
    (path / "config.json").write_text(json.dumps(config))
    sums(path, [p.name for p in path.glob("*.safetensors")] + ["config.json"])
    finding = found(path)
    assert failed(finding) == set()
    first = next(iter(check(Wanted(str(path)))))
    assert first.warns and first.figures["unknown_keys"] == ["mystery"]


def test_a_configuration_that_is_none_fails_alone(path):
    (path / "config.json").write_text("{")
    (path / "SHA256SUMS").unlink()
    findings = list(check(Wanted(str(path), quick=True)))
    assert [f.what for f in findings if f.ok is False] == ["config.json", "headers"]


def test_what_downloads_leave_behind_and_numbers_that_are_missing_are_told(path):
    (path / "model-00002-of-00009.safetensors.incomplete").touch()
    shutil.copy(sorted(path.glob("*.safetensors"))[0], path / "model-00002-of-00005.safetensors")
    finding = found(path, quick=True)["stray files"]
    assert finding.warns and finding.figures["unfinished"] == ["model-00002-of-00009.safetensors.incomplete"]
    assert "model-00001-of-00005.safetensors" in finding.figures["missing_numbers"]
    assert "shards of 2 sets" in finding.detail


def test_a_total_that_the_index_claims_wrongly_is_told(path):
    index = json.loads((path / INDEX).read_text())
    index["metadata"]["total_size"] = 5
    (path / INDEX).write_text(json.dumps(index))
    finding = found(path, quick=True)[f"{INDEX} total_size"]
    assert finding.ok and finding.warns and finding.figures["said"] == 5


def test_progress_is_told_while_bytes_are_hashed(path):
    told = []
    list(check(Wanted(str(path), progress=lambda *call: told.append(call))))
    assert told[-1][0] == told[-1][1] == sum(n for n, _ in {(t[1], 0) for t in told})


def test_a_place_where_nothing_is_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        folder_of(str(tmp_path / "absent"))
    assert folder_of("builtin:nano") == locate("builtin:nano")


@pytest.mark.parametrize("release", ["flash", "flash-0731", "pro"])
def test_a_configuration_of_a_releases_shape_is_held_to_its_values(tmp_path, release):
    config = ModelConfig.preset(release)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    published = found(tmp_path)["config.json values"]
    assert published.ok and not published.warns and published.detail == f"as published with {release}"
    other = dataclasses.replace(config, sliding_window=64, rope_theta=1.0, expert_dtype=None)
    (tmp_path / "config.json").write_text(json.dumps(other.to_dict()))
    told = found(tmp_path)["config.json values"]
    assert told.ok and told.warns and f"not as published with {release}" in told.detail
    assert told.figures["others"] == [
        "sliding_window is 64, published 128",
        f"rope_theta is 1.0, published {config.rope_theta!r}",
    ]


def test_a_configuration_of_no_releases_shape_is_held_to_none(path):
    assert "config.json values" not in found(path)


def test_what_is_no_file_is_not_waited_for(path):
    name = sorted(p.name for p in path.glob("*.safetensors"))[0]
    (path / name).unlink()
    os.mkfifo(path / name)
    assert "is not a file" in found(path)[name].detail
