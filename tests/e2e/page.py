"""What docs/clients.md shows, to be run as it stands."""

from __future__ import annotations

import re

from tests.e2e.clients import ROOT

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8000"


def blocks(title: str, language: str) -> list[str]:
    """The blocks of one language under a heading."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"docs/clients.md has no heading {title!r}"
    found = re.findall(rf"^```{language}\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert found, f"docs/clients.md has no {language} under {title!r}"
    return found


def versions() -> dict[str, str]:
    """The versions that it names, by the client."""
    table = PAGE.partition("<!-- VERSIONS -->")[2].partition("<!-- /VERSIONS -->")[0]
    return dict(re.findall(r"^\| `(\S+)`[^|]*\| ([\d.]+) \|$", table.replace("` (Node)", "-node`"), re.MULTILINE))
