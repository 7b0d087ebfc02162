"""Pictures of the administration's page for the documentation: `python -m tests.e2e.browser.shots_keys docs/img`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect

from pyrosome.server.caller import ACCOUNT, GENERATE, SCOPES, SESSIONS
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import Limits
from pyrosome.server.keys.store import Store
from tests.e2e.browser.visit import chromium
from tests.server.keys.serving import BODY, TALK, Guarded, guarded

WIDE: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 780}, "color_scheme": "dark", "is_mobile": True,
                         "has_touch": True, "device_scale_factor": 2}  # fmt: skip


def main(folder: Path) -> None:
    """Make the pictures."""
    price = Price(280_000_000, 28_000_000, 420_000_000)
    with (
        tempfile.TemporaryDirectory() as state,
        chromium() as browser,
        guarded(Store(f"sqlite:///{state}/keys.db"), price=price) as server,
    ):
        root = _furnish(server)
        _picture(browser, server, root, WIDE, folder / "keys-admin.png", whole=True)
        _picture(browser, server, root, PHONE, folder / "keys-phone.png", whole=False)


def _furnish(server: Guarded) -> str:
    acme = server.account("ACME", limits=Limits(60, 100_000, 8, 50_000_000))
    harbour = server.account("Harbour office")
    _, root = server.key(acme, SCOPES, name="root")
    _, summaries = server.key(acme, [GENERATE, SESSIONS], name="summaries", limits=Limits(20))
    _, tides = server.key(harbour, [GENERATE, ACCOUNT], name="tides", expires=1_900_000_000)
    for text, count in ((root, 2), (summaries, 5), (tides, 3)):
        for _ in range(count):
            server.client(text).post(TALK, json=BODY)
    invite = {"name": "friends", "uses": 5, "expires": "30d", "limits": {"budget_micro": 5_000_000}}
    server.client(root).post("/admin/invites", json=invite)
    return root


def _picture(browser: Browser, server: Guarded, key: str, context: dict[str, Any], to: Path, *, whole: bool) -> None:
    made = browser.new_context(**context)
    page = made.new_page()
    page.goto(f"{server.url}/admin")
    page.fill("#door-key", key)
    page.click("#door-form button")
    page.wait_for_selector("#inside:not([hidden])")
    page.select_option("#by", "key")
    page.click("#usage-form button >> nth=0")
    expect(page.locator("#usage tbody tr")).to_have_count(3)
    page.screenshot(path=to, full_page=whole)
    made.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
