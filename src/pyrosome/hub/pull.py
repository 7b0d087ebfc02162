"""Pulling a checkpoint: what it is and whether there is room, before gigabytes travel; then the files.

`prepare` reads headers alone, `take` fetches, `survey` looks at what is there without a connection.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pyrosome.checkpoint.index import RECORD_NAME, CheckpointIndex
from pyrosome.errors import DoesNotFit, RequestError
from pyrosome.folders import models_home
from pyrosome.hub.fetch import Heard, checked, fetch_all
from pyrosome.hub.outline import needed_files, remote_index
from pyrosome.hub.record import PARTIAL, Claim, Record, write_sums
from pyrosome.hub.remote import Hub, Listing, RemoteFile, check_repo

MAIN = "main"
_SMALL_BYTES = 64 << 20  # files that are compared with those of others before anybody is asked

State = Literal["right", "wrong", "partial", "missing"]


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a pull will do, known from headers alone."""

    listing: Listing
    revision: str  # as it was asked for
    moved: str  # the commit that revision is at now, where the directory holds an earlier one; else ""
    directory: Path
    index: CheckpointIndex
    files: tuple[RemoteFile, ...]
    there_bytes: int  # of them, of whole files and of parts; not checked yet
    free_bytes: int  # on the disk
    header_bytes: int  # that travelled to know all this

    @property
    def num_bytes(self) -> int:
        return sum(f.num_bytes for f in self.files)

    @property
    def missing_bytes(self) -> int:
        return self.num_bytes - self.there_bytes

    def check_room(self) -> None:
        """Raise where the disk is too small.

        Raises:
            DoesNotFit: with the bytes that are missing.
        """
        if self.missing_bytes <= self.free_bytes:
            return
        more = self.missing_bytes - self.free_bytes
        raise DoesNotFit(
            f"{self.listing.repo} ({self.missing_bytes:,} bytes to fetch)",
            self.missing_bytes,
            self.free_bytes,
            f"the disk at {self.directory}",
            f"free {more:,} bytes more there, or name a directory on another disk with --to",
        )


def default_directory(repo: str) -> Path:
    """Where a repository goes if nobody says otherwise, and where its name is looked for."""
    return models_home() / check_repo(repo)


def prepare(hub: Hub, revision: str, directory: Path) -> Offer:
    """Look at a repository through its listing and headers.

    A directory stays at the commit it was begun with, so that no two halves come from two commits.

    Raises:
        RequestError: no such repository or revision, not for whoever asks; or the directory holds something else.
        CheckpointError: it is not a whole checkpoint of this architecture.
        FetchError: the endpoint cannot be reached, or gives something else than it lists.
    """
    if not revision or not revision.isprintable():
        raise RequestError(f"--revision is {revision!r}; name a branch, tag or commit, or leave it out for {MAIN}")
    record = Record.read(directory)
    if record and record.repo != hub.repo:
        raise RequestError(f"{directory} holds {record.repo}; name another directory for {hub.repo} with --to")
    listing, moved = hub.listing(revision), ""
    if record and record.commit != listing.commit:
        if record.revision != revision:
            raise RequestError(
                f"{directory} holds {hub.repo} at {record.revision} ({record.commit}), and {revision} is "
                f"{listing.commit}; name another directory for it with --to, or remove that one"
            )
        listing, moved = hub.listing(record.commit), listing.commit
    index = remote_index(hub, listing)
    index.check().raise_if_bad()
    files = needed_files(listing, sorted({t.file.name for t in index.tensors.values()}))
    if record is None:
        _refuse_others(directory, [f for f in files if not _is_long(directory, f)], hub)
    there = sum(_there(directory, f) for f in files)
    return Offer(listing, revision, moved, directory, index, files, there, _free(directory), hub.received)


def take(hub: Hub, offer: Offer, heard: Heard = lambda *_: None) -> dict[str, str]:
    """Fetch what is missing and check everything; returns SHA-256 by name, which SHA256SUMS then holds too.

    Raises:
        RequestError: another process is at it, the directory cannot be made, or it holds something else.
        FetchError, DoesNotFit: as `fetch_all`; what was fetched is kept.
    """
    directory = offer.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with Claim(directory):
            if Record.read(directory) is None:  # from here on what is wrong is this command's own, and fetched again
                _refuse_others(directory, [f for f in offer.files if _is_long(directory, f)], hub, heard)
            Record(offer.listing.repo, offer.revision, offer.listing.commit, offer.files).write(directory)
            sums = fetch_all(hub, offer.listing, offer.files, directory, heard)
            write_sums(directory, sums)
    except OSError as error:
        raise RequestError(f"{directory} cannot be used ({error.strerror or error}); name another with --to") from None
    return sums


def survey(directory: Path, repo: str, heard: Heard = lambda *_: None) -> tuple[Record, dict[str, State]]:
    """What of a pulled repository is there, by its record and hashes; nothing is asked of anybody.

    Raises:
        RequestError: nothing was pulled there, or another repository was.
        CheckpointError: the record cannot be understood.
    """
    record = Record.read(directory)
    if record is None:
        raise RequestError(
            f"{directory} has no {RECORD_NAME}: nothing was pulled there, and --offline fetches nothing; run "
            f"`pyrosome pull {repo}` with a connection, or name the directory with --to"
        )
    if record.repo != repo:
        raise RequestError(f"{directory} holds {record.repo} and {repo} was asked for; name its directory with --to")
    return record, {f.name: _state(directory, f, heard) for f in record.files}


def _state(directory: Path, file: RemoteFile, heard: Heard) -> State:
    path = directory / file.name
    if path.exists():
        return "right" if checked(path, file, threading.Event(), heard) else "wrong"
    return "partial" if path.with_name(path.name + PARTIAL).exists() else "missing"


def _there(directory: Path, file: RemoteFile) -> int:
    path = directory / file.name
    if path.is_file():
        return file.num_bytes if path.stat().st_size == file.num_bytes else 0
    partial = path.with_name(path.name + PARTIAL)
    return min(partial.stat().st_size, file.num_bytes) if partial.is_file() else 0


def _refuse_others(directory: Path, files: Iterable[RemoteFile], hub: Hub, heard: Heard = lambda *_: None) -> None:
    """Nothing is written over a file that this command did not put there."""
    for file in files:
        path = directory / file.name
        if not os.path.lexists(path):
            continue
        try:
            is_right = path.is_file() and checked(path, file, hub.stop, heard) is not None
        except OSError as error:
            raise RequestError(f"{path} is there and cannot be read ({error.strerror or error})") from None
        if not is_right:
            raise RequestError(
                f"{path} is there and is not the one of {hub.repo}; move it away, or name another directory with --to"
            )
        heard("dropped", file.num_bytes)  # it will be checked once more, with all others


def _is_long(directory: Path, file: RemoteFile) -> bool:
    """Whether it takes a while to tell a file that is there from the listed one: both have the same size, and a large
    one."""
    path = directory / file.name
    return file.num_bytes > _SMALL_BYTES and path.is_file() and path.stat().st_size == file.num_bytes


def _free(directory: Path) -> int:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free
