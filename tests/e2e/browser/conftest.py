"""One Chromium for each file of tests, a new profile for each test.

They fail where there is no Chromium; PYROSOME_WITHOUT_BROWSER=1 leaves them out.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("PYROSOME_WITHOUT_BROWSER") == "1":
    collect_ignore_glob = ["test_*.py"]


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
