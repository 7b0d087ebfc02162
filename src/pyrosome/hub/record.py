"""What was pulled into a directory: a record of repository and commit, and SHA256SUMS once everything is there."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from pyrosome.checkpoint.index import RECORD_NAME, SUMS_NAME
from pyrosome.errors import CheckpointError, RequestError
from pyrosome.hub.remote import RemoteFile, is_safe

LOCK_NAME = ".pull.lock"
PARTIAL = ".partial"  # ends the name of a file that is not whole yet, so that no reader takes it for one
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One directory's repository, pinned to a commit, and the files that belong there."""

    repo: str
    revision: str  # as it was asked for
    commit: str
    files: tuple[RemoteFile, ...]

    def write(self, directory: Path) -> None:
        """Put it into the directory, in one piece or not at all."""
        text = json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, indent=1)
        write_whole(directory / RECORD_NAME, text + "\n")

    @classmethod
    def read(cls, directory: Path) -> Record | None:
        """The record of a directory; None where nothing was pulled into it.

        Raises:
            CheckpointError: there is one and it cannot be understood.
        """
        path = directory / RECORD_NAME
        try:
            d = json.loads(path.read_text(encoding="utf-8"))
            if d["version"] != _VERSION:
                raise ValueError(f"version {d['version']!r}, and {_VERSION} is read here")
            files = tuple(RemoteFile(**f) for f in d["files"])
            if not all(isinstance(f.num_bytes, int) and isinstance(f.sha256 or f.blob, str) for f in files):
                raise ValueError("a file without size or hash")
            if not all(isinstance(f.name, str) and is_safe(f.name) for f in files):
                raise ValueError("a file that leads elsewhere")
            return cls(str(d["repo"]), str(d["revision"]), str(d["commit"]), files)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be understood ({error}); remove it and pull again: files that are right are kept"
            ) from None


def write_sums(directory: Path, sums: dict[str, str]) -> None:
    """SHA256SUMS, as `sha256sum -c` reads it."""
    write_whole(directory / SUMS_NAME, "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))


def write_whole(path: Path, text: str) -> None:
    """A small file that is there whole or not at all, whatever ends this process."""
    draft = path.with_name(path.name + PARTIAL)
    with open(draft, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(draft, path)


class Claim:
    """A directory that this process alone pulls into."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME

    def __enter__(self) -> Claim:
        import filelock  # huggingface_hub needs it too

        self._lock = filelock.FileLock(self._path)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RequestError(
                f"another process is pulling into {self._path.parent}; wait for it, or name another directory with --to"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()  # its file stays: were it removed, two processes could hold two files of that name
