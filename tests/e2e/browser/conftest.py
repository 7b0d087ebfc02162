"""One Chromium for each file of tests, a new profile for each test.

Where there is no Chromium they are left out, but not in `.ci/run`; see `tests.needs`.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def browser():
    from tests.e2e.browser.visit import chromium

    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser):
    """Makes visits: a context manager, as `visiting` without the browser."""
    from tests.e2e.browser.visit import visiting

    return lambda *arguments, **keywords: visiting(browser, *arguments, **keywords)
