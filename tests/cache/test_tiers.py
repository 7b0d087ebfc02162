"""Tiers: what leaves the cache is found again whole, or not at all; and a disk that fails harms nothing else."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import resource
import stat
import time
from pathlib import Path

import pytest
import torch

from pyrosome.cache import tiers as module
from pyrosome.cache.tiers import (
    CHECKSUM_BYTES,
    MAGIC,
    NAME_BYTES,
    TAG_BYTES,
    VERSION,
    Label,
    Tiers,
    block_name,
    root_name,
)

SIZE = 1000
FILE = 3000  # more than a file of one block takes


def tiers(path: Path | str = "", host_blocks: int = 0, disk_blocks: int = 100, **changes) -> Tiers:
    about = {"fingerprint": "model", "block_bytes": SIZE, "kv_format": "fp8", **changes}
    return Tiers(host_blocks * SIZE, str(path), disk_blocks * FILE, **about)


def ids(number: int) -> bytes:
    return torch.full((128,), number, dtype=torch.int32).numpy().tobytes()


def label(number: int, salt: str = "", model: str = "model fp8") -> Label:
    """The first block of a prompt that says `number` 128 times."""
    root = root_name(model, salt)
    return Label(block_name(root, ids(number)), root, ids(number), 128)


def data(number: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def put(t: Tiers, *numbers: int) -> None:
    for n in numbers:
        t.put("block", label(n), data(n))


def found(t: Tiers, *numbers: int) -> list[int]:
    """Which of these come back; each as it was."""
    out = []
    for n in numbers:
        if (got := t.get("block", label(n))) is not None:
            assert got[0] == label(n)
            assert torch.equal(got[1], data(n))
            out.append(n)
        assert t.has("block", label(n).name) == (got is not None)
    return out


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


# Names.


def test_a_name_depends_on_model_salt_and_every_id_before():
    names = set()
    for model, salt in itertools.product(("a", "b", "a "), ("", "a", "b", "a\0", "é", "\ud800")):
        root = root_name(model, salt)
        one, two = block_name(root, ids(1)), block_name(root, ids(2))
        names |= {root, one, two, block_name(one, ids(2)), block_name(two, ids(1)), block_name(one, ids(1))}
    assert len(names) == 3 * 6 * 6
    assert {len(n) for n in names} == {NAME_BYTES}


def test_model_and_salt_are_not_run_together():
    assert root_name("ab", "c") != root_name("a", "bc")
    assert tiers(kv_format="fp8").root("s") != tiers(kv_format="bf16").root("s")
    assert tiers().root("s") != tiers(fingerprint="other").root("s")


def test_a_name_begins_with_whose_salt_and_which_first_block_it_is_of():
    root = root_name("m", "salt")
    first, other = block_name(root, ids(1)), block_name(root, ids(2))
    second = block_name(first, ids(5))
    third = block_name(second, ids(6))
    assert root[:TAG_BYTES] == first[:TAG_BYTES] == other[:TAG_BYTES] == third[:TAG_BYTES]
    assert first[: 2 * TAG_BYTES] == second[: 2 * TAG_BYTES] == third[: 2 * TAG_BYTES] != other[: 2 * TAG_BYTES]
    assert b"salt" not in root


def test_a_salt_is_nowhere_on_disk(tmp_path):
    t = tiers(tmp_path)
    t.put("block", label(1, salt="tenant-secret"), data(1))
    (path,) = files(tmp_path)
    raw = path.read_bytes()
    assert b"tenant-secret" not in raw and b"tenant-secret".hex().encode() not in raw
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# Host memory.


def test_memory_keeps_what_was_used_last():
    t = tiers(host_blocks=3)
    put(t, 1, 2, 3)
    assert found(t, 1) == [1]
    put(t, 4)
    assert found(t, 1, 2, 3, 4) == [1, 3, 4]
    put(t, 1, 5)  # putting what is there is a use
    assert found(t, 1, 3, 4, 5) == [1, 4, 5]
    assert t.host_bytes == 3 * SIZE and t.disk_bytes == 0


def test_without_any_room_nothing_is_kept():
    t = tiers()
    put(t, 1)
    assert found(t, 1) == []
    assert t.host_bytes == 0


@pytest.mark.parametrize("on_disk", [False, True])
def test_ids_and_predecessor_decide_and_not_the_name(tmp_path, on_disk):
    """As if two prefixes had one name."""
    t = tiers(tmp_path, host_blocks=0 if on_disk else 5)
    put(t, 1)
    true = label(1)
    for other in (
        Label(true.name, true.parent, ids(2), 128),
        Label(true.name, true.name, true.ids, 128),
        Label(true.name, true.parent, true.ids, 256),
    ):
        assert t.get("block", other) is None
    assert found(t, 1) == [1]


def test_blocks_and_states_of_one_name_are_two_things(tmp_path):
    for t in (tiers(host_blocks=5), tiers(tmp_path)):
        put(t, 1)
        state = Label(label(1).name, label(1).parent, label(1).ids, 128, draft_from=104)
        t.put("state", state, data(7, 333))
        assert found(t, 1) == [1]
        got = t.get("state", label(1))
        assert got is not None and got[0].draft_from == 104
        assert torch.equal(got[1], data(7, 333))


@pytest.mark.parametrize("tags", [0, TAG_BYTES, 2 * TAG_BYTES, NAME_BYTES])
def test_dropping_takes_one_or_one_first_block_or_one_salt(tmp_path, tags):
    for t in (tiers(host_blocks=10), tiers(tmp_path), tiers(tmp_path / "b", host_blocks=2)):
        first = label(1)
        second = Label(block_name(first.name, ids(5)), first.name, ids(5), 256)
        entries = [first, second, label(2), label(1, salt="b")]
        for i, e in enumerate(entries):
            t.put("block", e, data(i))
        t.drop(first.name[:tags])
        left = [e in (e2 for e2 in entries if t.get("block", e2)) for e in entries]
        assert (
            left
            == {
                0: [False] * 4,
                TAG_BYTES: [False, False, False, True],
                2 * TAG_BYTES: [False, False, True, True],
                NAME_BYTES: [False, True, True, True],
            }[tags]
        )
        assert t.host_bytes + t.disk_bytes > 0 or not any(left)


# Disk.


def test_what_leaves_memory_goes_to_disk_and_then_for_good(tmp_path):
    t = tiers(tmp_path, host_blocks=2, disk_blocks=3)
    put(t, *range(20))
    assert len(files(tmp_path)) == len(t._disk)
    assert t.disk_bytes == sum(p.stat().st_size for p in files(tmp_path)) <= 3 * FILE
    on_disk = len(t._disk)
    assert on_disk >= 3
    assert found(t, *range(20)) == list(range(20 - 2 - on_disk, 20))


def test_the_next_process_finds_it_and_the_oldest_is_dropped_first(tmp_path):
    t = tiers(tmp_path)
    for n in range(5):
        put(t, n)
        os.utime(files(tmp_path)[0].parent / f"{label(n).name.hex()}.block", (1000 + n, 1000 + n))
    again = tiers(tmp_path)
    assert (again.disk_bytes, again.host_bytes) == (t.disk_bytes, 0)
    assert found(again, 0) == [0]  # used now, so no longer the oldest
    bound = again.disk_bytes * 3 // 5 // FILE + 1
    small = Tiers(0, str(tmp_path), again.disk_bytes * 3 // 5, "model", SIZE, kv_format="fp8")
    assert bound and found(small, *range(5)) == [0, 3, 4]
    assert small.disk_bytes == sum(p.stat().st_size for p in files(tmp_path))


def test_on_disk_too_what_was_used_last_stays(tmp_path):
    t = tiers(tmp_path)
    put(t, 0, 1, 2)
    t._disk_budget = t.disk_bytes
    assert found(t, 0) == [0]
    put(t, 3)
    assert found(t, 0, 1, 2, 3) == [0, 2, 3]


def test_flush_leaves_everything_to_the_next_process(tmp_path):
    t = tiers(tmp_path, host_blocks=10)
    put(t, 1, 2, 3)
    assert files(tmp_path) == []
    t.flush()
    assert found(t, 1, 2, 3) == [1, 2, 3] == found(tiers(tmp_path), 1, 2, 3)
    memory = tiers(host_blocks=2)
    put(memory, 1)
    memory.flush()
    assert found(memory, 1) == [1]


def test_what_is_there_is_not_written_again(tmp_path):
    t = tiers(tmp_path)
    put(t, 1)
    before = files(tmp_path)[0].stat().st_mtime_ns
    put(t, 1)
    assert files(tmp_path)[0].stat().st_mtime_ns == before
    assert len(files(tmp_path)) == 1


def test_two_models_share_a_folder_and_its_bound(tmp_path):
    one, other = tiers(tmp_path), tiers(tmp_path, fingerprint="other")
    put(one, 1)
    other.put("block", label(1, model="other fp8"), data(9))
    again = tiers(tmp_path)
    assert again.disk_bytes == sum(p.stat().st_size for p in files(tmp_path))
    assert len(files(tmp_path)) == 2
    assert found(again, 1) == [1]


def test_an_entry_that_another_process_dropped_is_a_miss_and_no_damage(tmp_path, caplog):
    t = tiers(tmp_path)
    put(t, 1, 2)
    (tmp_path / f"{label(1).name.hex()}.block").unlink()
    assert found(t, 1, 2) == [2]
    assert t.disk_bytes == sum(p.stat().st_size for p in files(tmp_path))
    assert not caplog.records


# Damage.


def rewritten(change) -> bytes:
    """A file's header changed, its checksum made to agree."""

    def apply(raw: bytes) -> bytes:
        start = len(MAGIC) + 4
        end = start + int.from_bytes(raw[len(MAGIC) : start], "little")
        header = json.loads(raw[start:end])
        new = change(header)
        text = new if isinstance(new, bytes) else json.dumps(new).encode()
        body = MAGIC + len(text).to_bytes(4, "little") + text + raw[end:-CHECKSUM_BYTES]
        return body + module.xxhash.xxh3_128(body).digest()

    return apply


