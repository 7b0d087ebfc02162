"""What the page keeps: conversations over a reload, in a file, and away from whoever should not have them."""

import json

from playwright.sync_api import expect

from tests.e2e.browser.test_chat import SLOW, WORDS
from tests.server.scripted import saying, until

SAID = "thoughts</think>answer"


def exported(v, press):
    with v.page.expect_download() as download:
        press()
    return download.value, json.loads(download.value.path().read_text())


def bring(v, name, text):
    v.page.locator("#import-input").set_input_files(
        {"name": name, "mimeType": "application/json", "buffer": text.encode()}
    )


def test_a_reload_keeps_conversations_with_their_branches_and_the_one_that_is_open(visit):
    with visit(SAID) as v:
        v.ask("first")
        v.engine.script = saying("</think>second")
        v.button("Regenerate").click()
        v.answered()
        v.button("Earlier version").click()
        v.button("New conversation").click()
        v.ask("other")
        v.page.locator("#conversations a").filter(has_text="first").click()
        expect(v.page.locator(".answer")).to_have_text("answer")
        v.page.reload()
        expect(v.page.locator("#conversations [aria-current]")).to_have_text("first")
        expect(v.page.locator(".answer")).to_have_text("answer")
        expect(v.page.locator(".steps")).to_have_text("1 / 2")
        v.page.locator(".thoughts summary").click()
        expect(v.page.locator(".thought-text")).to_have_text("thoughts")
        expect(v.page.locator("#conversations a")).to_have_count(2)
        v.engine.script = saying(SAID)
        v.ask("more")
        assert "answer" in v.prompt()


def test_a_reload_in_mid_answer_keeps_what_came(visit):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word20")  # the page saves once a second
        v.page.reload()
        expect(v.page.locator(".answer")).to_contain_text("word1")
        until(lambda: v.engine.aborted and not v.engine.has_work)
        expect(v.button("Send")).to_be_visible()


def test_a_title_can_be_changed(visit):
    with visit(SAID) as v:
        v.ask("a very long question " * 9)
        title = v.page.get_by_label("Title of this conversation")
        assert title.input_value().endswith("…")
        title.fill("Whales")
        title.press("Tab")
        expect(v.page.locator("#conversations a")).to_have_text("Whales")
        v.page.reload()
        expect(title).to_have_value("Whales")


def test_deleting_asks_first_and_leaves_nothing(visit):
    with visit(SAID) as v:
        v.ask("first")
        v.button("New conversation").click()
        v.ask("second")
        delete = v.page.get_by_role("button", name="Delete first")
        delete.focus()
        delete.click()
        v.page.keyboard.press("Escape")
        expect(v.page.locator("#conversations a")).to_have_count(2)
        delete.focus()
        delete.click()
        v.page.locator("#confirm").get_by_role("button", name="Delete").click()
        expect(v.page.locator("#conversations a")).to_have_text(["second"])
        v.page.reload()
        expect(v.page.locator("#conversations a")).to_have_text(["second"])
        assert kept_in_browser(v) == [["second", "thoughts"]]


def test_what_is_deleted_does_not_come_back_with_the_end_of_its_answer(visit):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        v.page.get_by_role("button", name="Delete talk").focus()
        v.page.keyboard.press("Enter")
        v.page.locator("#confirm").get_by_role("button", name="Delete").click()
        until(lambda: v.engine.aborted and not v.engine.has_work)
        expect(v.page.locator("#conversations a")).to_have_count(0)
        v.engine.script, v.engine.step_s = saying(SAID), 0
        v.ask("other")
        assert kept_in_browser(v) == [["other", "thoughts"]]


def test_the_focus_stays_in_the_list_while_an_answer_comes(visit):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        delete = v.page.get_by_role("button", name="Delete talk")
        delete.focus()
        expect(v.page.locator(".answer")).to_contain_text("word18")  # it was saved meanwhile
        expect(delete).to_be_focused()
        v.engine.step_s = 0
        v.answered()
        expect(delete).to_be_focused()


def kept_in_browser(v):
    """For each conversation in the browser's database, its title and the thoughts of its answers."""
    return v.page.evaluate(
        """() => new Promise((resolve, reject) => {
            const asked = indexedDB.open("pyrosome");
            asked.onerror = () => reject(asked.error);
            asked.onsuccess = () => {
                const transaction = asked.result.transaction(["conversations", "messages"]);
                const records = transaction.objectStore("conversations").getAll();
                const messages = transaction.objectStore("messages").getAll();
                transaction.oncomplete = () => {
                    asked.result.close();
                    const found = records.result.map((r) => [r.title]);
                    messages.result.forEach((m) => m.role === "assistant" && found[0].push(m.reasoning));
                    resolve(found);
                };
            };
        })"""
    )


