"""A repository on a hub or mirror: what it lists, and bytes of its files by range.

huggingface_hub does the talking (endpoint, token, proxies, redirects, what an answer means); what is asked again, and
for how long, is decided here.  Messages say what was asked, what came, and what to do.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyrosome.checkpoint.index import REPO
from pyrosome.errors import CheckpointError, FetchError, RequestError

WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before a request that failed is made again; bytes that come start the row anew
MAX_WAIT_S = 330.0  # hubs count requests by five minutes and say how many are left of those
SILENCE_S = 30.0  # a connection that gives nothing for so long is lost
CHUNK_BYTES = 1 << 20
MAX_NAME_BYTES = 240  # of a file's name, with room for what is put behind it until it is whole
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
RESUME = "what was fetched is kept, and the same command goes on from there"

_CHECK_NETWORK = "check the network, or name a mirror with --mirror or HF_ENDPOINT"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as a repository lists it: its size, and the hash it is checked by."""

    name: str  # relative, with slashes
    num_bytes: int
    sha256: str | None  # of files in large file storage
    blob: str | None  # of files in git: SHA-1 of "blob SIZE\0" and the bytes


@dataclasses.dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]


class Digest:
    """SHA-256 of what it is fed, and the hash that a listed file is checked by, where that is another."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False) if not file.sha256 else None

    def feed(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._blob is not None:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def is_right(self) -> bool:
        if self._blob is None:
            return self.sha256 == self._file.sha256
        return self._blob.hexdigest() == self._file.blob


class Interrupted(Exception):
    """A request that may be made again: what was lost, what to do if it stays so, and how long the hub asks to wait."""

    def __init__(self, found: str, advice: str, wait_s: float = 0.0) -> None:
        super().__init__(found, advice)
        self.found, self.advice, self.wait_s = found, advice, wait_s


class Stopped(FetchError):
    """Nobody waits for it any more."""


class Patience:
    """How often something is asked again.  `stop` ends a wait at once; `told` hears of each."""

    def __init__(self, waits_s: tuple[float, ...], stop: threading.Event, told: Callable[[str], object]) -> None:
        self._waits_s, self._stop, self._told, self._failed = waits_s, stop, told, 0

    def progressed(self) -> None:
        """Something came: the next failure is a first one."""
        self._failed = 0

    def wait(self, error: Interrupted) -> None:
        """Wait as long as is due after this failure.

        Raises:
            FetchError: it was the last one.
            Stopped: while waiting.
        """
        if self._failed >= len(self._waits_s):
            raise FetchError(f"{error.found}, {self._failed + 1} times in a row; {error.advice}; {RESUME}")
        seconds = max(self._waits_s[self._failed], min(error.wait_s, MAX_WAIT_S))
        self._failed += 1
        self._told(f"{error.found}; asked again in {seconds:g} s")
        if self._stop.wait(seconds):
            raise Stopped(f"stopped; {RESUME}")


class Hub:
    """One repository at one endpoint.  `received` counts the bytes of files that came from there.

    Args:
        endpoint: a mirror's URL; None takes HF_ENDPOINT, else the hub's own.
        waits_s, silence_s: as WAITS_S and SILENCE_S.
        told: called with a sentence before each wait, from any thread.

    Raises:
        RequestError: no repository can have that name, or the mirror is no URL.
    """

    def __init__(
        self,
        repo: str,
        endpoint: str | None = None,
        *,
        waits_s: tuple[float, ...] = WAITS_S,
        silence_s: float = SILENCE_S,
        told: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.repo, self.endpoint = check_repo(repo), _endpoint(endpoint)
        # The token of a login belongs to the hub it was made for: a mirror gets one only if it is given for this run.
        self._token: str | bool | None = None if endpoint is None else os.environ.get("HF_TOKEN") or False
        self._waits_s, self._silence_s, self._told_of = waits_s, silence_s, told
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self.received = 0

    def listing(self, revision: str = "main") -> Listing:
        """What the repository holds at a revision (branch, tag or commit).

        Raises:
            RequestError: there is no such repository or revision, or it is not shown to whoever asks.
            FetchError: the endpoint cannot be reached, or does not answer as a hub does.
        """
        api = _library().HfApi(endpoint=self.endpoint, token=self._token, library_name="pyrosome")

        def ask() -> Any:
            return api.model_info(self.repo, revision=revision, files_metadata=True, timeout=self._silence_s)

        try:
            info = self._patiently(f"{self.repo} at {revision}", ask)
            files = [_listed(s) for s in info.siblings or ()]
            commit = str(info.sha)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FetchError(
                f"{self.endpoint} was asked what {self.repo} holds and does not answer as a hub does "
                f"({_brief(error)}); check the address in --mirror or HF_ENDPOINT"
            ) from None
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise FetchError(f"{self.endpoint} names no commit of {self.repo}; use another mirror")
        return Listing(self.repo, commit, {f.name: f for f in files})

    def read(self, listing: Listing, file: RemoteFile, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes `begin` to `end` of a file; all of a small file are checked against their hash.

        Raises:
            FetchError: they do not come, or are not those the repository lists.
        """
        last = file.num_bytes if end is None else min(end, file.num_bytes)

        def ask() -> bytes:
            return b"".join(self.stream(listing, file, begin, last))

        for is_last in (False, True):
            data = self._patiently(file.name, ask)
            digest = Digest(file)
            digest.feed(data)
            if (begin, last) != (0, file.num_bytes) or digest.is_right:
                return data
            if is_last:
                break
        raise wrong_bytes(self.endpoint, file)

    def stream(self, listing: Listing, file: RemoteFile, begin: int, end: int) -> Iterator[bytes]:
        """Bytes `begin` to `end` of a file, as they come; from an endpoint that ignores ranges too.

        Raises:
            Interrupted: the connection broke; what came before is sound as far as is known.
            FetchError: it is refused, or is another file.
        """
        if begin >= end:
            return
        url = _library().hf_hub_url(self.repo, file.name, revision=listing.commit, endpoint=self.endpoint)
        headers = _headers(self._token) | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with self._translated(file.name):
            client = _library().utils.get_session()
            with client.stream("GET", url, headers=headers, timeout=self._silence_s, follow_redirects=True) as answer:
                _library().utils.hf_raise_for_status(answer)
                skip = self._check_range(answer, file, begin)
                left = end - begin
                for chunk in answer.iter_bytes():  # as they come: what is lost with a connection is little
                    with self._lock:
                        self.received += len(chunk)
                    data, skip = chunk[skip:], max(0, skip - len(chunk))
                    if data:
                        yield data[:left]
                        left -= len(data)
                    if left <= 0:
                        return
        raise Interrupted(f"{file.name} of {self.repo} broke off {left:,} bytes before its end", _CHECK_NETWORK)

    def _patiently(self, what: str, ask: Callable[[], T]) -> T:
        patience = self.patience()
        while True:
            try:
                with self._translated(what):
                    return ask()
            except Interrupted as error:
                patience.wait(error)

    def patience(self) -> Patience:
        """For one thing to be asked for."""
        return Patience(self._waits_s, self.stop, self._told_of)

    def _check_range(self, answer: Any, file: RemoteFile, begin: int) -> int:
        """Bytes to pass over before `begin`: none, or all before it where the range was ignored."""
        if answer.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("content-range", ""))
            first, total = (int(found[1]), found[2]) if found else (-1, "")
            if first != begin or total not in ("*", str(file.num_bytes)):
                raise self._other_file(file, f"range {answer.headers.get('content-range', '')!r}")
            return 0
        length = answer.headers.get("content-length", "")
        if not answer.headers.get("content-encoding") and length.isdigit() and int(length) != file.num_bytes:
            raise self._other_file(file, f"{int(length):,} bytes of {answer.headers.get('content-type', 'no type')}")
        return begin

    def _other_file(self, file: RemoteFile, came: str) -> FetchError:
        return FetchError(
            f"{self.endpoint} gives {came} for {file.name} of {self.repo}, which is listed with {file.num_bytes:,} "
            f"bytes: another file, or a page about it; check the address, or use another mirror; {RESUME}"
        )

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The library's errors as this package's, or as Interrupted where asking again may help."""
        errors = _library().errors
        try:
            yield
        except errors.HfHubHTTPError as error:
            raise self._meaning(error, what) from None
        except errors.OfflineModeIsEnabled:
            raise RequestError(f"{what} was asked for and HF_HUB_OFFLINE is set; unset it, or use --offline") from None
        except _transport_error() as error:
            raise Interrupted(
                f"{self.endpoint} was asked for {what} and could not be reached, or was lost ({_brief(error)})",
                _CHECK_NETWORK,
            ) from None

    def _meaning(self, error: Any, what: str) -> Exception:
        errors, status = _library().errors, error.response.status_code
        asked = f"{what} was asked of {self.endpoint}"
        has_token = bool(_library().utils.get_token()) if self._token is None else bool(self._token)
        token = "the token in use does not open it" if has_token else "no token is set"
        if isinstance(error, errors.GatedRepoError):
            return RequestError(
                f"{self.repo} is gated ({token}): accept its terms on {self.endpoint}/{self.repo}, set HF_TOKEN to a "
                "token of that account, and run the same command again"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return RequestError(f"{asked}, and {self.repo} has no such revision; name a branch, tag or commit it has")
        if isinstance(error, errors.EntryNotFoundError):
            return FetchError(f"{asked}, which lists the file and does not have it; use another mirror; {RESUME}")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return RequestError(
                f"{asked}, which has no repository of that name, or not for everybody ({token}); check the name, or "
                "set HF_TOKEN to a token that may see it"
            )
        if status in (401, 403):
            return RequestError(
                f"{asked}, which answers {status}: {token}; set HF_TOKEN to one that may read {self.repo}, and run "
                "the same command again"
            )
        if status in _AGAIN:
            advice = "try again later, or use another mirror"
            return Interrupted(f"{asked}, which answers {status}", advice, _asked_wait(error.response.headers))
        return FetchError(f"{asked}, which answers {status}; try again later, or use another mirror; {RESUME}")


def check_repo(repo: str) -> str:
    """The name, if a repository can have it.

    Raises:
        RequestError: it cannot.
    """
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 96:
        raise RequestError(f"{repo!r} is no repository's name; give OWNER/NAME, as deepseek-ai/DeepSeek-V4-Flash")
    return repo


def wrong_bytes(endpoint: str, file: RemoteFile) -> FetchError:
    """The error for a file that came twice with another hash than is listed."""
    kind, listed = ("SHA-256", file.sha256) if file.sha256 else ("git hash", file.blob)
    return FetchError(
        f"{file.name} came twice from {endpoint} with other bytes than its {kind} {listed}; nothing of it is kept; use "
        "another mirror, or check this machine's memory and disk; the same command goes on with the rest"
    )


def _endpoint(asked: str | None) -> str:
    name, address = ("--mirror", asked) if asked is not None else ("HF_ENDPOINT", str(_library().constants.ENDPOINT))
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port is that number, no host is written so
        is_address = False
    if is_address and "@" in parts.netloc:  # it would stand in messages, records and logs
        raise RequestError(f"{name} has a user or password in it; give the address without, and a token as HF_TOKEN")
    if not is_address or parts.query or parts.fragment:
        raise RequestError(f"{name} is {address!r}; give the address of a hub or mirror, as https://HOST")
    return address.rstrip("/")


def _listed(sibling: Any) -> RemoteFile:
    name = str(sibling.rfilename)
    sha256 = str(sibling.lfs.sha256).lower() if sibling.lfs else None
    num_bytes = sibling.lfs.size if sibling.lfs else sibling.size
    if not is_safe(name):
        raise CheckpointError(f"the repository lists a file as {name!r}, which would lead elsewhere; do not use it")
    if not isinstance(num_bytes, int) or num_bytes < 0 or not (sha256 or sibling.blob_id):
        raise ValueError(f"no size or hash of {name}")
    return RemoteFile(name, num_bytes, sha256, None if sha256 else str(sibling.blob_id))


def is_safe(name: str) -> bool:
    """Whether a listed name is that of a file within the directory it is put into, on any system."""
    path = PurePosixPath(name)
    is_short = all(len(part.encode()) <= MAX_NAME_BYTES for part in path.parts) if name.isprintable() else False
    return is_short and not path.is_absolute() and ".." not in path.parts and str(path) == name and "\\" not in name


def _asked_wait(headers: Any) -> float:
    """Seconds that Retry-After, or the rest of a counting period, asks to wait; 0: none."""
    if (after := headers.get("retry-after", "")).isdigit():
        return float(after)
    found = re.search(r"r=0;.*?t=(\d+)", headers.get("ratelimit", ""))
    return float(found[1]) if found else 0.0


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _headers(token: str | bool | None) -> dict[str, str]:
    made: dict[str, str] = _library().utils.build_hf_headers(
        token=token, library_name="pyrosome", library_version=importlib.metadata.version("pyrosome")
    )
    return made


@functools.cache
def _library() -> ModuleType:
    """huggingface_hub, which reads its variables when it is imported: told first not to report on its use."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.utils

    return huggingface_hub


@functools.cache
def _transport_error() -> type[Exception]:
    """What its HTTP client raises for anything that happens on the way; the client is another one since version 2."""
    found: type[Exception] = next(c for c in _library().errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    return found
