"""Pictures of the page for the documentation: `python -m tests.e2e.browser.shots docs/img`.

The answers are scripted, so that the pictures show what the page can show and not what a small model says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect

from tests.e2e.browser.visit import Visit, chromium, visiting
from tests.server.scripted import saying

WIDE: dict[str, Any] = {"viewport": {"width": 1180, "height": 860}, "reduced_motion": "reduce"}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True,
                         "has_touch": True, "reduced_motion": "reduce"}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (
        ("tide_table", {"harbour": {"type": "string"}, "days": {"type": "integer"}}),
        ("convert", {"value": {"type": "number"}, "unit": {"type": "string"}}),
    )
]
CALL = (
    "They want to know when to cross. That depends on the tide, which I cannot know by myself: the table has it. "
    "Two days should be enough, since they leave tomorrow.</think>\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="tide_table">\n'
    '<｜DSML｜parameter name="harbour" string="true">Husum</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
RESULT = '{"low": ["05:12", "17:38"], "high": ["11:20", "23:49"]}'
TIDE = (
    "Low water is at 05:12, so start by 04:10 and be back by 06:15.</think>"
    "Leave at **04:10** tomorrow. Low water is at 05:12, and the way over the flats takes about fifty minutes."
)
COMPARE = (
    "A table first, then the loop. The list keeps order, the set does not; lookup is what they care about.</think>"
    "A list looks through its items one after another, a set goes straight to the place where an item would be:\n\n"
    "| | list | set |\n|---|--:|--:|\n| look up, 1,000 items | 6.1 µs | 0.03 µs |\n"
    "| look up, 1,000,000 items | 6,400 µs | 0.05 µs |\n| keeps the order | yes | no |\n\n"
    "So if you ask *often* whether something is there, make a set once and ask that:\n\n"
    "```python\nknown = set(names)  # once\n\nfor line in lines:\n    if line.strip() in known:\n        print(line)\n"
    "```\n\n"
    "Mind that the items must be hashable: a `list` of lists will not do."
)


def main(folder: Path) -> None:
    """Make all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for scheme in ("light", "dark"):
            _wide(browser, scheme, folder / f"page-{scheme}.png")
        _phone(browser, folder / "page-phone.png")


def _wide(browser: Browser, scheme: str, path: Path) -> None:
    with visiting(browser, CALL, context={**WIDE, "color_scheme": scheme}, step_s=0.004) as v:
        _earlier(v)
        v.button("Settings").click()
        v.page.fill("#tools", json.dumps(TOOLS))
        v.page.locator("#settings").get_by_role("button", name="Keep").click()
        v.engine.script = saying(CALL)
        answer = v.ask("We want to walk over to the island from Husum tomorrow. When should we leave?")
        answer.locator(".thoughts summary").click()
        answer.locator("textarea").fill(RESULT)
        v.engine.script = saying(TIDE)
        v.button("Give the results").click()
        v.answered(1)
        _settle(v)
        v.page.screenshot(path=path)


def _phone(browser: Browser, path: Path) -> None:
    with visiting(browser, COMPARE, context={**PHONE, "color_scheme": "dark"}, step_s=0.004) as v:
        v.ask("Is a set faster than a list?")
        v.page.evaluate("document.querySelector('#log').scrollTop = 0")
        _settle(v)
        v.page.screenshot(path=path)


def _earlier(v: Visit) -> None:
    """A few conversations in the list."""
    v.engine.script, v.engine.step_s = saying(COMPARE), 0
    for question in ("Is a set faster than a list?", "A name for a research ship", "Read this log with me"):
        v.ask(question)
        v.button("New conversation").click()
    v.engine.step_s = 0.004


def _settle(v: Visit) -> None:
    expect(v.page.locator("#meter-text")).not_to_have_text("0 / 1,048,576")
    v.page.mouse.move(0, 0)
    v.page.wait_for_timeout(300)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/img"))