def test_what_one_browser_exports_another_imports(visit):
    with visit(SAID) as v:
        v.ask("first")
        v.button("Regenerate").click()
        v.answered()
        v.button("New conversation").click()
        v.ask("second")
        download, all_of_them = exported(v, lambda: v.page.locator("#export-all").click())
        assert download.suggested_filename == "pyrosome-conversations.json"
        v.page.get_by_role("button", name="Export second").focus()
        download, one = exported(v, lambda: v.page.get_by_role("button", name="Export second").click())
        assert download.suggested_filename == "second.json"
        assert [c["title"] for c in all_of_them["conversations"]] == ["second", "first"]
        assert [c["title"] for c in one["conversations"]] == ["second"]
    with visit(SAID) as v:
        bring(v, "all.json", json.dumps(all_of_them))
        v.shows(("user", "second"), ("assistant", "answer"))
        v.page.locator("#conversations a").filter(has_text="first").click()
        v.shows(("user", "first"), ("assistant", "answer"))
        expect(v.page.locator(".steps")).to_have_text("2 / 2")
        v.ask("more")
        bring(v, "all.json", json.dumps(all_of_them))  # once more: new ids, so nothing is overwritten
        expect(v.page.locator("#conversations a")).to_have_count(4)
        v.page.reload()
        v.page.locator("#conversations a").filter(has_text="first").last.click()
        expect(v.page.locator(".message")).to_have_count(4)


def whole(**changes):
    message = {"id": "a", "parent": None, "role": "user", "content": "hi", "created": 1}
    found = {"id": "c", "title": "t", "leaf": "a", "settings": {}, "messages": [{**message, **changes}]}
    return {"format": "pyrosome conversations", "version": 1, "conversations": [found]}


NOT_OURS = [
    ("{", "no file of conversations"),
    ("[]", "has exported"),
    ('{"format": "other", "version": 1}', "has exported"),
    (json.dumps({**whole(), "version": 2}), "version 2"),
    (json.dumps({**whole(), "conversations": {}}), "damaged"),
    (json.dumps({**whole(), "conversations": [None]}), "damaged"),
    (json.dumps(whole(role="system")), "role"),
    (json.dumps(whole(parent="b")), "missing"),
    (json.dumps(whole(parent="a")), "follows itself"),
]  # fmt: skip


def test_a_file_that_is_none_of_ours_is_refused_in_words(visit):
    with visit(SAID) as v:
        for text, words in NOT_OURS:
            bring(v, "file.json", text)
            expect(v.page.locator(".notice").last).to_contain_text("file.json was not imported")
            expect(v.page.locator(".notice").last).to_contain_text(words)
            v.button("Close this notice").last.click()
        expect(v.page.locator("#conversations a")).to_have_count(0)


def test_what_is_imported_is_no_more_than_text(visit):
    """Fields of wrong types become empty ones, and unknown fields are left out."""
    hostile = whole(
        content={"toString": "x"}, files=[{"name": "<img src=x onerror=alert(1)>", "text": 5, "bytes": "many"}, None],
        __proto__={"isBad": True}, problem={"text": "x"}, facts={"mode": {}, "seed": []},
    )  # fmt: skip
    hostile["conversations"][0]["title"] = "<script>alert(1)</script>"
    hostile["conversations"][0]["settings"] = {"mode": "evil", "system": 5, "tools": "{}", "temperature": "hot"}
    with visit(SAID) as v:
        bring(v, "file.json", json.dumps(hostile))
        expect(v.page.locator("#conversations a")).to_have_text(["<script>alert(1)</script>"])
        expect(v.page.locator(".file .name").first).to_have_text("<img src=x onerror=alert(1)>")
        with v.page.expect_request("**/v1/chat/completions") as request:
            v.ask("hello")
        body = request.value.post_data_json
        assert body.keys() == {"model", "messages", "stream", "thinking", "reasoning_effort"}
        assert {m["role"] for m in body["messages"]} == {"user"}


def test_what_is_said_in_one_tab_is_seen_in_the_other(visit):
    with visit(SAID) as v:
        other = v.open()
        v.ask("hello")
        expect(other.locator("#conversations a")).to_have_text(["hello"])
        other.locator("#conversations a").click()
        expect(other.locator(".answer")).to_have_text("answer")
        v.ask("more")
        expect(other.locator(".answer")).to_have_count(2)


def test_where_the_browser_keeps_nothing_the_page_says_so(visit):
    with visit(SAID) as v:
        v.context.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
        v.page.reload()
        expect(v.page.locator("#notices")).to_contain_text("keeps no data")
        v.ask("hello")
        v.shows(("user", "hello"), ("assistant", "answer"))
