"""Examples of docs/plan.md: each command's whole output stands below it.

python -m tests.cli.plan_examples        # writes them anew
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from pyrosome.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
_EXAMPLE = re.compile(r"^```console\n\$ pyrosome (plan [^\n]*)\n.*?^```$", re.MULTILINE | re.DOTALL)


def filled(text: str) -> str:
    """The page with what its commands print today."""
    return _EXAMPLE.sub(_shown, text)


def commands(text: str) -> list[str]:
    """The commands whose output is shown."""
    return [found[1] for found in _EXAMPLE.finditer(text)]


def _shown(example: re.Match[str]) -> str:
    done = CliRunner().invoke(app, shlex.split(example[1]))
    assert done.exit_code in (0, 1), done.output  # 1: it does not fit, which is an example too
    lines = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
    return f"```console\n$ pyrosome {example[1]}\n{lines}\n```"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
