"""A PostgreSQL of one's own, from Debian's package: made in a folder, reached by a socket there, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.needs import lacking


def programs() -> Path:
    """Where `initdb` and `postgres` are; without them the test is left out, but not in `.ci/run`."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4]))
    on_path = shutil.which("initdb")
    if on_path:
        found.append(Path(on_path))
    if not found:
        lacking("PostgreSQL", "apt-get install postgresql")
    return found[-1].parent


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A running server; the URL of its database."""
    bin_path, as_user = programs(), _unprivileged()
    with tempfile.TemporaryDirectory(prefix="pyrosome-pg-") as name:
        folder = Path(name)
        if as_user:
            shutil.chown(folder, as_user["user"], as_user["group"])
        data = folder / "data"
        _run(
            [bin_path / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"], as_user, folder
        )
        options = f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=60"
        ctl = [bin_path / "pg_ctl", "-D", data, "-w", "-t", "60"]
        _run([*ctl, "-l", folder / "log", "-o", options, "start"], as_user, folder)
        try:
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            _run([*ctl, "-m", "immediate", "stop"], as_user, folder)


def _unprivileged() -> dict[str, Any]:
    """As whom to run: `initdb` refuses root."""
    if os.geteuid():
        return {}
    user = next(pwd.getpwnam(n) for n in ("postgres", "nobody") if n in {u.pw_name for u in pwd.getpwall()})
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _run(command: list[Any], as_user: dict[str, Any], cwd: Path) -> None:
    done = subprocess.run(
        [str(c) for c in command], **as_user, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command[0]}: {done.stdout}"