DAMAGE = {
    "empty": lambda raw: b"",
    "one byte": lambda raw: raw[:1],
    "half": lambda raw: raw[: len(raw) // 2],
    "short by one": lambda raw: raw[:-1],
    "one more": lambda raw: raw + b"\0",
    "zeros": lambda raw: bytes(len(raw)),
    "a bit of the magic": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    "a bit of the header": lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
    "a bit of the rows": lambda raw: raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:],
    "a bit of the checksum": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "header length": lambda raw: raw[:8] + b"\xff\xff\xff\xff" + raw[12:],
    "another version": rewritten(lambda h: {**h, "version": VERSION + 1}),
    "another model": rewritten(lambda h: {**h, "fingerprint": "other"}),
    "another format": rewritten(lambda h: {**h, "kv_format": "bf16"}),
    "another kind": rewritten(lambda h: {**h, "kind": "state"}),
    "another size": rewritten(lambda h: {**h, "data_bytes": SIZE - 1}),
    "other ids": rewritten(lambda h: {**h, "ids": ids(2).hex()}),
    "another predecessor": rewritten(lambda h: {**h, "parent": label(2).name.hex()}),
    "ids that are no hex": rewritten(lambda h: {**h, "ids": "zz"}),
    "a length that is none": rewritten(lambda h: {**h, "length": None}),
    "a field missing": rewritten(lambda h: {k: v for k, v in h.items() if k != "length"}),
    "no table": rewritten(lambda h: [1, 2]),
    "no JSON": rewritten(lambda h: b"{"),
    "no text": rewritten(lambda h: b"\xff\xfe"),
    "deep": rewritten(lambda h: b"[" * 100_000),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_any_kind_is_a_miss_that_is_removed_and_said_once(tmp_path, caplog, how):
    put(tiers(tmp_path), 1, 2, 3)
    t = tiers(tmp_path)
    for n in (1, 3):
        path = tmp_path / f"{label(n).name.hex()}.block"
        path.write_bytes(DAMAGE[how](path.read_bytes()))
    assert found(t, 1, 2, 3) == [2]
    assert len(files(tmp_path)) == 1
    assert t.disk_bytes <= FILE and len(t._disk) == 1
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "computed again" in caplog.text
    put(t, 1)  # and written anew it is there
    assert found(t, 1) == [1]


def test_every_bit_that_flips_is_seen(tmp_path):
    put(tiers(tmp_path, block_bytes=16), 1)
    t = tiers(tmp_path, block_bytes=16)
    small = label(4)
    t.put("block", small, data(4, 16))
    path = tmp_path / f"{small.name.hex()}.block"
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        assert tiers(tmp_path, block_bytes=16).get("block", small) is None, at
    path.write_bytes(raw)
    assert tiers(tmp_path, block_bytes=16).get("block", small) is not None


def test_a_block_of_another_size_is_a_miss(tmp_path):
    put(tiers(tmp_path), 1)
    assert tiers(tmp_path, block_bytes=SIZE + 1).get("block", label(1)) is None


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("notes.txt", "x" * 96 + ".block", "ab" * 48 + ".other", "ab" * 47 + ".block", "tmp_of_mine"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ("ab" * 48 + ".state")).mkdir()
    t = tiers(tmp_path, disk_blocks=1)
    put(t, 1, 2, 3)
    assert t.disk_bytes <= FILE
    for name in ("notes.txt", "x" * 96 + ".block", "ab" * 48 + ".other", "ab" * 47 + ".block", "tmp_of_mine"):
        assert (tmp_path / name).read_bytes() == b"mine"


def test_what_a_killed_process_had_begun_is_removed_once_it_is_nobody_s(tmp_path):
    old, new = tmp_path / "tmpold", tmp_path / "tmpnew"
    for p in (old, new):
        p.write_bytes(b"half")
    long_ago = time.time() - 2 * module.ABANDONED_SECONDS
    os.utime(old, (long_ago, long_ago))
    tiers(tmp_path)
    assert files(tmp_path) == [new]


# A disk that fails.


def test_a_full_disk_turns_writing_off_with_one_warning_and_loses_nothing_else(tmp_path, monkeypatch, caplog):
    t = tiers(tmp_path, host_blocks=2)
    put(t, 1, 2, 3)
    assert len(files(tmp_path)) == 1

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "replace", full)
    put(t, 4, 5, 6)
    assert len(files(tmp_path)) == 1, "no half file stays behind"
    assert found(t, 1, 5, 6) == [1, 5, 6]
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert t.disk_bytes == files(tmp_path)[0].stat().st_size
    t.flush()
    assert found(t, 5, 6) == [5, 6]


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path, caplog):
    """A real one: the process may write no file longer than 600 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    t = tiers(tmp_path, host_blocks=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        put(t, 1, 2, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == []
    assert found(t, 1, 2, 3) == [3]
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_a_folder_that_cannot_be_made_is_said_once_and_memory_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    t = tiers(tmp_path / "file" / "folder", host_blocks=1)
    put(t, 1, 2)
    assert found(t, 1, 2) == [2]
    t.flush()
    assert found(t, 2) == [2]
    assert len(caplog.records) == 1 and "disk tier is turned off" in caplog.text


def test_a_folder_that_goes_away_is_misses_and_one_warning(tmp_path, caplog):
    folder = tmp_path / "cache"
    t = tiers(folder)
    put(t, 1)
    for p in files(folder):
        p.unlink()
    folder.rmdir()
    assert found(t, 1) == []
    put(t, 2, 3)
    assert found(t, 2, 3) == []
    assert len(caplog.records) == 1
    assert t.disk_bytes == 0


def test_a_file_that_cannot_be_read_is_a_miss(tmp_path):
    t = tiers(tmp_path)
    put(t, 1)
    path = tmp_path / f"{label(1).name.hex()}.block"
    path.unlink()
    path.mkdir()
    assert t.get("block", label(1)) is None
    assert t.disk_bytes == 0
