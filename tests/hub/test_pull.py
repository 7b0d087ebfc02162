"""Pulling from a hub on loopback: what is fetched, what it is checked by, and every way in which it goes wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from pyrosome.checkpoint.index import INDEX_NAME, open_checkpoint
from pyrosome.errors import CheckpointError, DoesNotFit, FetchError, RequestError, UnsupportedFormat
from pyrosome.hub import fetch, pull
from pyrosome.hub.pull import Offer, prepare, take
from pyrosome.hub.record import Record
from pyrosome.hub.remote import Hub, Stopped
from pyrosome.testing.headers import write_headers
from tests.checkpoint.files import read_entries, write_entries
from tests.hub.files import NEEDED, REPO, WAITS, asker, pulled, same_files, shards
from tests.hub.server import COMMIT, OTHER, Fault, LoopHub, by_path, loop_hub


def refused(server: LoopHub, directory: Path, kind: type[Exception], *said: str, revision: str = "main") -> None:
    with pytest.raises(kind) as caught:
        pulled(server, directory, revision)
    assert type(caught.value) is kind
    assert all(words in str(caught.value) for words in said), str(caught.value)


# What is fetched.


def test_a_checkpoint_is_fetched_whole_and_opens(hub, source, tmp_path):
    offer, heard = pulled(hub, tmp_path / "here")
    assert same_files(source, tmp_path / "here", [*NEEDED, *shards(source)])
    assert heard == {"fetched": offer.num_bytes}
    assert "hf_xet" not in sys.modules  # though the hub says of each shard that it has it in that storage too
    index = open_checkpoint(tmp_path / "here")
    assert index.check().ok and index.tensors.keys() == offer.index.tensors.keys()


def test_only_what_is_needed_is_fetched_and_no_program(hub, source, tmp_path):
    offer, _ = pulled(hub, tmp_path)
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {*NEEDED, *shards(source), ".pull.json", ".pull.lock", "SHA256SUMS"}
    assert {f.name for f in offer.files} == {*NEEDED, *shards(source)}


def test_sums_are_those_of_the_files(hub, tmp_path):
    pulled(hub, tmp_path)
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert {n for _, n in (line.split("  ") for line in lines)} == {*NEEDED, *shards(tmp_path)}
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_the_offer_is_known_from_headers_alone(tmp_path):
    """The true headers of V4-Flash-0731: 167 GB are understood from less than 20 MB."""
    write_headers(tmp_path / "source")
    with loop_hub(tmp_path / "source", sha256=lambda _: "0" * 64) as server:
        offer = prepare(asker(server), "main", tmp_path / "here")
        assert server.sent() < 20_000_000
        assert offer.header_bytes <= server.sent()
    assert offer.index.nbytes == 166_878_536_440
    assert offer.missing_bytes == offer.num_bytes > offer.index.nbytes
    assert not (tmp_path / "here").exists()


def test_no_range_of_a_header_is_asked_for_twice(hub, source, tmp_path):
    prepare(asker(hub), "main", tmp_path)
    asked = by_path(hub)
    assert {p.rpartition("/")[2]: n for p, n in asked.items() if p.endswith(".safetensors")} == dict.fromkeys(
        shards(source), 1
    )


def test_a_second_pull_fetches_nothing_and_checks_everything(hub, tmp_path):
    offer, _ = pulled(hub, tmp_path)
    hub.asked.clear()
    again, heard = pulled(hub, tmp_path)
    assert heard == {"checked": offer.num_bytes}
    assert again.missing_bytes == 0


def test_a_repository_of_one_file_needs_no_index(source, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(source, alone)
    entries = {n: e for f in shards(alone) for n, e in read_entries(alone / f).items()}
    for f in (*shards(alone), INDEX_NAME):
        (alone / f).unlink()
    write_entries(alone / "model.safetensors", entries)
    with loop_hub(alone) as server:
        pulled(server, tmp_path / "here")
    assert open_checkpoint(tmp_path / "here").check().ok


# What is refused before anything is fetched.


def spoilt(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "spoilt"))


def test_another_architecture_is_refused(source, tmp_path):
    files = spoilt(source, tmp_path)
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with loop_hub(files) as server:
        refused(server, tmp_path / "here", UnsupportedFormat, f"{REPO}/config.json", "llama")
        assert server.count("safetensors$") == 0
    assert not (tmp_path / "here").exists()


def test_shards_of_another_configuration_are_refused(source, tmp_path):
    files = spoilt(source, tmp_path)
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps(config | {"n_routed_experts": 9}))
    with loop_hub(files) as server, pytest.raises(CheckpointError, match=r"do not fit config\.json"):
        prepare(asker(server), "main", tmp_path / "here")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("config.json", "no config.json"),
        (INDEX_NAME, "3 .safetensors files"),
        ("model-00002-of-00003.safetensors", "names 1 shards"),
    ],
)
def test_a_repository_without_a_part_is_refused(source, tmp_path, gone, said):
    files = spoilt(source, tmp_path)
    (files / gone).unlink()
    with loop_hub(files) as server:
        refused(server, tmp_path / "here", CheckpointError, said, REPO)


def test_a_repository_without_safetensors_is_refused(source, tmp_path):
    files = spoilt(source, tmp_path)
    for name in (*shards(files), INDEX_NAME):
        (files / name).unlink()
    (files / "pytorch_model.bin").write_bytes(b"pickle")
    with loop_hub(files) as server:
        refused(server, tmp_path / "here", CheckpointError, "0 .safetensors files")


@pytest.mark.parametrize(
    "junk", [b"", b"\xff" * 16, (1 << 40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_a_shard_that_is_none_is_refused(source, tmp_path, junk):
    files = spoilt(source, tmp_path)
    (files / shards(files)[1]).write_bytes(junk)
    with loop_hub(files) as server, pytest.raises(CheckpointError, match=rf"{REPO}/model-00002"):
        prepare(asker(server), "main", tmp_path / "here")


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/etc/evil.json", "a\\b.json", "encoding/../../evil.json", "a\nb", f"encoding/{'n' * 250}.json"],
)
def test_names_that_lead_elsewhere_are_refused(hub, source, tmp_path, name):
    hub.names = ["config.json", name]
    refused(hub, tmp_path, CheckpointError, "lead elsewhere")


def test_too_small_a_disk_is_refused_with_the_bytes_that_lack(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    offer = prepare(asker(hub), "main", tmp_path / "here")
    with pytest.raises(DoesNotFit) as caught:
        offer.check_room()
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (offer.num_bytes, 1000)
    assert f"free {offer.num_bytes - 1000:,} bytes more" in str(caught.value) and "--to" in str(caught.value)


def test_a_file_of_somebody_else_is_not_written_over(hub, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    refused(hub, tmp_path, RequestError, "config.json", "--to")
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_shard_of_somebody_else_with_the_same_size_is_not_written_over(hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr(pull, "_SMALL_BYTES", 0)  # shards of real checkpoints are above it
    shutil.copytree(source, target := tmp_path / "there")
    shard = target / shards(source)[1]
    theirs = shard.read_bytes()[:-1] + b"?"
    shard.write_bytes(theirs)
    refused(hub, target, RequestError, shard.name, "is not the one of", "--to")
    assert shard.read_bytes() == theirs and Record.read(target) is None
    refused(hub, target, RequestError, shard.name)  # the second time too
    shard.write_bytes((source / shard.name).read_bytes())
    offer, heard = pulled(hub, target)
    assert heard["checked"] - heard["dropped"] == offer.num_bytes and not heard["fetched"]


def test_a_link_of_somebody_else_is_not_written_over(hub, tmp_path):
    (tmp_path / "config.json").symlink_to(tmp_path / "nowhere")
    refused(hub, tmp_path, RequestError, "config.json", "is not the one of")


def test_files_that_are_there_already_are_kept(hub, source, tmp_path):
    shutil.copy(source / "model-00001-of-00003.safetensors", tmp_path)
    shutil.copy(source / "config.json", tmp_path)
    offer, heard = pulled(hub, tmp_path)
    kept = sum((source / n).stat().st_size for n in ("model-00001-of-00003.safetensors", "config.json"))
    assert (heard["checked"], heard["fetched"]) == (kept, offer.num_bytes - kept)


# Revisions.


def test_a_directory_stays_at_its_commit(hub, tmp_path):
    pulled(hub, tmp_path)
    hub.heads |= {"main": OTHER, OTHER: OTHER}
    offer, heard = pulled(hub, tmp_path)
    assert (offer.listing.commit, offer.moved, heard["fetched"]) == (COMMIT, OTHER, 0)
    assert json.loads((tmp_path / ".pull.json").read_text())["commit"] == COMMIT


def test_another_revision_does_not_go_into_the_same_directory(hub, tmp_path):
    pulled(hub, tmp_path)
    hub.heads |= {"v2": OTHER, OTHER: OTHER}
    refused(hub, tmp_path, RequestError, COMMIT, OTHER, "--to", revision="v2")


def test_a_commit_may_be_named(hub, tmp_path):
    offer, _ = pulled(hub, tmp_path, COMMIT)
    assert offer.listing.commit == COMMIT


@pytest.mark.parametrize("revision", ["nope", "refs/pr/1", "../x"])
def test_an_unknown_revision_is_named(hub, tmp_path, revision):
    refused(hub, tmp_path, RequestError, revision, "no such revision", revision=revision)


@pytest.mark.parametrize("revision", ["", "a\nb"])
def test_a_revision_that_can_be_none_is_refused(hub, tmp_path, revision):
    refused(hub, tmp_path, RequestError, "--revision", revision=revision)


def test_another_repository_does_not_go_into_the_same_directory(hub, tmp_path):
    pulled(hub, tmp_path)
    with pytest.raises(RequestError, match=f"holds {REPO}"):
        prepare(Hub("tests/other", hub.url, waits_s=WAITS), "main", tmp_path)


# Lines that break.

SHARD = "model-00002-of-00003.safetensors$"


def test_a_line_that_breaks_again_and_again_is_taken_up_where_it_broke(hub, source, tmp_path):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.asked.clear()
    hub.faults = [Fault(SHARD, "cut", times=9, at=20_000)]
    _, heard = _take(hub, offer)
    assert same_files(source, tmp_path, shards(source))
    assert heard["fetched"] == offer.num_bytes and hub.count(SHARD) == 10
    assert hub.sent(SHARD) == (source / "model-00002-of-00003.safetensors").stat().st_size


def _take(server: LoopHub, offer: Offer, **kwargs) -> tuple[Hub, Counter]:
    hub, heard = asker(server, **kwargs), Counter()
    take(hub, offer, lambda what, n: heard.update({what: n}))
    return hub, heard


def test_a_line_that_gives_nothing_is_given_up_and_what_came_is_kept(hub, source, tmp_path):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.faults = [Fault(SHARD, "cut", times=1, at=20_000), Fault(SHARD, "cut", at=0)]
    with pytest.raises(FetchError, match=r"4 times in a row.*goes on from there"):
        _take(hub, offer)
    partial = tmp_path / "model-00002-of-00003.safetensors.partial"
    assert partial.stat().st_size == 20_000 and not partial.with_suffix("").exists()
    assert not (tmp_path / "SHA256SUMS").exists()
    hub.faults = []
    again = prepare(asker(hub), "main", tmp_path)
    assert again.there_bytes >= 20_000
    hub.asked.clear()
    _take(hub, again)
    assert same_files(source, tmp_path, shards(source)) and not list(tmp_path.glob("*.partial"))
    assert hub.sent(SHARD) == (source / "model-00002-of-00003.safetensors").stat().st_size - 20_000


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_hub_that_is_busy_is_asked_again(hub, source, tmp_path, status):
    hub.faults = [Fault("/api/", "status", 2, status), Fault("resolve", "status", 3, status)]
    pulled(hub, tmp_path)
    assert same_files(source, tmp_path, [*NEEDED, *shards(source)]) and hub.count("/api/") == 3


def test_a_hub_that_stays_busy_is_an_error_in_the_end(hub, tmp_path):
    hub.faults = [Fault("/api/", "status", status=503)]
    refused(hub, tmp_path, FetchError, "503", "4 times in a row", "try again later")
    assert hub.count("/api/") == 4


def test_a_wait_the_hub_asks_for_is_kept_to(hub, tmp_path):
    hub.faults = [
        Fault("/api/", "status", 1, 429, {"Retry-After": "0"}),
        Fault("/api/", "status", 1, 429, {"RateLimit": '"api";r=0;t=1'}),
    ]
    said = []
    prepare(asker(hub, told=said.append), "main", tmp_path)
    assert [s.rpartition("; ")[2] for s in said] == ["asked again in 0 s", "asked again in 1 s"]


def test_an_endpoint_that_ignores_ranges_is_borne(hub, source, tmp_path):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.faults = [Fault(SHARD, "cut", times=1, at=20_000), Fault(SHARD, "no_range")]
    _, heard = _take(hub, offer)
    assert same_files(source, tmp_path, shards(source)) and heard["fetched"] == offer.num_bytes


def test_headers_come_from_an_endpoint_that_ignores_ranges(hub, tmp_path):
    hub.faults = [Fault("resolve", "no_range")]
    assert prepare(asker(hub), "main", tmp_path).index.check().ok


def test_slow_is_not_lost(hub, source, tmp_path):
    hub.faults = [Fault(SHARD, "slow", at=40_000, pause_s=0.02)]
    pulled(hub, tmp_path, silence_s=1.0)
    assert same_files(source, tmp_path, shards(source)) and hub.count(SHARD) == 2


def test_silence_is_lost_and_taken_up_again(hub, source, tmp_path):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.faults = [Fault(SHARD, "slow", times=1, at=40_000, pause_s=0.6)]
    _take(hub, offer, silence_s=0.2)
    assert same_files(source, tmp_path, shards(source)) and hub.count(SHARD) >= 3


def test_nobody_there_says_how_to_go_on(tmp_path):
    with pytest.raises(FetchError, match=r"could not be reached.*--mirror or HF_ENDPOINT"):
        prepare(Hub(REPO, "http://127.0.0.1:9", waits_s=WAITS), "main", tmp_path)


def test_redirects_are_followed_and_the_token_stays_behind(hub, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token, hub.redirects_to = "hf_secret", "localhost"
    pulled(hub, tmp_path)
    assert same_files(source, tmp_path, shards(source))
    stored = [a for a in hub.asked if a.path.startswith("/store/")]
    assert stored and not any("authorization" in a.headers for a in stored)


# Other bytes than are listed.


@pytest.mark.parametrize(
    ("how", "at"), [("corrupt", 50_000), ("changed", 20_000)]
)  # damaged; another between two ranges
def test_a_file_that_came_wrong_is_fetched_once_more(hub, source, tmp_path, how, at):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.faults = [Fault(SHARD, how, times=1, at=at)]
    _, heard = _take(hub, offer)
    size = (source / "model-00002-of-00003.safetensors").stat().st_size
    assert same_files(source, tmp_path, shards(source))
    assert (heard["fetched"], heard["dropped"]) == (offer.num_bytes + size, size)


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json$"])
def test_a_file_that_stays_wrong_is_an_error_and_is_not_kept(hub, source, tmp_path, name):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.faults = [Fault(name, "corrupt", at=50)]
    with pytest.raises(FetchError, match=r"came twice .* other bytes"):
        _take(hub, offer)
    bad = tmp_path / name.rstrip("$")
    assert not bad.exists() and not bad.with_name(bad.name + ".partial").exists()
    assert not (tmp_path / "SHA256SUMS").exists()
    hub.faults = []
    pulled(hub, tmp_path)
    assert same_files(source, tmp_path, [*NEEDED, *shards(source)])


def test_a_wrong_configuration_is_noticed_before_the_headers(hub, tmp_path):
    hub.faults = [Fault("config.json$", "corrupt", at=5)]
    refused(hub, tmp_path, FetchError, "config.json came twice")


def test_a_file_that_goes_bad_on_disk_is_mended(hub, source, tmp_path):
    pulled(hub, tmp_path)
    shard = tmp_path / shards(source)[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    _, heard = pulled(hub, tmp_path)
    assert same_files(source, tmp_path, shards(source)) and heard["fetched"] == len(raw)


def test_a_part_of_something_else_is_not_built_upon(hub, source, tmp_path):
    sizes = [(source / n).stat().st_size for n in shards(source)]
    (tmp_path / f"{shards(source)[0]}.partial").write_bytes(b"x" * 1000)
    (tmp_path / f"{shards(source)[1]}.partial").write_bytes(b"x" * (sizes[1] + 5))
    (tmp_path / f"{shards(source)[2]}.partial").write_bytes((source / shards(source)[2]).read_bytes())
    pulled(hub, tmp_path)
    assert same_files(source, tmp_path, shards(source)) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["html", "length", "range"])
@pytest.mark.parametrize("where", ["config.json$", SHARD])
def test_another_file_than_is_listed_is_named(hub, tmp_path, where, kind):
    hub.faults = [Fault(where, kind)]
    with pytest.raises(FetchError):
        pulled(hub, tmp_path)
    assert not (tmp_path / "SHA256SUMS").exists()


def test_a_page_instead_of_a_listing_is_named(hub, tmp_path):
    hub.faults = [Fault("/api/", "html")]
    refused(hub, tmp_path, FetchError, "does not answer as a hub does", "--mirror")


def test_a_page_instead_of_a_shard_is_named(hub, tmp_path):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.faults = [Fault(SHARD, "html")]
    with pytest.raises(FetchError, match=r"gives .* bytes of text/html.* listed with"):
        _take(hub, offer)


# Who may not.


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "no repository of that name"),
        (404, {}, "no repository of that name"),
        (401, {}, "HF_TOKEN"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "answers 401"),
        (403, {}, "answers 403"),
        (403, {"X-Error-Code": "GatedRepo"}, "accept its terms"),
        (401, {"X-Error-Code": "GatedRepo"}, "accept its terms"),
    ],
)
def test_refusals_say_what_to_do(hub, tmp_path, status, headers, said):
    hub.faults = [Fault("/api/", "status", status=status, headers=headers)]
    refused(hub, tmp_path, RequestError, said, "no token is set")
    assert hub.count("/api/") == 1


def test_a_refusal_in_the_middle_leaves_what_there_is(hub, source, tmp_path):
    offer = prepare(asker(hub), "main", tmp_path)
    hub.faults = [Fault(SHARD, "status", status=403)]
    with pytest.raises(RequestError, match="answers 403"):
        _take(hub, offer)
    hub.faults = []
    pulled(hub, tmp_path)
    assert same_files(source, tmp_path, shards(source))


def test_a_listed_file_that_is_not_there_is_named(hub, tmp_path):
    hub.faults = [Fault("tokenizer.json$", "status", status=404, headers={"X-Error-Code": "EntryNotFound"})]
    refused(hub, tmp_path, FetchError, "tokenizer.json", "does not have it")


@pytest.mark.parametrize("token", [None, "hf_right", "hf_wrong"])
def test_a_mirror_gets_the_token_of_this_run_and_no_other(hub, tmp_path, monkeypatch, token):
    (tmp_path / "token").write_text("hf_login")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.token = "hf_right"
    if token == "hf_right":
        assert prepare(asker(hub), "main", tmp_path).index.check().ok
    else:
        refused(hub, tmp_path, RequestError, "HF_TOKEN")
    assert {a.headers.get("authorization") for a in hub.asked} == {f"Bearer {token}" if token else None}


@pytest.mark.parametrize(
    "name", ["", "x", "a/b/c", "../x", "a/../b", "a/..", "https://h/a/b", "a/b\n", "a" * 99 + "/b", "a--b/c"]
)
def test_what_is_no_repository_is_refused(name):
    with pytest.raises(RequestError, match="OWNER/NAME"):
        Hub(name, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "address",
    ["", "host", "ftp://h", "http://", "file:///etc", "http://h?x=1", "http://h:x", "http://[h", "http://h:99999"],
)
def test_what_is_no_address_is_refused(monkeypatch, address):
    with pytest.raises(RequestError, match="--mirror"):
        Hub(REPO, address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(RequestError, match="HF_ENDPOINT"):
        Hub(REPO)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(RequestError, match="--mirror has a user or password in it") as caught:
        Hub(REPO, "https://user:sekret@mirror.example")
    assert "sekret" not in str(caught.value)


# Disks that fill, and ends.


class Full(io.FileIO):
    """A file on a disk that holds 30,000 bytes of it."""

    def write(self, data):
        if self.tell() + len(data) > 30_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_fills_is_said_and_what_came_is_kept(hub, source, tmp_path, monkeypatch):
    offer = prepare(asker(hub), "main", tmp_path)
    real = open

    def opened(path, mode="r", *args):
        return Full(path, "a+") if str(path).endswith("00002-of-00003.safetensors.partial") else real(path, mode, *args)

    monkeypatch.setattr(fetch, "open", opened, raising=False)
    with pytest.raises(DoesNotFit, match=r"the rest of model-00002.*goes on from there") as caught:
        _take(hub, offer)
    assert caught.value.needed_bytes > 0
    monkeypatch.undo()
    pulled(hub, tmp_path)
    assert same_files(source, tmp_path, shards(source))


def test_a_directory_that_cannot_be_made_is_named(hub, tmp_path):
    (tmp_path / "file").write_text("")
    refused(hub, tmp_path / "file" / "here", RequestError, "cannot be used", "--to")


def test_it_stops_when_it_is_asked_to_and_goes_on_later(hub, source, tmp_path):
    hub.faults = [Fault(SHARD, "slow", at=10_000, pause_s=0.05)]
    asking = asker(hub)
    offer = prepare(asking, "main", tmp_path)

    def heard(what: str, _: int) -> None:
        if what == "fetched" and (tmp_path / f"{shards(source)[1]}.partial").exists():
            asking.stop.set()

    with pytest.raises(Stopped):
        take(asking, offer, heard)
    assert not (tmp_path / "SHA256SUMS").exists() and not (tmp_path / shards(source)[1]).exists()
    hub.faults = []
    pulled(hub, tmp_path)
    assert same_files(source, tmp_path, shards(source))


def test_two_pulls_do_not_write_into_one_directory(hub, tmp_path):
    from pyrosome.hub.record import Claim

    with Claim(tmp_path):
        refused(hub, tmp_path, RequestError, "another process")
    pulled(hub, tmp_path)
