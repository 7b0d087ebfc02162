"""The page by keyboard, on a phone, with a screen reader, in the dark, without motion."""

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.e2e.browser.test_chat import CALL, SLOW, WEATHER, WORDS, set_settings
from tests.e2e.browser.test_trouble import FAILED_LOAD, BusyDoor, with_door
from tests.e2e.browser.visit import chromium
from tests.server.scripted import saying

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
FULL = (
    "thinking about it</think># Title\n\nText with `code`, a [link](http://a.test) and **more**.\n\n"
    "```python\nprint('a rather long line of code that does not fit on a telephone', 1, 2, 3)\n```\n\n"
    "| one | two | three | four | five | six | seven |\n|---|---|--:|---|---|---|---|\n"
    "| 1111111 | 2222222 | 3333333 | 4444444 | 5555555 | 6666666 | 7777777 |\n\n> quote\n\n1. first\n2. second\n"
)


def audit(page):
    """What axe finds wrong: rules of WCAG 2.2 to AA and of good practice."""
    found = Axe().run(page).response
    assert found["passes"], "axe looked at nothing"
    return [
        f"{rule['id']} ({rule['impact']}): {[n['html'][:160] for n in rule['nodes']]}" for rule in found["violations"]
    ]


@pytest.mark.parametrize(("all_of_them", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_chromium_leaves_nothing_out_where_all_is_to_be_tested(monkeypatch, all_of_them, outcome):
    monkeypatch.setattr("tests.e2e.browser.visit.CHROMIUM", "/nowhere/chromium")
    monkeypatch.setenv("PYROSOME_CLIENTS", all_of_them)
    with pytest.raises(outcome, match="apt-get install chromium"), chromium():
        pass


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_axe_finds_nothing_wrong(visit, scheme, width):
    context = {"color_scheme": scheme, "reduced_motion": "reduce", "bypass_csp": True,
               "viewport": {"width": width, "height": 800}}  # fmt: skip
    door = BusyDoor()
    with visit(FULL, context=context, prepare=with_door(door)) as v:
        v.allowed = [FAILED_LOAD]
        assert audit(v.page) == []
        door.refusal, refusal = None, door.refusal
        v.page.locator("#file-input").set_input_files(
            {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"a few notes"}
        )
        v.page.locator("#file-input").set_input_files({"name": "no.bin", "mimeType": "", "buffer": b"\x00"})
        expect(v.page.locator(".notice")).to_be_visible()
        expect(v.page.locator(".chip")).to_be_visible()
        assert audit(v.page) == []
        v.ask("everything?")
        v.page.locator(".thoughts summary").click()
        v.button("Regenerate").click()
        v.answered()
        set_settings(v, tools=json.dumps(WEATHER))
        v.engine.script = saying(CALL)
        v.ask("weather?")
        door.refusal = refusal
        v.ask("and more?")
        expect(v.page.locator(".problem").last).to_be_visible()
        assert audit(v.page) == []
        v.button("Edit this message").first.click()
        assert audit(v.page) == []
        v.page.keyboard.press("Escape")
        v.button("Settings").click()
        v.page.fill("#tools", "{")
        assert audit(v.page) == []
        v.page.keyboard.press("Escape")
        if width < 861:
            v.page.get_by_role("button", name="Conversations", exact=True).click()
            expect(v.page.locator("#new")).to_be_focused()
            assert audit(v.page) == []


def test_everything_can_be_done_by_keyboard(visit):
    """A whole conversation without a pointer; wherever the focus is, it is seen."""
    with visit("thoughts</think>answer ```x``` [link](http://a.test)") as v:
        press = v.page.keyboard.press
        expect(v.page.locator("#draft")).to_be_focused()
        v.page.locator("#skip").focus()
        expect(v.page.locator("#skip")).to_be_in_viewport()
        press("Enter")
        expect(v.page.locator("#draft")).to_be_focused()
        v.page.keyboard.type("hello")
        press("Shift+Enter")
        v.page.keyboard.type("you")
        press("Enter")
        v.answered()
        expect(v.page.locator(".message.user .text")).to_have_text("hello\nyou")
        reached = walk(v)
        assert {
            "New conversation", "Export hello you", "Delete hello you", "Import", "Export all",
            "Settings of this conversation",
            "Copy this message", "Edit this message", "Copy this answer", "Regenerate: another answer",
            "Edit this answer", "Fork: a new conversation up to here", "Add text files", "Send",
        } <= reached  # fmt: skip
        assert {"hello you", "link", "Message", "Title of this conversation", "Think High"} <= reached
        assert any(name.startswith("Thought") for name in reached)

        focus(v, "Thought")
        press("Enter")
        expect(v.page.locator(".thought-text")).to_be_visible()
        focus(v, "Regenerate")
        press("Enter")
        v.answered()
        focus(v, "Earlier version")
        press("Space")
        expect(v.page.locator(".steps")).to_have_text("1 / 2")
        expect(v.page.locator(".message.assistant")).to_contain_text("answer")
        focus(v, "Think High")
        press("ArrowRight")
        expect(v.page.get_by_label("Think Max")).to_be_checked()
        focus(v, "Delete hello")
        press("Enter")
        expect(v.page.locator("#confirm")).to_be_visible()
        press("Tab")
        press("Enter")
        expect(v.page.locator("#conversations a")).to_have_count(0)
        expect(v.page.locator("#draft")).to_be_focused()


FOCUSED = """() => {
    const at = document.activeElement;
    if (!at || at === document.body) return null;
    const name = at.getAttribute("aria-label") ?? at.labels?.[0]?.textContent ?? at.textContent;
    const shown = (e) => {
        const style = getComputedStyle(e);
        return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
    };
    const seen = shown(at) || (at.nextElementSibling && shown(at.nextElementSibling)) || at.id === "draft";
    const box = at.getBoundingClientRect();
    return {name: name.trim(), seen: Boolean(seen), onScreen: box.width > 0 && box.height > 0};
}"""


def walk(v, most=80):
    """The names of everything that Tab reaches, each of which must be seen to have the focus."""
    names = set()
    v.page.locator("#skip").focus()
    for _ in range(most):
        v.page.keyboard.press("Tab")
        at = v.page.evaluate(FOCUSED)
        if at is None or at["name"] == "To the message field":
            return names
        assert at["seen"], f"the focus on {at['name']!r} is not seen"
        assert at["onScreen"], at["name"]
        names.add(at["name"])
    return names


def focus(v, name, most=80):
    v.page.locator("#skip").focus()
    for _ in range(most):
        v.page.keyboard.press("Tab")
        at = v.page.evaluate(FOCUSED)
        if at and at["name"].startswith(name):
            return
    raise AssertionError(f"{name!r} is not reached by Tab")


def test_a_phone_has_the_whole_page_within_its_width(visit):
    with visit(FULL, context=PHONE) as v:
        v.ask("a word " + "x" * 300)
        v.page.locator(".thoughts summary").click()
        width = v.page.evaluate("[document.documentElement.scrollWidth, document.querySelector('#log').scrollWidth]")
        assert max(width) <= 360
        assert v.page.evaluate(SMALL) == []
        expect(v.page.locator("#side")).to_be_hidden()
        v.page.get_by_role("button", name="Conversations", exact=True).click()
        expect(v.page.locator("#side")).to_be_in_viewport()
        v.page.keyboard.press("Escape")
        expect(v.page.locator("#side")).to_be_hidden()
        expect(v.page.locator("#menu")).to_be_focused()
        v.page.get_by_role("button", name="Conversations", exact=True).click()
        v.page.locator("#conversations a").click()
        expect(v.page.locator("#side")).to_be_hidden()


# Controls that a finger misses: less than 24 px either way, as WCAG 2.2 has it; links within text are no controls.
SMALL = """() => [...document.querySelectorAll("button, summary, textarea, .title, .modes label")]
    .filter((e) => e.offsetParent !== null && !e.closest("dialog"))
    .map((e) => [e.getAttribute("aria-label") ?? e.textContent, e.getBoundingClientRect()])
    .filter(([, box]) => box.width < 24 || box.height < 24).map(([name]) => name)"""

WATCH_WORDS = """() => {
    window.said = [];
    new MutationObserver(() => {
        const text = document.querySelector("#announcer").textContent;
        if (text) said.push(text);
    }).observe(document.querySelector("#announcer"), {childList: true, characterData: true, subtree: true});
}"""


def test_a_screen_reader_is_told_of_an_answer_in_a_few_words(visit):
    with visit("some thoughts here</think>" + WORDS, **SLOW) as v:
        v.page.evaluate(WATCH_WORDS)
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word9")
        v.engine.step_s = 0
        v.answered()
        expect(v.page.locator("#announcer")).to_contain_text("End of the answer.")
        said = v.page.evaluate("said")
        assert said[:2] == ["Thinking", "Answering"]
        assert said[2].startswith("word0 word1")
        assert len(said) == 3
        live = ":is([aria-live], [role=status], [role=alert], [role=log])"
        inside = v.page.locator(f"#log{live}, #log {live}")
        expect(inside).to_have_count(0)  # what streams is not read out piece by piece


def test_the_page_has_its_landmarks_and_its_headings_in_order(visit):
    with visit(FULL) as v:
        v.ask("hello")
        for role, name in (("navigation", "Conversations"), ("main", ""), ("banner", ""), ("form", "Your message")):
            expect(v.page.get_by_role(role, name=re.compile(name)).first).to_be_visible()
        levels = v.page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].filter((h) => !h.closest('dialog, [hidden]'))"
            ".map((h) => Number(h.tagName[1]))"
        )
        assert levels == [1, 2, 2, 3]
        expect(v.page.get_by_role("article")).to_have_count(2)


