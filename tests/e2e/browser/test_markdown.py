"""Answers as elements: what each kind becomes, and that text which grows ends as if it had come at once."""

import pytest
from playwright.sync_api import expect

from tests.e2e.browser.visit import visiting


@pytest.fixture(scope="module")
def page(browser):
    with visiting(browser) as v:
        yield v.page


RENDER = """async (text) => {
    const {rendered} = await import("/ui/markdown.js");
    const box = document.createElement("div");
    box.append(rendered(text));
    return box.innerHTML;
}"""
GROW = """async ([text, sizes]) => {
    const {Growing} = await import("/ui/markdown.js");
    const found = [];
    for (const size of sizes) {
        const box = document.createElement("div");
        const growing = new Growing(box);
        for (let end = size; end < text.length; end += size) growing.show(text.slice(0, end), false);
        growing.show(text, true);
        found.push(box.innerHTML);
    }
    return found;
}"""
LINK = 'target="_blank" rel="noopener noreferrer"'


@pytest.mark.parametrize(("text", "html"), [
    ("a *b* **c** ~~d~~ `e`", '<p>a <em>b</em> <strong>c</strong> <s>d</s> <code>e</code></p>'),
    ("# A\n\n##### B", '<h3>A</h3><h6>B</h6>'),
    ("a\nb  \nc", "<p>a\nb<br>c</p>"),
    ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
    ("- a\n\n- b", '<ul><li><p>a</p></li><li><p>b</p></li></ul>'),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("> a\n> > b", '<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>'),
    ("a\n\n---\n\nb", '<p>a</p><hr><p>b</p>'),
    ("<https://a.test/x>", f'<p><a href="https://a.test/x" {LINK} title="https://a.test/x">https://a.test/x</a></p>'),
    ("[a **b**](http://a.test)",
     f'<p><a href="http://a.test/" {LINK} title="http://a.test/">a <strong>b</strong></a></p>'),
    ("| a | b |\n|:-:|--|\n| 1 | 2 |",
     '<div tabindex="0" role="region" aria-label="Table" class="scroll"><table><thead><tr><th class="center">a</th>'
     '<th>b</th></tr></thead><tbody><tr><td class="center">1</td><td>2</td></tr></tbody></table></div>'),
    ("```py\nx = '<b>'\n```",
     '<figure class="code"><figcaption><span>py</span><button type="button" class="copy">Copy</button></figcaption>'
     '<pre tabindex="0" role="region" aria-label="Code, py"><code>x = \'&lt;b&gt;\'</code></pre></figure>'),
])  # fmt: skip
def test_each_kind_is_one_fixed_element(page, text, html):
    assert page.evaluate(RENDER, text).replace(' dir="auto"', "") == html


def test_text_runs_the_way_its_own_letters_do(page):
    found = page.evaluate(
        """async (text) => {
            const {rendered} = await import("/ui/markdown.js");
            const box = document.createElement("div");
            document.body.append(box);
            box.append(rendered(text));
            const ways = [...box.querySelectorAll("p, li, h3, td")].map((e) => getComputedStyle(e).direction);
            box.remove();
            return ways;
        }""",
        "hello\n\nשלום\n\n# שלום\n\n- שלום\n- hello\n\n| a | b |\n|---|---|\n| שלום | hello |",
    )
    assert found == ["ltr", "rtl", "rtl", "rtl", "ltr", "rtl", "ltr"]


GROWING = [
    "Title\n=====\n\ntext that\nis broken\n#\n#hashtag\n\n- a\n- b\n\n  more of b\n\n      code in b\n"
    "* c\n1. d\n2) e\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\nafter | the | table\n- | -\n",
    "before\n```js\nlet a = 1;\n\n\n# no title\n```\nafter\n~~~\nopen fence\n\nstill",
    "> quote\nlazy\n\n> another\n\n    indented\n\n    code\n\n***\n---\nText\n---\n",
    "see [this] and [that][1] and <http://x.test>\n\n[this]: http://a.test 'title'\n\n[1]:\nhttp://b.test\n"
    "'two\nlines'\n\nend [1]",
    "dos\r\nline ends\r\n\r\n- a\r\n- b\r\n\r\nmac\r\rends",
    "\n\n  leading\n\n\n\ntrailing\n\n\n",
    "1. one\n\n   ```\n   code\n   ```\n\n2. two\n   - nested\n\nend *not\n\nclosed* **open",
]


