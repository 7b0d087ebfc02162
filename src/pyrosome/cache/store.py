"""A session in a file: its tokens, its history in blocks, and its state.  docs/session-file.md has the layout.

Written to a temporary name, synced and renamed, so that a file is whole or not there.  Every byte is covered by a
checksum, and checked before it is used: a damaged file is an error, never another answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
import torch
import xxhash
from torch import Tensor

from pyrosome.cache.blocks import block_bytes, read_blocks, write_blocks
from pyrosome.cache.pool import CachePool, Holding
from pyrosome.cache.state import Snapshot, snapshot_bytes
from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.errors import (
    CheckpointError,
    ContextTooLong,
    DoesNotFit,
    RequestError,
    TruncatedFile,
    UnsupportedFormat,
)

MAGIC = b"PYROSOME-SESSION"
VERSION = 1
_LITTLE_ENDIAN = 0x01020304
_PREAMBLE = struct.Struct("<16sIIQ16s")  # magic, version, byte order, bytes of the header, its checksum
ALIGNMENT = 4096
CHUNK_BYTES = 32 << 20  # of blocks read, checked and written at once
MAX_CHUNK_BYTES = 64 << 20  # that a file may ask a reader to hold at once, if it is more than one block
MAX_HEADER_BYTES = 16 << 20  # a header is read and taken apart in memory
_AGAIN = "save it again, or compute the session anew from its text"
_MOST = 1 << 48  # of anything that a header counts: a length beyond 63 bits would be an OverflowError
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """The state's part of the header."""

    length: _Count  # tokens whose rows are in the file
    draft_from: _Count
    bytes: _Count


