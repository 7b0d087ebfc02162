"""Where the clients are, what they run in, and what they may reach."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
NODE = Path(__file__).parent / "node"
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
LIMIT_S = 240


class Outside:
    """A proxy that lets nobody through.

    Attributes:
        wanted: the first line of whatever came.
    """

    def __init__(self) -> None:
        self.wanted: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._note, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Outside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _note(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self.wanted.append(connection.recv(4096).decode("latin-1").partition("\r\n")[0])
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                except OSError:
                    self.wanted.append("a connection that said nothing")


def environment(home: Path, outside: Outside, **more: str) -> dict[str, str]:
    """A user's who has set nothing, on a machine from which nothing else is reached."""
    return {
        "PATH": f"{PYTHON.parent}:{NODE / 'node_modules' / '.bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "HTTP_PROXY": outside.url, "HTTPS_PROXY": outside.url, "ALL_PROXY": outside.url,
        "http_proxy": outside.url, "https_proxy": outside.url, "all_proxy": outside.url,
        "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        **more,
    }  # fmt: skip


def node() -> Path:
    """Node itself."""
    found = shutil.which("node")
    assert found, "Node is missing; install it (apt-get install npm)"
    return Path(found)


def ran(
    command: Sequence[str | Path], environ: dict[str, str], cwd: Path, limit_s: float = LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run a client to its end, which is no later than `limit_s`; nothing is typed at it."""
    program = Path(command[0])
    assert program.exists(), f"{program} is missing; `make clients` installs it"
    process = subprocess.Popen(
        command, env=environ, cwd=cwd, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"{program.name} did not end in {limit_s:g} s\n{out[-4000:]}\n{err[-4000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def names_of(script: str) -> list[str]:
    """The cases that a script has, found without the libraries that it imports."""
    tree = ast.parse((SCRIPTS / script).read_text(encoding="utf-8"))
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "case" for d in node.decorator_list)
    ]


def cases_of(script: str, arguments: Sequence[str], home: Path, outside: Outside) -> dict[str, str]:
    """Run a script; for each of its cases "" or what went wrong."""
    environ = environment(home, outside, LITELLM_LOCAL_MODEL_COST_MAP="True", HF_HUB_OFFLINE="1")
    done = ran([PYTHON, SCRIPTS / script, *arguments], environ, home)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))
