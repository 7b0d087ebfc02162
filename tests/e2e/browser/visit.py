"""A browser on the page of a server over a scripted engine, and all that went wrong there."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.needs import lacking
from tests.server.scripted import TOKENIZER, Script, ScriptedEngine, saying, scripted

CHROMIUM = "/usr/bin/chromium"
ELSEWHERE = "elsewhere.test"  # this machine, by a name that the browser trusts no more than any other without TLS
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
]  # fmt: skip
WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => {
    violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`);
});
"""
PATIENCE_MS = 20_000


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless, with an empty profile."""
    if not Path(CHROMIUM).exists():
        lacking(f"the browser {CHROMIUM}", "apt-get install chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A browser's tab on the page.

    Attributes:
        page: the tab.
        engine: says what it is told to.
        allowed: patterns of errors in the console that a test provokes.
    """

    def __init__(self, context: BrowserContext, url: str, engine: ScriptedEngine, service: Any, meet: bool) -> None:
        self.context, self.url, self.engine, self.service, self._meet = context, url, engine, service, meet
        self.errors: list[str] = []
        self.requests: list[Any] = []
        self.allowed: list[str] = []
        self.pages: list[Page] = []
        self.page = self.open()

    def open(self) -> Page:
        """One more tab."""
        page = self.context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.errors.append(f"error: {error}"))
        page.on("console", lambda m: m.type == "error" and self.errors.append(f"console: {m.text}"))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request))
        page.goto(self.url)
        if self._meet:
            expect(page.locator("#model")).to_have_text("builtin:nano")
        self.pages.append(page)
        return page

    # What a user does

    def say(self, text: str) -> None:
        """Write a message and send it."""
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")

    def ask(self, text: str) -> Locator:
        """The same; the answer, once it is complete."""
        before = self.page.locator(".message.assistant").count()
        self.say(text)
        return self.answered(before)

    def answered(self, index: int = -1) -> Locator:
        """An answer that is shown, once it is complete."""
        found = self.page.locator(".message.assistant").nth(index)
        expect(found).to_have_attribute("aria-busy", "false")
        return found

    def button(self, name: str, within: Locator | None = None) -> Locator:
        """A button by the beginning of its name."""
        return (within or self.page).get_by_role("button", name=re.compile(f"^{re.escape(name)}"))

    def messages(self) -> list[tuple[str, str]]:
        """Who said what, of what is shown."""
        found = self.page.locator(".message")
        return [
            ("user", one.locator(".text").inner_text())
            if "user" in (one.get_attribute("class") or "").split()
            else ("assistant", one.locator(".answer").inner_text())
            for one in found.all()
        ]

    def shows(self, *expected: tuple[str, str]) -> None:
        """Assert that these messages are shown, at once or soon."""
        end = time.monotonic() + PATIENCE_MS / 1000
        while self.messages() != list(expected) and time.monotonic() < end:
            self.page.wait_for_timeout(20)
        assert self.messages() == list(expected)

    def prompt(self, index: int = -1) -> str:
        """The prompt of a request, as the engine was given it."""
        return TOKENIZER.decode(self.engine.requests[index].ids)

    # What a test asserts at its end

    def wrongs(self) -> list[str]:
        """Scripts that failed, dialogs, requests to anywhere else, violations of the policy."""
        found = [e for e in self.errors if not any(re.search(p, e) for p in self.allowed)]
        here = urlsplit(self.url).netloc
        found += [f"request: {r.url}" for r in self.requests if urlsplit(r.url).netloc not in (here, "")]
        for page in self.pages:
            if not page.is_closed():
                found += [f"violation: {v}" for v in page.evaluate("window.violations")]
        return found


@contextlib.contextmanager
def visiting(
    browser: Browser,
    script: Script | str = "hello",
    *,
    prepare: Callable[[Any], object] = lambda service: None,
    through: Callable[[str], contextlib.AbstractContextManager[str]] = contextlib.nullcontext,
    context: dict[str, Any] | None = None,
    meet: bool = True,
    **server: Any,
) -> Iterator[Visit]:
    """A tab on the page of a server that says that.

    Args:
        script: what is said, or a function of the request.
        prepare: changes the service before the page is opened.
        through: what stands between browser and server: given the server's URL, its own.
        context: of the browser: `color_scheme`, `viewport`, ...
        meet: wait until the page knows the model.
        server: as `scripted` takes it.
    """
    script = saying(script) if isinstance(script, str) else script
    with scripted(script, **server) as (client, engine, service), through(str(client.base_url)) as url:
        prepare(service)
        try:
            with visiting_at(browser, url, engine, service, context=context, meet=meet) as visit:
                yield visit
        finally:
            engine.hold.clear()


@contextlib.contextmanager
def visiting_at(
    browser: Browser, url: str, engine: Any, service: Any, *, context: dict[str, Any] | None = None, meet: bool = True
) -> Iterator[Visit]:
    """A tab on the page of a server that runs."""
    made = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **(context or {})})
    try:
        made.add_init_script(WATCH)
        visit = Visit(made, url, engine, service, meet)
        yield visit
        assert visit.wrongs() == []
    finally:
        made.close()


class Cable:
    """A TCP connection to a server that can be cut."""

    def __init__(self, port: int) -> None:
        self._port, self._open, self._lock = port, [], threading.Lock()  # type: ignore[var-annotated]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Nothing passes any more, and nobody is let in."""
        with self._lock:
            for one in (self._listener, *self._open):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                with self._lock:
                    self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
