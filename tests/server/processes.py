"""`pyrosome serve` as a process of its own, as users and init systems run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.server.scripted import until

LONG = 90.0  # seconds to wait for what takes five on a machine with nothing else to do


class Served:
    """A server's process.

    Attributes:
        url, port: where it listens, once it is ready.
        ready: its JSON line.
    """

    def __init__(self, *arguments: str, state: Path, model: str = "builtin:nano", cache_gib: float = 0.06) -> None:
        command = [
            sys.executable, "-m", "pyrosome", "serve", model, "--port", "0", "--json", "--state", str(state),
            "--cache-gib", str(cache_gib), *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "PYROSOME_LOG": "INFO", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready: dict[str, Any] = {}

    def wait_until_ready(self) -> Served:
        """Until requests are answered."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "".join(self.log)
        self.ready = json.loads(line)
        self.url = self.ready["url"]
        self.port = int(self.url.rpartition(":")[2])
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine(self) -> int:
        """The engine's process; 0: there is none."""
        return next(iter(children(self.pid)), 0)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=LONG, **options)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit status, when it has ended; nothing of it may be left."""
        engines = children(self.pid)
        status = self.process.wait(LONG)
        until(lambda: not any(map(is_alive, engines)))
        self._reader.join(5)
        return status

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)


@contextmanager
def served(*arguments: str, state: Path, ready: bool = True, **options: Any) -> Iterator[Served]:
    """A server's process; it is gone at the end, whatever happens."""
    made = Served(*arguments, state=state, **options)
    try:
        yield made.wait_until_ready() if ready else made
    finally:
        engines = children(made.pid)
        made.process.kill()
        made.process.wait()
        for pid in engines:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Processes that another started and that live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rss_mib(pid: int) -> float:
    """Memory a process has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
