"""Where history goes that has to leave the cache: host memory, and beyond it a folder on disk.

An entry's name is a hash chained over the model, the salt and all ids up to it, so what one process left on disk is
found by the next, and by nobody who does not know the salt.  A name alone decides nothing: an entry carries its ids
and its predecessor's name, and they are compared.  What is damaged is a miss, never an answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
import xxhash
from torch import Tensor

log = logging.getLogger(__name__)

Kind = Literal["block", "state"]
KINDS: tuple[Kind, ...] = ("block", "state")
Key = tuple[bytes, Kind]

VERSION = 1
MAGIC = b"PYROTIER"  # then: bytes of the JSON header (4, little-endian), header, payload, checksum of all before it
CHECKSUM_BYTES = 16
TAG_BYTES, DIGEST_BYTES = 8, 32
NAME_BYTES = 2 * TAG_BYTES + DIGEST_BYTES  # whose salt; which first block; the chain itself
ABANDONED_SECONDS = 3600  # a temporary file older than this is nobody's any more


@dataclasses.dataclass(frozen=True)
class Label:
    """What an entry is of."""

    name: bytes
    parent: bytes  # name of the block before
    ids: bytes  # the block's 128 ids, int32
    length: int  # tokens up to and with this block
    draft_from: int = 0  # of a state: see `cache.state.Snapshot`


def root_name(model: str, salt: str) -> bytes:
    """The name under which a salt's first blocks are chained; neither model nor salt can be read from it."""
    digest = hashlib.blake2b(
        salt.encode(errors="surrogatepass"), key=hashlib.blake2b(model.encode()).digest(), digest_size=DIGEST_BYTES
    )
    return digest.digest()[:TAG_BYTES] + bytes(TAG_BYTES) + digest.digest()


def block_name(parent: bytes, ids: bytes) -> bytes:
    """The name of the block of these ids after `parent`."""
    digest = hashlib.blake2b(ids, key=parent, digest_size=DIGEST_BYTES).digest()
    first = parent[TAG_BYTES : 2 * TAG_BYTES]
    return parent[:TAG_BYTES] + (first if any(first) else digest[:TAG_BYTES]) + digest


