"""Files of a repository into a directory: several at once, from where they broke off, and checked.

A file has its final name when its bytes are the listed ones and are on disk; until then it ends in `.partial`.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

from pyrosome.errors import DoesNotFit, FetchError, PyrosomeError
from pyrosome.hub.record import PARTIAL
from pyrosome.hub.remote import CHUNK_BYTES, RESUME, Digest, Hub, Interrupted, Listing, RemoteFile, Stopped, wrong_bytes

AT_ONCE = 4  # files: enough to fill a line, and no burden to a mirror
_FULL = (errno.ENOSPC, errno.EDQUOT)

Heard = Callable[[str, int], object]  # "checked", "fetched" or "dropped", and how many bytes


def fetch_all(
    hub: Hub, listing: Listing, files: Iterable[RemoteFile], directory: Path, heard: Heard = lambda *_: None
) -> dict[str, str]:
    """Bring every file into the directory; returns their SHA-256 by name.

    What is there is checked, and fetched again where it is wrong.  Setting `hub.stop` ends it within a chunk.

    Raises:
        FetchError: a file does not come, or comes wrong twice.
        DoesNotFit: the disk is full.
        Stopped: it was asked to stop.
    """
    files = list(files)
    for folder in {(directory / f.name).parent for f in files}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        work = {pool.submit(_bring, hub, listing, f, directory, heard): f for f in files}
        try:
            _wait(set(work), hub.stop)
        finally:
            hub.stop.set()  # after a first error the others end too; what they have is kept
            for future in work:
                future.cancel()
    return {f.name: future.result() for future, f in work.items()}


def _wait(work: set[Future[str]], stop: threading.Event) -> None:
    while work:
        done, work = wait(work, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if stop.is_set():
            raise Stopped(f"stopped; {RESUME}")


def _bring(hub: Hub, listing: Listing, file: RemoteFile, directory: Path, heard: Heard) -> str:
    final = directory / file.name
    partial = final.with_name(final.name + PARTIAL)
    if (there := checked(final, file, hub.stop, heard)) is not None:
        return there
    for _ in range(2):
        try:
            digest = _download(hub, listing, file, partial, heard)
        except OSError as error:
            raise _cannot_write(error, file, partial) from None
        if digest.is_right:
            os.replace(partial, final)
            return digest.sha256
        num_bytes = partial.stat().st_size  # more than it should have, if it was begun by something else
        partial.unlink()
        heard("dropped", num_bytes)
    raise wrong_bytes(hub.endpoint, file)


def checked(path: Path, file: RemoteFile, stop: threading.Event, heard: Heard = lambda *_: None) -> str | None:
    """The SHA-256 of a file that is there and is the listed one; None where it is not."""
    try:
        if path.stat().st_size != file.num_bytes:
            return None
    except OSError:
        return None
    digest = Digest(file)
    with open(path, "rb") as f:
        _feed(f, digest, stop, heard)
    if digest.is_right:
        return digest.sha256
    heard("dropped", file.num_bytes)
    return None


def _feed(f: BinaryIO, digest: Digest, stop: threading.Event, heard: Heard) -> int:
    """Read on to the end; returns how many bytes there were."""
    num_bytes = 0
    while data := f.read(CHUNK_BYTES):
        if stop.is_set():
            raise Stopped(f"stopped; {RESUME}")
        digest.feed(data)
        num_bytes += len(data)
        heard("checked", len(data))
    return num_bytes


def _download(hub: Hub, listing: Listing, file: RemoteFile, partial: Path, heard: Heard) -> Digest:
    """Complete the partial file; what is in it is read for the digest and not fetched again."""
    digest, patience = Digest(file), hub.patience()
    with open(partial, "a+b") as f:
        f.seek(0)
        have = _feed(f, digest, hub.stop, heard)
        while have < file.num_bytes:
            try:
                for data in hub.stream(listing, file, have, file.num_bytes):
                    f.write(data)
                    digest.feed(data)
                    have += len(data)
                    heard("fetched", len(data))
                    patience.progressed()
                    if hub.stop.is_set():
                        raise Stopped(f"stopped; {RESUME}")
            except Interrupted as error:
                patience.wait(error)
        f.flush()
        os.fsync(f.fileno())
    return digest


def _cannot_write(error: OSError, file: RemoteFile, partial: Path) -> PyrosomeError:
    if error.errno not in _FULL:
        return FetchError(
            f"{partial} cannot be written ({error.strerror or error}); make room or change that; {RESUME}"
        )
    left = file.num_bytes - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(partial.parent).free
    hint = f"free {left:,} bytes there for this file, and what the others need; {RESUME}"
    return DoesNotFit(f"the rest of {file.name}", left, free, f"the disk at {partial.parent}", hint)
