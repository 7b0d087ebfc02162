"""A hub on loopback: what huggingface_hub asks of one, and every way in which hubs, mirrors and lines fail."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
OTHER = "facade" + "1" * 34
PAGE = b"<!doctype html><html><title>Sign in</title><body>Please sign in to this network.</body></html>"


@dataclasses.dataclass
class Fault:
    """Something that goes wrong with requests whose path matches `where`, the first `times` times."""

    where: str
    kind: str  # status, cut, changed (and cut), corrupt, html, no_range, length, range, slow
    times: int = 10**9
    status: int = 500
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    at: int = 0  # bytes of the answer before a cut; the byte of the file that is wrong
    pause_s: float = 0.0  # before each piece of `at` bytes


@dataclasses.dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0  # bytes of body


class LoopHub:
    """One repository's files, from a directory.

    Args:
        sha256: hashes that are listed instead of true ones; of sparse files of gigabytes these take too long.
    """

    def __init__(self, files: Path, repo: str = "tests/tiny", sha256: Callable[[Path], str] | None = None) -> None:
        self.files, self.repo = files, repo
        self.heads = {"main": COMMIT, COMMIT: COMMIT}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.redirects_to: str | None = None  # "localhost" is another origin than 127.0.0.1
        self.token: str | None = None  # without which nothing is shown, but for what a redirect leads to
        self.names: list[str] | None = None  # listed instead of what is there
        self.lock = threading.Lock()
        self._sha256 = sha256 or (lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
        self._known: dict[str, dict] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, path):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, where: str = "") -> int:
        """Bytes of bodies sent for paths that match."""
        return sum(a.sent for a in self.asked if re.search(where, a.path))

    def count(self, where: str) -> int:
        return sum(bool(re.search(where, a.path)) for a in self.asked)

    def listed(self) -> list[dict]:
        names = self.names or sorted(str(p.relative_to(self.files)) for p in self.files.rglob("*") if p.is_file())
        return [self._sibling(n) for n in names]

    def _sibling(self, name: str) -> dict:
        path = self.files / name
        if name not in self._known:
            size = path.stat().st_size if path.exists() else 1
            entry: dict = {"rfilename": name, "size": size}
            if name.endswith(".safetensors"):
                lfs = {"size": size, "sha256": self._sha256(path), "pointerSize": 134}
                entry |= {"blobId": "b" * 40, "lfs": lfs}
            else:
                data = path.read_bytes() if path.exists() else b"x"
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._known[name] = entry
        return self._known[name]


def _handler(hub: LoopHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            self.asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            with hub.lock:
                hub.asked.append(self.asked)
            path = unquote(urlsplit(self.path).path)
            fault = hub.fault(path)
            if fault and fault.kind == "status":
                return self._send(fault.status, b'{"error": "no"}', "application/json", fault.headers)
            if fault and fault.kind == "html":
                return self._send(200, PAGE, "text/html; charset=utf-8")
            is_open = hub.token is None or path.startswith("/store/")
            if not is_open and self.asked.headers.get("authorization") != f"Bearer {hub.token}":
                return self._send(401, b"{}", "application/json", {"X-Error-Code": "RepoNotFound"})
            if found := re.fullmatch(rf"/api/models/{hub.repo}/revision/(.+)", path):
                return self._info(found[1])
            if found := re.fullmatch(rf"/{hub.repo}/resolve/([0-9a-f]+)/(.+)", path):
                return self._file(found[2], fault, stored=found[2].endswith(".safetensors"))
            if found := re.fullmatch(r"/store/(.+)", path):
                return self._file(found[1], fault, stored=False)
            return self._send(404, b"{}", "application/json", {"X-Error-Code": "RepoNotFound"})

        def _info(self, revision: str) -> None:
            if revision not in hub.heads:
                return self._send(404, b"{}", "application/json", {"X-Error-Code": "RevisionNotFound"})
            assert "blobs" in parse_qs(urlsplit(self.path).query)
            found = {"id": hub.repo, "modelId": hub.repo, "sha": hub.heads[revision], "siblings": hub.listed()}
            return self._send(200, json.dumps(found).encode(), "application/json")

        def _file(self, name: str, fault: Fault | None, *, stored: bool) -> None:
            path = hub.files / name
            if not path.is_file():
                return self._send(404, b"", "text/plain", {"X-Error-Code": "EntryNotFound"})
            # What a hub with Xet storage says beside each large file.
            extra = {"X-Repo-Commit": COMMIT, "X-Xet-Hash": "e" * 64, "ETag": f'"{name}"'} if stored else {}
            if hub.redirects_to and stored:
                place = f"http://{hub.redirects_to}:{hub.port}/store/{name}"
                return self._send(302, b"", "text/plain", extra | {"Location": place})
            return self._ranged(path, fault, extra)

        def _ranged(self, path: Path, fault: Fault | None, extra: dict[str, str]) -> None:
            total, kind = path.stat().st_size, fault.kind if fault else ""
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.asked.headers.get("range", ""))
            begin, end, status = 0, total, 200
            if found and kind != "no_range":
                begin, end, status = int(found[1]), min(total, int(found[2] or total - 1) + 1), 206
                said = total + 1 if kind == "range" else total
                extra = extra | {"Content-Range": f"bytes {begin}-{end - 1}/{said}"}
            with path.open("rb") as f:
                f.seek(begin)
                body = f.read(end - begin) if end - begin < 1 << 26 else b""
            if kind == "corrupt" and begin <= fault.at < end:
                body = bytearray(body)
                body[fault.at - begin] ^= 1
            if kind == "changed":  # another file under that name, for as long as the line holds
                body = bytes(b ^ 1 for b in body)
                extra = extra | {"ETag": '"another"'}
            if kind == "length":
                body = body[:-1]
            self._head(status, len(body), "application/octet-stream", extra)
            if self.command == "GET":
                self._body(bytes(body), fault)

        def _send(self, status: int, body: bytes, kind: str, extra: dict[str, str] | None = None) -> None:
            self._head(status, len(body), kind, extra or {})
            if self.command == "GET":
                self._body(body, None)

        def _head(self, status: int, length: int, kind: str, extra: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(length), **extra}.items():
                self.send_header(key, value)
            self.end_headers()

        def _body(self, body: bytes, fault: Fault | None) -> None:
            is_cut = fault is not None and fault.kind in ("cut", "changed")
            if is_cut:
                body = body[: fault.at]
            step = fault.at if fault and fault.kind == "slow" else len(body) or 1
            try:
                for at in range(0, len(body), step):
                    if fault and fault.kind == "slow":
                        time.sleep(fault.pause_s)
                    self.wfile.write(body[at : at + step])
                    self.asked.sent += len(body[at : at + step])
            except OSError:  # whoever asked has gone
                self.close_connection = True
            if is_cut:
                self.close_connection = True

    return Handler


@contextmanager
def loop_hub(files: Path, **kwargs) -> Iterator[LoopHub]:
    hub = LoopHub(files, **kwargs)
    try:
        yield hub
    finally:
        hub.close()


def by_path(hub: LoopHub) -> collections.Counter[str]:
    """How often each path was asked for."""
    return collections.Counter(urlsplit(a.path).path for a in hub.asked)
