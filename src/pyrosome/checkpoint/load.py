"""Tensors of a checkpoint, shard by shard, through a memory map.

A value yielded is a view of the mapping: whoever keeps it copies it, and when a shard is done its mapping
goes.  So a load peaks at what was kept plus one shard.  Meanwhile the system is asked to read what comes next, so that
the disk works while values are copied; what it holds for that is its own to take back, as is what it keeps of shards
that are done, from which the next load is faster.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from pyrosome.checkpoint.headers import TensorInfo
from pyrosome.checkpoint.index import CheckpointIndex
from pyrosome.checkpoint.names import IGNORED, scale_name
from pyrosome.errors import CheckpointError, MissingTensor, TruncatedFile, UnsupportedFormat
from pyrosome.quant import QuantTensor, format_of
from pyrosome.quant.e8m0 import E8M0_NAN
from pyrosome.quant.formats import DTYPES

Progress = Callable[[int, int, str], None]
_PIECE = 1 << 20  # bytes asked for at once: of a larger request Linux reads only the beginning
_WORTH_AHEAD = 1 << 26  # bytes; fewer are read before a thread would be of use

Ranges = list[tuple[int, int]]


def read_tensors(
    index: CheckpointIndex, names: Collection[str] | None = None, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Yield (name, value) of every weight, or of `names`; a weight with a scale comes as one QuantTensor.

    Args:
        progress: called after each shard with (bytes read, bytes in all, shard name).

    Raises:
        MissingTensor: a name is in no shard, or an FP8 or FP4 weight has no scale.
        TruncatedFile: a shard became shorter after it was opened.
        CheckpointError: a scale holds a NaN byte, or a shard can no longer be read.
        UnsupportedFormat: a pair of data and scale in no known format.
    """
    wanted = [n for n in (index.tensors if names is None else names) if n not in IGNORED]
    if unknown := [n for n in wanted if n not in index.tensors]:
        raise MissingTensor(f"{unknown[0]} was asked for and is in no shard of {index.path}; check the name")
    scales = {scale_name(n) for n in wanted if n.endswith(".weight")}
    weights = [n for n in wanted if n not in scales]
    by_file = sorted(weights, key=lambda n: (index.tensors[n].file.name, index.tensors[n].begin))
    total = sum(index.tensors[n].nbytes for n in wanted)
    done = 0
    # Of this call alone: one that ends half-way, or another beside it, must leave no mapping of an older file behind.
    mapped: dict[str, Tensor] = {}
    with _reading_ahead(_ranges([index.tensors[n] for n in wanted]) if total >= _WORTH_AHEAD else {}) as shard_done:
        for file, group in groupby(by_file, key=lambda n: index.tensors[n].file):
            for name in group:
                yield name, _read(index, name, mapped)
                done += index.tensors[name].nbytes
                if scale_name(name) in scales and scale_name(name) in index.tensors:
                    done += index.tensors[scale_name(name)].nbytes
            mapped.clear()
            shard_done()
            if progress is not None:
                progress(done, total, file.name)


def _ranges(tensors: list[TensorInfo]) -> dict[Path, Ranges]:
    """What is read of each file, in order, neighbours joined."""
    found: dict[Path, Ranges] = {}
    for info in sorted(tensors, key=lambda t: (t.file.name, t.begin)):
        parts = found.setdefault(info.file, [])
        if parts and info.begin - parts[-1][1] < _PIECE:
            parts[-1] = parts[-1][0], max(info.end, parts[-1][1])
        else:
            parts.append((info.begin, info.end))
    return found


@contextlib.contextmanager
def _reading_ahead(files: dict[Path, Ranges]) -> Iterator[Callable[[], None]]:
    """Have the system read the first two files, and one more each time the yielded function is called.

    A thread asks, because a request waits when the disk has many.
    """
    if not files or not hasattr(os, "posix_fadvise"):
        yield lambda: None
        return
    allowed, over = threading.Semaphore(2), threading.Event()

    def ask() -> None:
        for file, parts in files.items():
            allowed.acquire()
            with contextlib.suppress(OSError), file.open("rb", buffering=0) as f:  # whoever reads it will say more
                for at in (at for begin, end in parts for at in range(begin, end, _PIECE)):
                    if over.is_set():
                        return
                    os.posix_fadvise(f.fileno(), at, _PIECE, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="pyrosome-read-ahead", daemon=True)
    thread.start()
    try:
        yield allowed.release
    finally:
        over.set()
        allowed.release()
        thread.join()


def _read(index: CheckpointIndex, name: str, mapped: dict[str, Tensor]) -> Tensor | QuantTensor:
    info = index.tensors[name]
    data = _view(info, mapped)
    scale_info = index.tensors.get(scale_name(name)) if name.endswith(".weight") else None
    if scale_info is None:
        if info.dtype in ("F8_E4M3", "I8"):
            raise MissingTensor(
                f"{name} is {info.dtype} and {scale_name(name)} is in no shard; without its scale the weight means "
                "nothing: download the shards again"
            )
        return data
    scale = _view(scale_info, mapped)
    check_scale(scale_info, scale_name(name), scale)
    found = format_of(data, scale)
    assert found is not None  # a pair with a scale has a format, or format_of raised
    return QuantTensor(found.name, data, scale)


def check_scale(info: TensorInfo, name: str, scale: Tensor) -> None:
    """Refuse scales of which one is NaN.

    Raises:
        CheckpointError: says which, and how many.
    """
    bad = (scale.view(torch.uint8) == E8M0_NAN).nonzero()
    if len(bad):
        raise CheckpointError(
            f"{name} holds NaN (byte 255) at {tuple(bad[0].tolist())}, {len(bad)} in all; the file {info.file.name} is "
            "damaged: download it again"
        )


def _view(info: TensorInfo, mapped: dict[str, Tensor]) -> Tensor:
    """The tensor's bytes in the file, mapped; nothing is copied."""
    key = str(info.file)
    if key not in mapped:
        try:
            num_bytes = info.file.stat().st_size
            mapped[key] = torch.from_file(key, shared=False, size=num_bytes, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"shard {key} can no longer be read ({error}); download it again") from None
    if info.end > len(mapped[key]):
        raise TruncatedFile(
            f"shard {key} has {len(mapped[key])} bytes and needs at least {info.end}: it was cut after it was opened; "
            "download it again"
        )
    raw = mapped[key][info.begin : info.end]
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise UnsupportedFormat(f"a tensor in {key} has dtype {info.dtype}; read are {', '.join(DTYPES)}")
    if info.begin % dtype.itemsize:  # a view would be misaligned: rare, so a copy is fine
        raw = raw.clone()
    return raw.view(dtype).view(info.shape)