def test_nothing_moves_where_motion_is_not_wanted(visit):
    moving = "() => document.getAnimations().length"
    for motion, expected in (("reduce", 0), ("no-preference", 1)):
        with visit("x", context={"reduced_motion": motion}, prompt_steps=10**6, step_s=0.01) as v:
            v.say("hello")
            expect(v.page.locator(".waiting")).to_be_visible()
            assert min(1, v.page.evaluate(moving)) == expected


def test_the_page_is_dark_where_that_is_wanted(visit):
    brightness = {}
    for scheme in ("light", "dark"):
        with visit("x", context={"color_scheme": scheme}) as v:
            rgb = v.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            brightness[scheme] = sum(rgb) / 3
    assert brightness["light"] > 200
    assert brightness["dark"] < 50


def test_a_reader_who_has_scrolled_up_is_left_in_peace(visit):
    with visit("</think>" + "\n\n".join(f"line {n}" for n in range(300)), step_s=0.004) as v:
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("line 60")
        scrolled = "document.querySelector('#log').scrollTop"
        assert v.page.evaluate(scrolled) > 0  # the end is followed
        v.page.evaluate("document.querySelector('#log').scrollTop = 0")
        expect(v.button("To the end")).to_be_visible()
        v.engine.step_s = 0
        v.answered()
        assert v.page.evaluate(scrolled) == 0
        v.button("To the end").click()
        expect(v.page.get_by_text("line 299")).to_be_in_viewport()
        expect(v.button("To the end")).to_be_hidden()
