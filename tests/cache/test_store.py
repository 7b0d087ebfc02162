"""Session files: they come back bit for bit, or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import struct

import msgspec
import pytest
import torch
import xxhash

from pyrosome.cache import store
from pyrosome.cache.pool import CachePool
from pyrosome.cache.state import put_snapshot
from pyrosome.cache.store import open_session, save_session
from pyrosome.engine.runner import Runner
from pyrosome.errors import CheckpointError, ContextTooLong, DoesNotFit, RequestError, TruncatedFile, UnsupportedFormat
from pyrosome.testing.shapes import tiny
from tests.networks import free, network, tokens

CONFIG = tiny((0, 4, 128))
IDS = tokens(700)
PRINT = "f" * 64
LENGTH = 400


def runner_of(kv_format: str = "f32", max_context: int = 900) -> Runner:
    runner = Runner(network(CONFIG), kv_format, 3, max_context, num_drafts=2)
    runner.pool.poison()
    return runner


def saved(path, length: int = 300, known: int | None = None, runner: Runner | None = None, **changes):
    """A file of a session of so many computed tokens, and a few that are known beyond; returns the runner."""
    runner = runner or runner_of()
    sequence = runner.open()
    if length:
        runner.step([(sequence, IDS[:length])])
    ids = IDS[: length + 3 if known is None else known]
    size = save_session(
        path, runner.pool, sequence.holding.pages, ids, runner.snapshot(sequence), **{"fingerprint": PRINT, **changes}
    )
    assert size == path.stat().st_size
    runner.close(sequence)
    return runner


def loaded(path, pool: CachePool):
    """(ids, length, next state) of a file, in a holding of its own that is given back if it fails."""
    found = open_session(path, fingerprint=PRINT)
    holding = pool.open()
    try:
        snapshot = found.load(pool, holding)
        pool.prepare(holding, snapshot.length // 128 * 128, snapshot.length)
        put_snapshot(pool, holding, snapshot)
    except BaseException:
        pool.release(holding)
        raise
    return found, snapshot, holding


@pytest.mark.parametrize("kv_format", ["f32", "bf16"])
@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 255, 256, 300, 512, 640])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, monkeypatch, length, kv_format):
    monkeypatch.setattr(store, "CHUNK_BYTES", 40_000)  # several chunks
    path = tmp_path / "a.session"
    saved(path, length, runner=runner_of(kv_format), extra={"messages": [{"content": "é"}]})
    assert os.listdir(tmp_path) == ["a.session"] and oct(path.stat().st_mode)[-2:] == "00", "nobody else reads it"
    other = runner_of(kv_format, 1500)
    before = free(other.pool)
    found, snapshot, holding = loaded(path, other.pool)
    assert (found.ids, found.length) == (IDS[: length + 3], length)
    assert found.about.extra == {"messages": [{"content": "é"}]}
    # The same file again, from where it came to.
    again = tmp_path / "b.session"
    save_session(again, other.pool, holding.pages, found.ids, snapshot, fingerprint=PRINT, extra=found.about.extra)
    assert again.read_bytes() == path.read_bytes()
    other.pool.release(holding)
    assert free(other.pool) == before


def test_a_session_that_was_only_said_and_never_computed_is_saved_too(tmp_path):
    for ids in ([], IDS[:5]):
        saved(tmp_path / "a.session", 0, len(ids))
        found = open_session(tmp_path / "a.session", fingerprint=PRINT)
        assert (found.ids, found.length) == (ids, 0)


def test_what_is_loaded_goes_on_as_what_was_saved(tmp_path):
    runner = runner_of()
    sequence = runner.open()
    runner.step([(sequence, IDS[:301])])
    path = tmp_path / "a.session"
    save_session(path, runner.pool, sequence.holding.pages, IDS[:301], runner.snapshot(sequence), fingerprint=PRINT)
    expected = runner.step([(sequence, IDS[301:400])], every_row=True)[0]
    other = runner_of()
    there = other.open()
    other.restore(there, open_session(path, fingerprint=PRINT).load(other.pool, there.holding))
    assert torch.equal(other.step([(there, IDS[301:400])], every_row=True)[0], expected)


# Damage

REFUSALS = (CheckpointError, TruncatedFile, UnsupportedFormat)


def sections(path) -> dict[str, tuple[int, int]]:
    """(begin, end) of each part of a file, as docs/session-file.md has it."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw, 24)
    about = msgspec.json.decode(raw[48 : 48 + length])

    def aligned(at):
        return -(-at // 4096) * 4096

    ids = aligned(48 + length)
    state = aligned(ids + 4 * about["num_ids"])
    blocks = aligned(state + about["snapshot"]["bytes"])
    size = about["block_bytes"] * about["blocks_per_chunk"]
    starts = range(blocks, len(raw), size)
    return {
        "preamble": (0, 48), "header": (48, 48 + length), "ids": (ids, ids + 4 * about["num_ids"]),
        "state": (state, state + about["snapshot"]["bytes"]),
        **{f"chunk {i}": (at, min(at + size, len(raw))) for i, at in enumerate(starts)},
    }  # fmt: skip


@pytest.fixture
def one_block_a_chunk(monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three blocks, each a chunk, and 16 tokens beyond."""
    path = tmp_path_factory.mktemp("whole") / "a.session"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 1)
        saved(path, LENGTH)
    return path


def with_header(raw: bytes, body: bytes) -> bytes:
    """A file with another header, its checksum right, and everything else where that header has it."""
    (length,) = struct.unpack_from("<Q", raw, 24)
    head = struct.pack("<16sIIQ16s", store.MAGIC, 1, 0x01020304, len(body), xxhash.xxh3_128_digest(body)) + body
    return head + bytes(-len(head) % 4096) + raw[-(-(48 + length) // 4096) * 4096 :]


PARTS = ["preamble", "header", "ids", "state", "chunk 0", "chunk 1", "chunk 2"]


@pytest.mark.parametrize("part", PARTS)
def test_every_flipped_bit_is_refused_and_nothing_is_held(tmp_path, whole, part):
    runner, path = runner_of(), tmp_path / "a.session"
    before, raw = free(runner.pool), whole.read_bytes()
    begin, end = sections(whole)[part]
    for at in sorted({*range(begin, end, max(1, (end - begin) // 48)), end - 1}):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        with pytest.raises(REFUSALS, match=r"a\.session"):
            loaded(path, runner.pool)
        assert free(runner.pool) == before


def test_what_is_between_the_parts_means_nothing(tmp_path, whole):
    """No checksum covers the bytes up to the next multiple of 4,096, and nobody reads them."""
    raw, path, pool = bytearray(whole.read_bytes()), tmp_path / "a.session", runner_of().pool
    places = sections(whole)
    assert list(places) == PARTS
    edges = [0, *(e for pair in places.values() for e in pair)]
    gaps = [(a, b) for a, b in itertools.pairwise(edges) if a < b and (a, b) not in places.values()]
    assert len(gaps) == 3
    for begin, end in gaps:
        assert end - begin < 4096 and not any(raw[begin:end])
        raw[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(raw)
    found, snapshot, holding = loaded(path, pool)
    again = tmp_path / "b.session"
    save_session(again, pool, holding.pages, found.ids, snapshot, fingerprint=PRINT)
    assert open_session(again, fingerprint=PRINT).about.xxh3.ids == found.about.xxh3.ids
    assert open_session(again, fingerprint=PRINT).about.xxh3.snapshot == found.about.xxh3.snapshot
    pool.release(holding)


def test_chunks_that_changed_places_are_refused(tmp_path, whole):
    raw, path, pool = whole.read_bytes(), tmp_path / "a.session", runner_of().pool
    (a, b), (_, c) = (sections(whole)[part] for part in ("chunk 0", "chunk 1"))
    path.write_bytes(raw[:a] + raw[b:c] + raw[a:b] + raw[c:])
    before = free(pool)
    with pytest.raises(CheckpointError, match=r"blocks 0 to 1 in .* are damaged"):
        loaded(path, pool)
    assert free(pool) == before


def test_every_length_short_of_the_whole_is_refused(tmp_path, whole):
    runner, path, raw = runner_of(), tmp_path / "a.session", whole.read_bytes()
    edges = {e + d for pair in sections(whole).values() for e in pair for d in (-1, 0, 1)}
    for length in sorted(e for e in {*edges, *range(0, len(raw), 9973)} if 0 <= e < len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(REFUSALS, match=r"a\.session"):
            loaded(path, runner.pool)
    path.write_bytes(raw[:-1])
    with pytest.raises(TruncatedFile, match=f"has {len(raw) - 1} bytes and its header promises {len(raw)}"):
        loaded(path, runner.pool)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path, whole):
    path, pool = tmp_path / "a.session", runner_of().pool
    path.write_bytes(whole.read_bytes())
    found, holding = open_session(path, fingerprint=PRINT), pool.open()
    os.truncate(path, sections(path)["chunk 1"][0] + 100)
    with pytest.raises(TruncatedFile, match="ends within blocks 1 to 2"):
        found.load(pool, holding)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        found.load(pool, holding)


@pytest.mark.parametrize("calls", range(5))
def test_a_disk_that_cannot_be_read_is_told_and_nothing_is_held(whole, monkeypatch, calls):
    """The ids, the state, and each of three chunks."""
    pool, left = runner_of().pool, iter(range(calls))
    before, real = free(pool), os.preadv

    def preadv(*args):
        if next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(store.os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"a\.session cannot be read: .*Input/output error"):
        loaded(whole, pool)
    assert free(pool) == before


def test_other_versions_models_and_shapes_are_told(tmp_path, whole):
    raw, path = whole.read_bytes(), tmp_path / "a.session"
    for at, value, kind, message in (
        (0, b"X", UnsupportedFormat, "no saved session"),
        (16, b"\x02", UnsupportedFormat, "version 2 and this one reads version 1"),
        (20, b"\x01\x02\x03\x04", UnsupportedFormat, "version"),
    ):
        path.write_bytes(raw[:at] + value + raw[at + len(value) :])
        with pytest.raises(kind, match=message):
            open_session(path, fingerprint=PRINT)
    with pytest.raises(CheckpointError, match="another model, numerics or kv_format"):
        open_session(whole, fingerprint="0" * 64)
    with pytest.raises(UnsupportedFormat, match="open the engine as it was"):
        loaded(whole, runner_of("bf16").pool)
    with pytest.raises(ContextTooLong):
        loaded(whole, Runner(network(CONFIG), "f32", 1, 64, num_drafts=2).pool)


BEYOND = {"num_ids": 2**71, "num_blocks": 2**64, "block_bytes": 1, "blocks_per_chunk": 1}
HEADERS = {
    "a count below zero": {"num_ids": -1},
    "a count beyond all bounds": {"num_ids": 2**62},
    "counts that fit each other beyond all bounds": {
        **BEYOND,
        "snapshot": {"length": 2**71},
    },
    "counts that fit each other beyond every disk": {
        **BEYOND,
        "num_ids": 2**45,
        "num_blocks": 2**38,
        "snapshot": {"length": 2**45},
    },
    "more blocks than tokens": {"num_blocks": 2**40},
    "no blocks": {"num_blocks": 0},
    "no chunk size": {"blocks_per_chunk": 0},
    "a chunk size of all": {"blocks_per_chunk": 2**60},
    "fewer checksums than chunks": {"xxh3": {"ids": "", "snapshot": "", "chunks": []}},
    "state of more tokens than are known": {"snapshot": {"length": 900}},
    "fewer tokens than are computed": {"num_ids": 399},
    "a draft stage's window from beyond the end": {"snapshot": {"draft_from": 401}},
    "another size of state": {"snapshot": {"bytes": 5}},
    "state beyond every disk": {"snapshot": {"bytes": 2**45}},
    "a checksum that is none": {"xxh3": {"ids": "x", "snapshot": "", "chunks": ["", "", ""]}},
    "another size of block": {"block_bytes": 2**50},
    "a field of another type": {"fingerprint": 7},
    "a field that is not known": {"more": 1},
    "a field that is missing": {"drafts": msgspec.UNSET},
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_makes_no_sense_is_refused_though_its_checksum_is_right(tmp_path, whole, change):
    raw, path = whole.read_bytes(), tmp_path / "a.session"
    (length,) = struct.unpack_from("<Q", raw, 24)
    found = msgspec.json.decode(raw[48 : 48 + length])
    about = {**found, **change, "snapshot": {**found["snapshot"], **change.get("snapshot", {})}}
    path.write_bytes(with_header(raw, json.dumps({k: v for k, v in about.items() if v is not msgspec.UNSET}).encode()))
    pool = runner_of().pool
    before = free(pool)
    with pytest.raises(REFUSALS, match=r"a\.session"):
        loaded(path, pool)
    assert free(pool) == before


@pytest.mark.parametrize("spaces", [0, 10, 5000])
def test_a_header_may_be_spelt_another_way(tmp_path, whole, spaces):
    """Where the sections begin follows from its bytes, not from how this version would have written it."""
    raw, path, pool = whole.read_bytes(), tmp_path / "a.session", runner_of().pool
    (length,) = struct.unpack_from("<Q", raw, 24)
    path.write_bytes(with_header(raw, raw[48 : 48 + length] + b" " * spaces))
    found, _, holding = loaded(path, pool)
    assert (found.ids, found.length) == (IDS[: LENGTH + 3], LENGTH)
    pool.release(holding)


DEEP = b'{"extra":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"null", b"{}", b"\xff\xfe", b'{"a":' * 5000, DEEP])
def test_a_header_that_is_none_is_refused(tmp_path, body):
    path = tmp_path / "a.session"
    path.write_bytes(with_header(bytes(4096), body))
    with pytest.raises(CheckpointError, match="header"):
        open_session(path, fingerprint=PRINT)


def test_a_header_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path, whole, monkeypatch):
    raw, path = whole.read_bytes(), tmp_path / "a.session"
    (length,) = struct.unpack_from("<Q", raw, 24)
    monkeypatch.setattr(store, "MAX_HEADER_BYTES", length + 100)
    bomb = raw[48 : 48 + length - 2] + b"," + b" " * 200 + raw[48 + length - 2 : 48 + length]
    for body, message in ((raw[48 : 48 + length] + b" " * 101, f"has {length + 101:,} bytes"), (bomb, "of at most")):
        path.write_bytes(with_header(raw, body))
        with pytest.raises(CheckpointError, match=message):
            open_session(path, fingerprint=PRINT)
    path.write_bytes(with_header(raw, raw[48 : 48 + length] + b" " * 100))
    assert open_session(path, fingerprint=PRINT).length == LENGTH


def test_notes_that_no_reader_would_take_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_HEADER_BYTES", 2000)
    with pytest.raises(RequestError, match=r"take [23],\d\d\d bytes and 2,000 can be kept"):
        saved(tmp_path / "a.session", extra={"messages": ["x" * 2000]})
    assert not os.listdir(tmp_path)


def test_more_tokens_than_the_reader_wants_are_not_read(tmp_path, whole, monkeypatch):
    assert len(open_session(whole, fingerprint=PRINT, max_context=LENGTH + 2).ids) == LENGTH + 3
    monkeypatch.setattr(store, "_read", None)
    with pytest.raises(ContextTooLong, match=f"{LENGTH + 2} tokens were asked for and the context holds {LENGTH + 1}"):
        open_session(whole, fingerprint=PRINT, max_context=LENGTH + 1)


def test_a_chunk_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    """A chunk is held whole, twice: a file does not say how much memory its reader takes."""
    path = tmp_path / "a.session"
    saved(path, LENGTH)
    size = 3 * open_session(path, fingerprint=PRINT).about.block_bytes
    monkeypatch.setattr(store, "MAX_CHUNK_BYTES", size)
    with pytest.raises(CheckpointError, match=r"the header of .* is damaged"):  # so many blocks as fit into 32 MiB
        open_session(path, fingerprint=PRINT)
    monkeypatch.setattr(store, "CHUNK_BYTES", size)
    saved(path, LENGTH)
    assert open_session(path, fingerprint=PRINT).about.blocks_per_chunk == 3
    monkeypatch.setattr(store, "CHUNK_BYTES", 1)
    monkeypatch.setattr(store, "MAX_CHUNK_BYTES", 1)
    saved(path, LENGTH)  # a block is never cut
    assert open_session(path, fingerprint=PRINT).about.blocks_per_chunk == 1


@pytest.mark.parametrize("kv_format", ["f32", "bf16", "fp8"])
def test_nothing_of_whoever_had_the_place_before_gets_into_a_file(tmp_path, kv_format):
    """The draft stage's window may never have been written: its rows are those of another sequence."""
    files = []
    for byte in (7, 11):
        runner = Runner(network(CONFIG), kv_format, 1, 900, num_drafts=2)
        for planes in runner.pool.planes.values():
            for plane in planes:
                plane.view(torch.uint8).fill_(byte)
        saved(tmp_path / "a.session", runner=runner)
        files.append((tmp_path / "a.session").read_bytes())
    assert open_session(tmp_path / "a.session", fingerprint=PRINT).about.snapshot.draft_from == 300
    assert files[0] == files[1]


def test_what_is_no_file_is_told(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / "none" / "deeper"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_session(path, fingerprint=PRINT)
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(UnsupportedFormat, match="no saved session"):
        open_session(empty, fingerprint=PRINT)


# Disks


def fails_after(calls: int, number: int):
    """`os.pwrite` that gives up after some calls, having written less than asked before."""
    real, count = os.pwrite, [0]

    def pwrite(handle, data, at):
        count[0] += 1
        if count[0] > calls:
            raise OSError(number, os.strerror(number))
        return real(handle, data[: max(1, len(data) // 2)], at)

    return pwrite


@pytest.mark.parametrize("calls", [0, 1, 5, 20])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_gives_up_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, whole, calls, number):
    path = tmp_path / "a.session"
    path.write_bytes(whole.read_bytes())
    runner = runner_of()
    before = free(runner.pool)
    sequence = runner.open()
    runner.step([(sequence, IDS[:500])])
    monkeypatch.setattr(store.os, "pwrite", fails_after(calls, number))
    kind = CheckpointError if number == errno.EIO else DoesNotFit
    with pytest.raises(kind, match=r"a\.session") as caught:
        save_session(path, runner.pool, sequence.holding.pages, IDS, runner.snapshot(sequence), fingerprint=PRINT)
    monkeypatch.undo()
    assert path.read_bytes() == whole.read_bytes() and os.listdir(tmp_path) == ["a.session"]
    size = save_session(path, runner.pool, sequence.holding.pages, IDS, runner.snapshot(sequence), fingerprint=PRINT)
    assert open_session(path, fingerprint=PRINT).length == 500
    assert kind is CheckpointError or caught.value.needed_bytes == size
    runner.close(sequence)
    assert free(runner.pool) == before


@pytest.mark.parametrize("name", ["fsync", "replace", "ftruncate"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_gives_up_at_the_end_leaves_the_older_file_and_nothing_else(
    tmp_path, monkeypatch, whole, name, number
):
    path = tmp_path / "a.session"
    path.write_bytes(whole.read_bytes())

    def fails(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store.os, name, fails)
    with pytest.raises(DoesNotFit if number == errno.ENOSPC else CheckpointError, match=r"a\.session"):
        saved(path, 200)
    monkeypatch.undo()
    assert path.read_bytes() == whole.read_bytes() and os.listdir(tmp_path) == ["a.session"]


class Killed(BaseException):
    """The process is no more."""


def dies_at(monkeypatch, call: int) -> None:
    """Let the process end before that call to the system, and at every one after it: nothing is tidied up."""
    left = iter(range(call))

    def mortal(real):
        def run(*args):
            if next(left, None) is None:
                raise Killed
            return real(*args)

        return run

    for name in ("posix_fallocate", "pwrite", "ftruncate", "fsync", "replace", "unlink"):
        monkeypatch.setattr(store.os, name, mortal(getattr(os, name)))


@pytest.mark.usefixtures("one_block_a_chunk")
def test_a_process_that_dies_at_any_call_leaves_the_older_file_or_the_newer(tmp_path):
    path, newer = tmp_path / "a.session", tmp_path / "newer.session"
    saved(newer, 520)
    runner, seen, most = runner_of(), [], 40
    for call in range(most):
        saved(path, 130, runner=runner)
        older = path.read_bytes()
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            dies_at(patch, call)
            saved(path, 520, runner=runner_of())
        seen.append(path.read_bytes() == newer.read_bytes())
        assert seen[-1] or path.read_bytes() == older
        found, _, holding = loaded(path, runner.pool)
        assert (found.ids, found.length) in ((IDS[:133], 130), (IDS[:523], 520))
        runner.pool.release(holding)
    assert seen == sorted(seen) and not seen[0] and seen.count(False) > 8, "older ones until it is renamed"
    assert any(name.startswith(".a.session.") for name in os.listdir(tmp_path)), "which hinders no later save"


@pytest.mark.usefixtures("one_block_a_chunk")
def test_a_disk_that_takes_a_little_at_a_time_gets_all_of_it(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(store.os, "pwrite", fails_after(10**9, 0))
    saved(tmp_path / "a.session", LENGTH)
    assert (tmp_path / "a.session").read_bytes() == whole.read_bytes()


def test_folders_that_cannot_be_written_are_told(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="cannot be written"):
        saved(tmp_path / "none" / "a.session")
    (tmp_path / "folder.session").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        saved(tmp_path / "folder.session")
    assert os.listdir(tmp_path) == ["folder.session"]