class Tiers:
    """Blocks and states by name, in host memory up to `host_bytes`, then on disk up to `disk_bytes`.

    What was used least recently goes first: from memory to disk, from disk for good.

    Args:
        disk_path: a folder, made if need be; several models may share it, and its bound; "" for none.
        fingerprint: what rows depend on; entries of another one are never found.
        block_bytes: a block of another size is damaged.
        kv_format: the format of the rows, for whoever looks into a file.
    """

    def __init__(
        self,
        host_bytes: int,
        disk_path: str,
        disk_bytes: int,
        fingerprint: str,
        block_bytes: int,
        *,
        kv_format: str = "",
    ) -> None:
        self.host_bytes = self.disk_bytes = 0  # taken at present
        self.fingerprint, self.kv_format = fingerprint, kv_format
        self._host_budget, self._disk_budget, self._block_bytes = host_bytes, disk_bytes, block_bytes
        self._host: OrderedDict[Key, tuple[Label, Tensor]] = OrderedDict()  # least recently used first
        self._disk: OrderedDict[Key, int] = OrderedDict()  # bytes of each file, least recently used first
        self._folder: Path | None = None
        self._can_write = self._has_warned = False
        if disk_path:
            self._open_disk(Path(disk_path))

    def root(self, salt: str) -> bytes:
        """The name under which this model's blocks of a salt are chained."""
        return root_name(f"{self.fingerprint} {self.kv_format}", salt)

    def has(self, kind: Kind, name: bytes) -> bool:
        """Whether there seems to be an entry; only `get` knows whether it is whole."""
        return (name, kind) in self._host or (name, kind) in self._disk

    def put(self, kind: Kind, label: Label, data: Tensor) -> None:
        """Keep uint8 data, as long as there is room; never an error."""
        key = label.name, kind
        if key in self._host:
            self._host.move_to_end(key)
        elif key in self._disk:
            self._disk.move_to_end(key)
        elif data.numel() > self._host_budget:
            self._write(kind, label, data)
        else:
            self._host[key] = label, data
            self.host_bytes += data.numel()
            while self.host_bytes > self._host_budget:
                self._spill()

    def get(self, kind: Kind, label: Label) -> tuple[Label, Tensor] | None:
        """The entry of that name, ids and predecessor; None where there is none, or it is damaged."""
        key = label.name, kind
        if found := self._host.get(key):
            self._host.move_to_end(key)
        elif key in self._disk:
            found = self._read(key)
        if found is None:
            return None
        of, data = found
        is_same = (of.parent, of.ids, of.length) == (label.parent, label.ids, label.length)
        return found if is_same and (kind == "state" or data.numel() == self._block_bytes) else None

    def drop(self, tags: bytes) -> None:
        """Forget every entry whose name begins so: one, all of one first block, or all of one salt."""
        for key in [k for k in self._host if k[0].startswith(tags)]:
            self.host_bytes -= self._host.pop(key)[1].numel()
        for key in [k for k in self._disk if k[0].startswith(tags)]:
            self._unlink(key)

    def flush(self) -> None:
        """Write to disk what is in host memory, for the next process."""
        while self._host and self._can_write:
            self._spill()

    def _spill(self) -> None:
        (_, kind), (label, data) = self._host.popitem(last=False)
        self.host_bytes -= data.numel()
        self._write(kind, label, data)

    # Disk

    def _open_disk(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [(entry.stat(), entry) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
        except OSError as error:
            log.warning("the disk tier is turned off: %s; history that leaves the cache is computed again", error)
            return
        for about, entry in sorted(found, key=lambda f: f[0].st_mtime):
            if key := _key_of(entry.name):
                self._disk[key] = about.st_size
                self.disk_bytes += about.st_size
            elif entry.name.startswith("tmp") and about.st_mtime < time.time() - ABANDONED_SECONDS:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
        self._folder, self._can_write = folder, True
        self._keep_budget()

    def _path(self, key: Key) -> Path:
        assert self._folder is not None
        return self._folder / f"{key[0].hex()}.{key[1]}"

    def _write(self, kind: Kind, label: Label, data: Tensor) -> None:
        key, head = (label.name, kind), self._header(kind, label, data.numel())
        size = len(head) + data.numel() + CHECKSUM_BYTES
        if not self._can_write or size > self._disk_budget or key in self._disk:
            return
        payload = memoryview(data.contiguous().numpy())  # type: ignore[arg-type]
        checksum = xxhash.xxh3_128(head)
        checksum.update(payload)
        temporary = ""
        try:
            # Not synced: after a power cut a file may be short or empty, which its checksum shows.
            handle, temporary = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(handle, "wb") as f:
                f.writelines((head, payload, checksum.digest()))
            os.replace(temporary, self._path(key))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            self._can_write = False
            log.warning(
                "nothing more is written to the disk tier: %s; what is there is still read, other history that leaves "
                "the cache is computed again",
                error,
            )
            return
        self._disk[key] = size
        self.disk_bytes += size
        self._keep_budget()

    def _header(self, kind: Kind, label: Label, data_bytes: int) -> bytes:
        about = {
            "version": VERSION, "kind": kind, "fingerprint": self.fingerprint, "kv_format": self.kv_format,
            "parent": label.parent.hex(), "ids": label.ids.hex(), "length": label.length,
            "draft_from": label.draft_from, "data_bytes": data_bytes,
        }  # fmt: skip
        header = json.dumps(about).encode()
        return MAGIC + len(header).to_bytes(4, "little") + header

    def _read(self, key: Key) -> tuple[Label, Tensor] | None:
        try:
            found = self._parsed(key, memoryview(self._path(key).read_bytes()))
        except FileNotFoundError:  # another process that shares the folder made room
            self.disk_bytes -= self._disk.pop(key)
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
            log.log(
                level, "%s is removed from the disk tier: %s; its tokens are computed again, and further entries like "
                "it are removed without a word", self._path(key).name[:16], error,
            )  # fmt: skip
            self._unlink(key)
            return None
        self._disk.move_to_end(key)
        with contextlib.suppress(OSError):
            os.utime(self._path(key))
        return found

    def _parsed(self, key: Key, raw: memoryview) -> tuple[Label, Tensor]:
        """An entry from its file's bytes; one of the errors `_read` expects where it is not what it should be."""
        body, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
        start = len(MAGIC) + 4
        if raw[: len(MAGIC)] != MAGIC or xxhash.xxh3_128(body).digest() != checksum:
            raise ValueError("it is cut short or damaged")
        end = start + int.from_bytes(raw[len(MAGIC) : start], "little")
        about = json.loads(bytes(body[start:end]))
        found = about["version"], about["kind"], about["fingerprint"], about["kv_format"], about["data_bytes"]
        if found != (VERSION, key[1], self.fingerprint, self.kv_format, len(body) - end):
            raise ValueError("it is of another version or model")
        parent, ids = bytes.fromhex(about["parent"]), bytes.fromhex(about["ids"])
        if block_name(parent, ids) != key[0]:
            raise ValueError("its name is not that of its ids")
        data = torch.frombuffer(bytearray(body[end:]), dtype=torch.uint8) if len(body) > end else _NOTHING
        return Label(key[0], parent, ids, int(about["length"]), int(about["draft_from"])), data

    def _unlink(self, key: Key) -> None:
        self.disk_bytes -= self._disk.pop(key)
        with contextlib.suppress(OSError):  # if it is still there the next process finds it, and its checksum
            os.unlink(self._path(key))

    def _keep_budget(self) -> None:
        while self.disk_bytes > self._disk_budget and self._disk:
            self._unlink(next(iter(self._disk)))


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _key_of(file: str) -> Key | None:
    name, _, kind = file.partition(".")
    if kind not in KINDS or len(name) != 2 * NAME_BYTES:
        return None
    with contextlib.suppress(ValueError):
        return bytes.fromhex(name), kind
    return None
