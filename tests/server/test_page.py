"""The page's files: all that a browser is given, under a policy that lets nothing else in."""

import hashlib
import re
import socket
import tomllib

import pytest

from pyrosome.server import page
from tests.server.scripted import saying, scripted

MOST_BYTES = 300_000  # all static files together, whatever the connection
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(scope="module")
def client():
    with scripted(saying("hello")) as (client, _, _):
        yield client


def test_a_browser_gets_the_page(client):
    reply = client.get("/", headers=HTML)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.text.startswith("<!doctype html>")


def test_whoever_asks_for_no_html_is_told_where_to_go(client):
    for accept in ("*/*", "application/json"):
        reply = client.get("/", headers={"Accept": accept})
        assert reply.json()["model"] == "builtin:nano"
        assert client.get(reply.json()["health"]).status_code == 200
        assert client.get(reply.json()["openai_base_url"] + "/models").status_code == 200
        assert reply.headers["vary"] == "Accept"


@pytest.mark.parametrize("path", ["/", *(f"/ui/{name}" for name in page.FILES)])
def test_every_file_is_sent_with_the_strict_headers(client, path):
    reply = client.get(path, headers=HTML)
    assert reply.status_code == 200
    assert reply.content == (page.FOLDER / (path.removeprefix("/ui/").lstrip("/") or page.PAGE)).read_bytes()
    policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
        "img-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cross-origin-opener-policy"] == "same-origin"
    kind = reply.headers["content-type"].split(";")[0]
    suffix = path.rpartition(".")[2]
    assert kind == {"js": "text/javascript", "mjs": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(
        suffix, "text/html"
    )


def test_head_is_get_without_the_body(client):
    for path in ("/", "/ui/main.js"):
        got, head = client.get(path, headers=HTML), client.head(path, headers=HTML)
        assert head.status_code == 200
        assert head.content == b""
        own = {"date": "", "x-request-id": ""}  # of each request
        assert {**head.headers, **own} == {**got.headers, **own}


def test_a_file_that_is_known_is_not_sent_again(client):
    first = client.get("/ui/main.js")
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = client.get("/ui/main.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert "content-security-policy" in again.headers
    assert client.get("/ui/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/ui", "/ui/", "/ui/index.html", "/ui/nothing.js", "/ui/../page.py", "/ui/%2e%2e/page.py", "/ui/..%2fpage.py",
        "/ui/..%5cpage.py", "/ui/vendor", "/ui/vendor/", "/ui/vendor/README.md",
        "/ui/vendor/../../app.py", "/ui/main.js%00", "/ui/MAIN.JS", "/etc/passwd",
    ],
)  # fmt: skip
def test_nothing_but_the_listed_files_is_sent(client, path):
    port = client.base_url.port
    reply = raw_get(port, path)
    assert reply.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), reply[:200]
    assert b"import " not in reply


def test_the_list_is_what_is_in_the_folder():
    found = {str(f.relative_to(page.FOLDER)) for f in page.FOLDER.rglob("*") if f.is_file()}
    kept_for_reading = {"vendor/README.md", "vendor/LICENSES.txt"}
    others = {name for name in found if name.startswith("admin.")}  # of the page of keys, which serves its own
    assert found - others == {page.PAGE, *page.FILES, *kept_for_reading}


def test_all_files_together_are_small():
    sizes = {f.name: f.stat().st_size for f in page.FOLDER.rglob("*") if f.is_file() and f.suffix != ".md"}
    assert sum(sizes.values()) < MOST_BYTES, sizes


def test_the_page_holds_no_script_and_no_style_of_its_own():
    text = (page.FOLDER / page.PAGE).read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text, re.IGNORECASE)
    assert re.findall(r"<script[^>]*>[^<]*", text) == ['<script type="module" src="ui/main.js">']


def test_whatever_the_page_names_is_there():
    """Every address in the page, every import and every drawing leads somewhere, and within the list."""
    text = (page.FOLDER / page.PAGE).read_text()
    named = set(re.findall(r'(?:src|href)="ui/([^"]+)"', text))
    for name in page.FILES:
        if name.endswith(".js"):
            source = (page.FOLDER / name).read_text()
            named |= set(re.findall(r'from "\./([^"]+)"', source))
    assert named == set(page.FILES)
    assert not re.findall(r'(?:src|href)="(?!ui/|#)[^"]*"', text)
    drawn = set(re.findall(r'<symbol id="i-(\w+)"', text))
    used = set(re.findall(r'href="#i-(\w+)"', text))
    for name in ("message.js", "sidebar.js", "composer.js", "dom.js"):
        source = (page.FOLDER / name).read_text()
        used |= set(re.findall(r'icon(?:Button)?\("(\w+)"', source))
        used |= set(re.findall(r'\["\w+", "[^"]+", .*?, "(\w+)"\]', source)) | set(
            re.findall(r'step\(-?1, "[^"]+", "(\w+)"\)', source)
        )
    assert used == drawn


@pytest.mark.parametrize("name", [n for n in page.FILES if n.endswith(".js")])
def test_no_script_turns_text_into_markup_or_code(name):
    source = (page.FOLDER / name).read_text()
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|DOMParser|createContextualFragment|srcdoc"
    assert not re.search(rf"{sinks}|\beval\b|new Function|setTimeout\(\s*[\"'`]|\bimport\(", source)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", source), "an address outside this server"


def test_what_others_wrote_is_unchanged_and_its_licences_are_with_it():
    vendor = page.FOLDER / "vendor"
    readme, licences = (vendor / "README.md").read_text(), (vendor / "LICENSES.txt").read_text()
    sums = dict(re.findall(r"^\| `([\w.-]+)` \|.*`([0-9a-f]{64})` \|$", readme, re.MULTILINE))
    assert sums.keys() == {name.removeprefix("vendor/") for name in page.FILES if name.startswith("vendor/")}
    for name, expected in sums.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == expected
    for name, version in re.findall(r"\b([a-z][\w.-]+) (\d+\.\d+\.\d+) \(", readme):
        assert f"== {name}-{version}" in licences
    assert "== markdown-it-15.0.3" in licences


def test_the_pictures_of_the_page_are_there_and_small():
    root = page.FOLDER.parents[3]
    shown = re.findall(r"\]\((img/page-[\w-]+\.png)\)", (root / "docs/page.md").read_text())
    assert len(shown) == 3
    for name in shown:
        picture = (root / "docs" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 200_000


def test_the_files_are_part_of_the_package():
    project = tomllib.loads((page.FOLDER.parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pyrosome"]
    package = page.FOLDER.parents[1]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {f for f in page.FOLDER.rglob("*") if f.is_file()} <= packed


def raw_get(port: int, path: str) -> bytes:
    """The reply to a path exactly as it is written, which a client library would tidy."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))