class _Sums(msgspec.Struct, forbid_unknown_fields=True):
    """XXH3-128 of each section, in hexadecimal digits; of the blocks, of each chunk."""

    ids: str
    snapshot: str
    chunks: list[str]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """What a file says of itself."""

    fingerprint: str
    kv_format: str
    drafts: bool
    block_bytes: _Count
    num_ids: _Count
    num_blocks: _Count
    blocks_per_chunk: Annotated[int, msgspec.Meta(ge=1, le=_MOST)]
    snapshot: _State
    xxh3: _Sums
    extra: dict[str, Any] = {}

    @property
    def chunk_starts(self) -> range:
        """The first block of each chunk."""
        return range(0, self.num_blocks if self.block_bytes else 0, self.blocks_per_chunk)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(first block, one past the last) of each chunk."""
        return [(at, min(at + self.blocks_per_chunk, self.num_blocks)) for at in self.chunk_starts]

    @property
    def fits_itself(self) -> bool:
        """Whether its counts can be those of one session."""
        return (
            self.num_ids >= self.snapshot.length >= self.snapshot.draft_from
            and self.num_blocks == self.snapshot.length // BLOCK_TOKENS
            and len(self.xxh3.chunks) == len(self.chunk_starts)
            and (self.blocks_per_chunk == 1 or self.blocks_per_chunk * self.block_bytes <= MAX_CHUNK_BYTES)
        )


def save_session(
    path: str | Path,
    pool: CachePool,
    pages: dict[int, list[int]],
    ids: Sequence[int],
    snapshot: Snapshot,
    *,
    fingerprint: str,
    extra: dict[str, Any] | None = None,
) -> int:
    """Write a session; returns the file's bytes.

    Args:
        pages: the holding's, with the history of the first `snapshot.length` tokens.
        ids: every token known, at least `snapshot.length` of them.
        extra: further plain data to be kept with it.

    Raises:
        DoesNotFit: the disk has not so many bytes free.  An older file of that name is as it was.
        CheckpointError: the folder cannot be written to.
        RequestError: `extra` is larger than a file may say of itself.
    """
    path = Path(path)
    packed, state = np.asarray(ids, dtype="<i4").tobytes(), _bytes_of(snapshot.data)
    size = block_bytes(pool)
    about = _Header(
        fingerprint, pool.kv_format, pool.has_drafts, size, len(ids), snapshot.length // BLOCK_TOKENS,
        max(1, CHUNK_BYTES // max(1, size)), _State(snapshot.length, snapshot.draft_from, snapshot.num_bytes),
        _Sums(_sum(packed), _sum(state), []), extra or {},
    )  # fmt: skip
    about.xxh3.chunks = ["0" * 32] * len(about.chunk_starts)  # the header's length is known before they are
    if (header_bytes := len(_header(about))) > MAX_HEADER_BYTES:
        raise RequestError(
            f"the session's messages and other notes take {header_bytes:,} bytes and {MAX_HEADER_BYTES:,} can be kept "
            "with it; leave some of them out"
        )
    sections = _sections(about, header_bytes)
    total = sections["end"]
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}; choose another folder") from None
    try:
        with os.fdopen(handle, "wb", buffering=0) as f:
            with contextlib.suppress(OSError, AttributeError):  # not every file system can; the write then finds out
                os.posix_fallocate(f.fileno(), 0, total)
            _write_at(f, sections["ids"], memoryview(packed))
            _write_at(f, sections["snapshot"], state)
            about.xxh3.chunks = list(_write_chunks(f, sections["blocks"], pool, pages, about.chunks, size))
            _write_at(f, 0, memoryview(_header(about)))
            os.ftruncate(f.fileno(), total)
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _refused(path, total, error) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(path.parent)
    return total


@dataclasses.dataclass(frozen=True)
class SavedSession:
    """A session file whose header was read and fits."""

    path: Path
    ids: list[int]
    about: _Header
    sections: dict[str, int]

    @property
    def length(self) -> int:
        """Tokens whose rows are in it."""
        return self.about.snapshot.length

    def load(self, pool: CachePool, holding: Holding) -> Snapshot:
        """Bring the history into an empty holding's pages; returns the state to be put after it.

        Raises:
            CheckpointError: the file is damaged, or of a shape this cache has not.  Release the holding then.
            DoesNotFit: no page is free.
        """
        about, snapshot, sums = self.about, self.about.snapshot, self.about.xxh3
        found = (about.kv_format, about.drafts, about.block_bytes, snapshot.bytes)
        expected = (pool.kv_format, pool.has_drafts, block_bytes(pool), snapshot_bytes(pool, self.length))
        if found != expected:
            raise UnsupportedFormat(
                f"{self.path} was saved with (kv_format, drafts, bytes of a block, bytes of state) {found} and this "
                f"cache has {expected}; open the engine as it was when the session was saved"
            )
        pool.prepare(holding, 0, self.length, with_slot=False)
        sections, chunks, size = self.sections, about.chunks, about.block_bytes
        with _readable(self.path), open(self.path, "rb", buffering=0) as f, ThreadPoolExecutor(1) as reader:
            state = _read(f, self.path, sections["snapshot"], snapshot.bytes, sums.snapshot, "the state")
            buffers = _two_buffers(chunks, size)

            def chunk(i: int) -> Tensor:
                first, last = chunks[i]
                what, at = f"blocks {first} to {last}", sections["blocks"] + first * size
                return _read(f, self.path, at, (last - first) * size, sums.chunks[i], what, buffers[i % 2].view(-1))

            ahead: Future[Tensor] | None = reader.submit(chunk, 0) if chunks else None
            for i, (first, _) in enumerate(chunks):
                assert ahead is not None
                data = ahead.result()
                ahead = reader.submit(chunk, i + 1) if i + 1 < len(chunks) else None
                write_blocks(pool, holding.pages, first, data.view(-1, size))
        return Snapshot(self.length, snapshot.draft_from, state)


def open_session(path: str | Path, *, fingerprint: str, max_context: int | None = None) -> SavedSession:
    """Read and check a session file's header and tokens.  The file may be anybody's: it is believed in nothing.

    Args:
        max_context: tokens that there is room for; of more, nothing is read.

    Raises:
        ContextTooLong: it has more tokens than that.
        CheckpointError: there is no such file, it is damaged, or of another model or numerics.
        TruncatedFile: it ends too early.
        UnsupportedFormat: it is no session, or of another version.
    """
    path = Path(path)
    with _readable(path), open(path, "rb", buffering=0) as f:
        about, header_bytes = _read_header(f, path)
        if about.fingerprint != fingerprint:
            raise CheckpointError(
                f"{path} was saved with another model, numerics or kv_format (fingerprint "
                f"{about.fingerprint[:16]}, here {fingerprint[:16]}); open it with the one it was saved with"
            )
        sections = _sections(about, header_bytes)
        found = os.fstat(f.fileno()).st_size
        if found < sections["end"]:
            raise TruncatedFile(f"{path} has {found} bytes and its header promises {sections['end']}; {_AGAIN}")
        # An answer that ended for want of room is one id longer than what is computed of it.
        tokens = max(about.snapshot.length, about.num_ids - 1)
        if max_context is not None and tokens > max_context:
            raise ContextTooLong(tokens, max_context, "give the engine a larger max_context or cache_bytes")
        ids = _read(f, path, sections["ids"], 4 * about.num_ids, about.xxh3.ids, "the tokens")
    return SavedSession(path, ids.view(torch.int32).tolist(), about, sections)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give a file that Session.save wrote") from None


def _header(about: _Header) -> bytes:
    body = msgspec.json.encode(about)
    return _PREAMBLE.pack(MAGIC, VERSION, _LITTLE_ENDIAN, len(body), xxhash.xxh3_128_digest(body)) + body


def _read_header(f: BinaryIO, path: Path) -> tuple[_Header, int]:
    raw = f.read(_PREAMBLE.size)
    if len(raw) < _PREAMBLE.size or not raw.startswith(MAGIC):
        raise UnsupportedFormat(f"{path} is no saved session; give a file that Session.save wrote")
    _, version, order, length, checksum = _PREAMBLE.unpack(raw)
    if version != VERSION or order != _LITTLE_ENDIAN:
        raise UnsupportedFormat(f"{path} is of version {version} and this one reads version {VERSION}; {_AGAIN}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"the header of {path} has {length:,} bytes, of at most {MAX_HEADER_BYTES:,}; {_AGAIN}")
    if length > os.fstat(f.fileno()).st_size:
        raise TruncatedFile(f"{path} ends within its header of {length} bytes; {_AGAIN}")
    body = f.read(length)
    try:
        about = msgspec.json.decode(body, type=_Header) if xxhash.xxh3_128_digest(body) == checksum else None
    except (msgspec.DecodeError, RecursionError):
        about = None
    if about is None or not about.fits_itself:
        raise CheckpointError(f"the header of {path} is damaged; {_AGAIN}")
    return about, _PREAMBLE.size + length


def _sections(about: _Header, header_bytes: int) -> dict[str, int]:
    """Where each section begins, in bytes; each on a multiple of 4,096."""

    def aligned(at: int) -> int:
        return -(-at // ALIGNMENT) * ALIGNMENT

    ids = aligned(header_bytes)
    snapshot = aligned(ids + 4 * about.num_ids)
    blocks = aligned(snapshot + about.snapshot.bytes)
    return {"ids": ids, "snapshot": snapshot, "blocks": blocks,
            "end": blocks + about.num_blocks * about.block_bytes}  # fmt: skip


def _write_chunks(
    f: BinaryIO, at: int, pool: CachePool, pages: dict[int, list[int]], chunks: list[tuple[int, int]], size: int
) -> Iterator[str]:
    """Gather one chunk while the one before it is summed and written."""

    def write(data: Tensor, place: int) -> str:
        view = _bytes_of(data)
        checksum = _sum(view)
        _write_at(f, place, view)
        return checksum

    buffers = _two_buffers(chunks, size)
    with ThreadPoolExecutor(1) as writer:
        behind: Future[str] | None = None
        for number, (first, last) in enumerate(chunks):
            data = read_blocks(pool, pages, first, last, buffers[number % 2])
            if behind is not None:
                yield behind.result()
            behind = writer.submit(write, data, at + first * size)
        if behind is not None:
            yield behind.result()


def _two_buffers(chunks: list[tuple[int, int]], size: int) -> list[Tensor]:
    """Room for a chunk, twice, by turns: one is filled while the other is on its way."""
    most = max((last - first for first, last in chunks), default=0)
    return [torch.empty(most, size, dtype=torch.uint8) for _ in range(2)]


def _write_at(f: BinaryIO, at: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(f.fileno(), data, at)
        data, at = data[written:], at + written


def _read(f: BinaryIO, path: Path, at: int, size: int, checksum: str, what: str, out: Tensor | None = None) -> Tensor:
    data = torch.empty(size, dtype=torch.uint8) if out is None else out[:size]
    view, done = _bytes_of(data), 0
    while done < size:
        count = os.preadv(f.fileno(), [view[done:]], at + done)
        if not count:
            raise TruncatedFile(f"{path} ends within {what}; {_AGAIN}")
        done += count
    if _sum(view) != checksum:
        raise CheckpointError(f"{what} in {path} are damaged: the checksum is another; {_AGAIN}")
    return data


def _bytes_of(data: Tensor) -> memoryview:
    return memoryview(data.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _sum(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _refused(path: Path, needed: int, error: OSError) -> DoesNotFit | CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            free = os.statvfs(path.parent)
            available = free.f_bavail * free.f_frsize
            return DoesNotFit(f"the session file {path}", needed, available, "the disk", "free some, or save elsewhere")
    return CheckpointError(f"{path} could not be written: {error}; an older file of that name is as it was")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
