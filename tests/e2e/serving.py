"""Servers as processes."""

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
NANO = ("pyrosome", "serve", "builtin:nano", "--port", "0", "--json", "--cache-gib", "0.25")


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        log: lines that it said on standard error.
    """

    url: str
    log: list[str]


@contextlib.contextmanager
def serving(module: str, *arguments: str, state: Path | None = None) -> Iterator[Running]:
    """A module's server until the block is left, and then its end, which must be a clean one.

    It says where it is in a line of JSON.  Its folder for what it keeps is put behind the arguments.
    """
    with contextlib.ExitStack() as stack:
        folder = state or stack.enter_context(tempfile.TemporaryDirectory())
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYROSOME_LOG": "INFO"}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, str(folder)],
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
            yield Running(json.loads(first)["url"], lines)
        finally:
            watch.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                process.stdout.close()
            reader.join(10)
            process.stderr.close()
        assert status == 0, f"the server ended with status {status}:\n{''.join(lines[-40:])}"