@pytest.mark.parametrize("text", GROWING)
def test_text_that_grows_ends_as_if_it_had_come_at_once(page, text):
    whole = page.evaluate(RENDER, text)
    sizes = [1, 2, 3, 5, 7, 11, 50]
    for size, grown in zip(sizes, page.evaluate(GROW, [text, sizes]), strict=True):
        assert grown == whole, f"in pieces of {size}"


def test_a_link_leads_to_its_whole_target_while_the_answer_grows(page):
    text = "one\n\ntwo\n\n[a]: http://a.test/whole\n\nfirst [a]\n\nmore"
    found = page.evaluate(
        """async (text) => {
            const {Growing} = await import("/ui/markdown.js");
            return [...Array(30).keys()].map((n) => {
                const box = document.createElement("div");
                const growing = new Growing(box);
                for (let end = n; end < text.length; end += n + 1) growing.show(text.slice(0, end), false);
                growing.show(text, false);
                return box.querySelector("a").href;
            });
        }""",
        text,
    )
    assert found == ["http://a.test/whole"] * 30


def test_an_answer_of_very_many_pieces_is_shown(page):
    """More elements in one block than a function of the browser takes arguments."""
    found = page.evaluate(
        """async () => {
            const {rendered} = await import("/ui/markdown.js");
            const box = document.createElement("div");
            box.append(rendered("`a` ".repeat(150000)));
            return box.querySelectorAll("code").length;
        }"""
    )
    assert found == 150_000


def test_what_is_complete_is_not_made_again(page):
    """In an answer of ten thousand tokens only the last block is made anew, however long the rest has become."""
    found = page.evaluate(
        """async () => {
            const {Growing} = await import("/ui/markdown.js");
            const box = document.createElement("div");
            document.body.append(box);
            const growing = new Growing(box);
            const block = (n) => `Paragraph ${n} with **bold** words and \\`code\\`.\\n\\n- item\\n- item\\n\\n`;
            let text = "";
            let removed = 0;
            let most = 0;
            const watch = new MutationObserver(() => {});
            watch.observe(box, {childList: true});
            let first = null;
            for (let n = 0; n < 1000; n += 1) {
                for (const piece of block(n).match(/[^]{1,9}/g)) {
                    text += piece;
                    growing.show(text, false);
                    const now = watch.takeRecords().reduce((sum, r) => sum + r.removedNodes.length, 0);
                    removed += now;
                    most = Math.max(most, now);
                }
                first ??= box.firstChild;
            }
            growing.show(text, true);
            box.remove();
            return {characters: text.length, most, isSame: first === box.firstChild, blocks: box.childElementCount};
        }"""
    )
    assert found["characters"] > 40_000  # some ten thousand tokens
    assert found["isSame"]
    assert found["most"] <= 3
    assert found["blocks"] == 2000


def test_code_is_copied_as_it_was_written(visit):
    with visit("</think>```py\nif a < b:\n\tprint('<b>')\n```") as v:
        v.context.grant_permissions(["clipboard-read", "clipboard-write"])
        v.ask("code?")
        v.page.get_by_role("button", name="Copy", exact=True).click()
        expect(v.page.get_by_role("button", name="Copied")).to_be_visible()
        assert v.page.evaluate("navigator.clipboard.readText()") == "if a < b:\n\tprint('<b>')\n"
        v.page.evaluate("document.querySelector('#announcer').textContent = ''")
        v.button("Copy this answer").click()
        expect(v.page.locator("#announcer")).to_have_text("Copied")
        assert v.page.evaluate("navigator.clipboard.readText()") == "```py\nif a < b:\n\tprint('<b>')\n```"
