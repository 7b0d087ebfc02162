"""Servers as processes: the built-in model's, and one that plays a part for an agent to work with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
READY_S = 120


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    state: Path
    log: list[str]  # lines that it said on standard error


@contextlib.contextmanager
def serving(what: str, *flags: str, state: Path | None = None) -> Iterator[Running]:
    """A server on a free port until the block is left, and then its end, which must be a clean one."""
    with contextlib.ExitStack() as stack:
        folder = state or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.server_process", what, "--state", str(folder), *flags],
            env=environ, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        reader.start()
        watch = threading.Timer(READY_S, process.kill)
        watch.start()
        try:
            first = process.stdout.readline()
            watch.cancel()
            assert first, f"no server within {READY_S} s:\n{''.join(lines[-40:])}"
            yield Running(json.loads(first)["url"], folder, lines)
        finally:
            watch.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                process.stdout.close()
            reader.join(10)
        assert status == 0, f"the server ended with status {status}:\n{''.join(lines[-40:])}"
