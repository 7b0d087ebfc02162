"""The safetensors container: a header of names, dtypes, shapes and byte ranges, then the bytes.

Headers are read without touching the data, so that a 160 GB checkpoint is understood in a second.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyrosome.checkpoint.names import DTYPE_BYTES
from pyrosome.errors import CheckpointError, MissingTensor, TruncatedFile, UnsupportedFormat

MAX_HEADER_BYTES = 100_000_000  # the container's own limit; longer ones other readers refuse too
_MOST, _MOST_DIMENSIONS = 1 << 63, 16  # of a dimension or an offset: numbers beyond are too long to be written
PREFIX_BYTES = 8  # the header's length, little-endian
_AGAIN = "download this file again"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are: `begin` to `end` are absolute offsets in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names and places of every tensor in one .safetensors file.

    Raises:
        MissingTensor: there is no such file.
        TruncatedFile: it ends before its header says so.
        UnsupportedFormat: a dtype nobody here knows.
        CheckpointError: the header is not what the container prescribes.
    """
    try:
        file_bytes = os.stat(path).st_size
        with open(path, "rb") as f:
            length = header_bytes(path, f.read(PREFIX_BYTES), file_bytes)
            raw = f.read(length)
    except FileNotFoundError:
        raise MissingTensor(f"shard {path.name} is not in {path.parent}; {_AGAIN}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return parse_header(path, raw, file_bytes)


def header_bytes(path: Path, prefix: bytes, file_bytes: int) -> int:
    """Length of the header that a file of `file_bytes` says it has in its first PREFIX_BYTES; `path` is for messages.

    Raises:
        TruncatedFile, CheckpointError: as `read_header`.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or not 0 < length <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} says its header has {length} bytes: not a .safetensors file; {_AGAIN}")
    if PREFIX_BYTES + length > file_bytes:
        raise TruncatedFile(
            f"{path} has {file_bytes} bytes and its header alone needs {PREFIX_BYTES + length}; {_AGAIN}"
        )
    return length


def parse_header(path: Path, raw: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    """As `read_header`, from a header's bytes, which need not lie on this machine.

    Raises:
        TruncatedFile, UnsupportedFormat, CheckpointError: as `read_header`.
    """
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"the header of {path} is not an object; {_AGAIN}")
    start = PREFIX_BYTES + len(raw)
    tensors = {n: _entry(path, n, e, start) for n, e in entries.items() if n != "__metadata__"}
    needed = max((t.end for t in tensors.values()), default=start)
    if needed > file_bytes:
        first = min((t.begin, n) for n, t in tensors.items() if t.end > file_bytes)[1]
        raise TruncatedFile(
            f"{path} has {file_bytes} bytes and its header promises {needed}: {first} and what follows is cut; {_AGAIN}"
        )
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    for (name, t), (other, u) in pairwise(ordered):
        if t.end > u.begin:
            raise CheckpointError(f"the header of {path} places {name} and {other} on the same bytes; {_AGAIN}")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sound = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _MOST for v in (*shape, begin, end))
        sound = sound and len(shape) <= _MOST_DIMENSIONS
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"the header of {path} has a malformed entry for {name}: {repr(entry)[:200]}; {_AGAIN}")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UnsupportedFormat(
            f"{name} in {path} has dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}; convert the checkpoint first"
        )
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{name} in {path} is {dtype} {list(shape)}, {math.prod(shape) * DTYPE_BYTES[dtype]} bytes, and its header "
            f"gives it {end - begin}; {_AGAIN}"
        )
    return TensorInfo(dtype, shape, path, start + begin, start + end)
