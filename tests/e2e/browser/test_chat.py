"""Talking on the page: what a user does, what the server is asked for, and what is shown of the answer."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.server.scripted import TOKENIZER, saying, until

THOUGHTFUL = "let me see</think>it is **51**"
CALL = (
    "</think>\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]  # fmt: skip
SLOW = {"step_s": 0.02}
WORDS = " ".join(f"word{n}" for n in range(200))


def set_settings(visit, **values):
    visit.button("Settings").click()
    for name, value in values.items():
        visit.page.fill(f"#{name}", str(value))
    visit.page.locator("#settings").get_by_role("button", name="Keep").click()


def test_an_answer_is_shown_as_it_comes(visit):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("talk")
        answer = v.page.locator(".message.assistant")
        expect(answer.locator(".answer")).to_contain_text("word2")
        v.engine.hold.set()
        assert "word199" not in answer.inner_text()
        expect(answer).to_have_attribute("aria-busy", "true")
        expect(v.button("Stop")).to_be_visible()
        expect(v.button("Send")).to_be_hidden()
        v.engine.step_s = 0
        v.engine.hold.clear()
        expect(v.answered().locator(".answer")).to_have_text(WORDS)
        expect(v.button("Send")).to_be_visible()
        expect(v.page).to_have_title("talk – pyrosome")


def test_thoughts_are_open_while_they_come_and_closed_after(visit):
    with visit("one two three " * 20 + "</think>done", **SLOW) as v:
        v.say("think")
        thoughts = v.page.locator(".thoughts")
        expect(thoughts).to_have_attribute("open", "")
        expect(thoughts.locator("summary")).to_contain_text("Thinking…")
        expect(thoughts.locator(".thought-text")).to_contain_text("one two three one")
        v.engine.step_s = 0
        v.answered()
        expect(thoughts).not_to_have_attribute("open", "")
        tokens = len(TOKENIZER.encode("one two three " * 20))
        expect(thoughts.locator("summary")).to_have_text(re.compile(rf"^Thought for [\d.]+ s · {tokens} tokens$"))
        thoughts.locator("summary").click()
        expect(thoughts.locator(".thought-text")).to_have_text("one two three " * 20)


def test_thoughts_that_the_reader_has_opened_or_closed_stay_so(visit):
    for clicks, is_open in ((1, False), (2, True)):
        with visit("one two three " * 20 + "</think>done", **SLOW) as v:
            v.say("think")
            thoughts = v.page.locator(".thoughts")
            expect(thoughts.locator(".thought-text")).to_contain_text("three")
            for _ in range(clicks):
                thoughts.locator("summary").click()
            expect(thoughts.locator("summary")).to_contain_text("Thinking… 1")  # a second later, painted many times
            assert thoughts.evaluate("(details) => details.open") == is_open
            v.engine.step_s = 0
            v.answered()
            assert thoughts.evaluate("(details) => details.open") == is_open


@pytest.mark.parametrize(("name", "mode", "cue"), [
    ("Non-Think", "off", "</think>"), ("Think High", "high", "<think>"), ("Think Max", "max", "<think>"),
])  # fmt: skip
def test_each_mode_is_what_the_server_is_asked_for(visit, name, mode, cue):
    with visit("x</think>y") as v:
        v.page.get_by_label(name).check(force=True)
        with v.page.expect_response("**/v1/chat/completions") as reply:
            answer = v.ask("hello")
        assert reply.value.headers["x-pyrosome-mode"] == mode
        assert v.prompt().endswith(cue)
        expect(answer.locator(".facts")).to_contain_text(name)
        v.button("New conversation").click()
        expect(v.page.get_by_label(name)).to_be_checked()  # the next one begins as the last one was


def test_settings_reach_the_engine(visit):
    with visit(THOUGHTFUL) as v:
        set_settings(v, system="Be a whale.", temperature=0.25, maxTokens=7, seed=99)
        answer = v.ask("hello")
        params = v.engine.requests[-1].params
        assert (params.temperature, params.max_tokens, params.seed) == (0.25, 7, 99)
        assert "Be a whale." in v.prompt()
        expect(answer.locator(".facts")).to_contain_text("seed 99")
        expect(answer.locator(".facts")).to_contain_text("cut at the limit of tokens")


def test_without_settings_nothing_is_sent_but_the_mode(visit):
    with visit(THOUGHTFUL) as v:
        with v.page.expect_request("**/v1/chat/completions") as request:
            v.ask("hello")
        assert request.value.post_data_json == {
            "model": "builtin:nano", "messages": [{"role": "user", "content": "hello"}], "stream": True,
            "thinking": {"type": "enabled"}, "reasoning_effort": "high",
        }  # fmt: skip


@pytest.mark.parametrize("by", ["button", "escape"])
def test_a_stopped_answer_keeps_what_was_said_and_ends_the_work(visit, by):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        if by == "button":
            v.button("Stop").click()
        else:
            v.page.keyboard.press("Escape")
        answer = v.answered()
        until(lambda: v.engine.aborted and not v.engine.has_work)
        expect(answer.locator(".facts")).to_contain_text("stopped by you")
        kept = answer.locator(".answer").inner_text()
        assert kept.startswith("word0 word1")
        assert "word199" not in kept
        assert f"{len(TOKENIZER.encode(kept))} tokens" in answer.locator(".facts").inner_text()


def test_an_answer_that_was_stopped_can_be_continued(visit):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        v.button("Stop").click()
        kept = v.answered().locator(".answer").inner_text()
        v.engine.script = saying(" and the rest")
        v.button("Continue").click()
        expect(v.page.locator(".answer")).to_have_text(kept + " and the rest")
        assert v.prompt().endswith(kept)
        assert v.page.locator(".message").count() == 2


def test_thoughts_that_were_stopped_can_be_continued(visit):
    with visit("one two three " * 50 + "</think>done", **SLOW) as v:
        v.say("think")
        expect(v.page.locator(".thought-text")).to_contain_text("three")
        v.page.keyboard.press("Escape")
        v.answered()
        kept = v.page.locator(".thought-text").text_content()
        v.engine.script = saying("and so on</think>done")
        v.button("Continue").click()
        expect(v.page.locator(".answer")).to_have_text("done")
        assert v.prompt().endswith("<think>" + kept)
        v.page.locator(".thoughts summary").click()
        assert v.page.locator(".thought-text").text_content() == kept + "and so on"


def test_another_answer_is_a_version_beside_the_first(visit):
    with visit("</think>first") as v:
        v.ask("hello")
        v.engine.script = saying("</think>second")
        v.button("Regenerate").click()
        expect(v.answered().locator(".answer")).to_have_text("second")
        expect(v.page.locator(".steps")).to_have_text("2 / 2")
        v.button("Earlier version").click()
        v.shows(("user", "hello"), ("assistant", "first"))
        expect(v.button("Earlier version")).to_be_disabled()
        v.button("Later version").click()
        v.shows(("user", "hello"), ("assistant", "second"))
        assert v.engine.requests[0].ids == v.engine.requests[1].ids


def test_an_edited_message_begins_a_branch_and_the_old_one_stays(visit):
    with visit("</think>first") as v:
        v.ask("hello")
        v.ask("and more")
        v.engine.script = saying("</think>second")
        v.button("Edit this message").first.click()
        v.page.get_by_label("Send", exact=True).and_(v.page.locator("textarea")).fill("good bye")
        v.page.locator(".editing").get_by_role("button", name="Send").click()
        expect(v.answered().locator(".answer")).to_have_text("second")
        v.shows(("user", "good bye"), ("assistant", "second"))
        assert "hello" not in v.prompt()
        assert "good bye" in v.prompt()
        v.button("Earlier version").click()
        v.shows(("user", "hello"), ("assistant", "first"), ("user", "and more"), ("assistant", "first"))


def test_an_edited_answer_is_what_the_model_is_given_next(visit):
    with visit("thoughts</think>first") as v:
        v.ask("hello")
        v.button("Edit this answer").click()
        v.page.locator("textarea.edit").fill("something else")
        v.page.keyboard.press("Control+Enter")
        v.shows(("user", "hello"), ("assistant", "something else"))
        expect(v.page.locator(".facts")).to_contain_text("edited")
        v.ask("more")
        assert "something else" in v.prompt()
        assert "first" not in v.prompt()


def test_escape_leaves_an_edit_without_changing_anything(visit):
    with visit("</think>first") as v:
        v.ask("hello")
        v.button("Edit this message").click()
        v.page.locator("textarea.edit").fill("other")
        v.page.keyboard.press("Escape")
        v.shows(("user", "hello"), ("assistant", "first"))
        expect(v.button("Edit this message")).to_be_focused()
        assert len(v.engine.requests) == 1


def test_a_fork_is_a_conversation_of_its_own_up_to_there(visit):
    with visit(lambda r: saying(f"</think>answer {len(v.engine.requests)}")(r)) as v:
        for text in ("one", "two", "three"):
            v.ask(text)
        v.button("Fork", v.page.locator(".message").nth(3)).click()
        expect(v.page.locator(".message")).to_have_count(4)
        v.ask("other")
        assert [t for _, t in v.messages()] == ["one", "answer 1", "two", "answer 2", "other", "answer 4"]
        assert "three" not in v.prompt()
        expect(v.page.locator(".steps")).to_have_count(0)  # what was said after it is no branch of the new one
        links = v.page.locator("#conversations a")
        expect(links).to_have_text(["one", "one"])
        links.nth(1).click()
        expect(v.page.locator(".message")).to_have_count(6)
        assert [t for _, t in v.messages()] == ["one", "answer 1", "two", "answer 2", "three", "answer 3"]


def test_a_tool_call_is_shown_and_its_result_goes_to_the_model(visit):
    with visit(CALL) as v:
        set_settings(v, tools=json.dumps(WEATHER))
        answer = v.ask("weather?")
        call = answer.locator(".call")
        expect(call.locator(".call-name code")).to_have_text("weather")
        expect(call.get_by_label("Arguments of weather")).to_have_text('{\n  "city": "Oslo",\n  "days": 3\n}')
        assert v.page.locator(".answer").inner_text() == ""
        v.engine.script = saying("</think>It rains.")
        answer.get_by_label("Result of weather").and_(answer.locator("textarea")).fill("rain, 4 °C")
        answer.get_by_role("button", name="Give the results").click()
        expect(v.answered(1).locator(".answer")).to_have_text("It rains.")
        assert "<tool_result>rain, 4 °C</tool_result>" in v.prompt()
        expect(call.locator("pre").nth(1)).to_have_text("rain, 4 °C")
        expect(answer.get_by_role("button", name="Give the results")).to_have_count(0)


def test_a_call_that_got_no_result_does_not_end_the_conversation(visit):
    with visit(CALL) as v:
        set_settings(v, tools=json.dumps(WEATHER))
        v.ask("weather?")
        v.engine.script = saying("</think>Very well.")
        expect(v.ask("never mind").locator(".answer")).to_have_text("Very well.")
        assert "gave no result" in v.prompt()


def test_tools_that_are_no_list_are_not_kept(visit):
    with visit(THOUGHTFUL) as v:
        for text in ("{", '{"a": 1}', '[{"name": "x"}]'):
            v.button("Settings").click()
            v.page.fill("#tools", text)
            expect(v.page.locator("#tools-problem")).not_to_be_empty()
            v.page.locator("#settings").get_by_role("button", name="Keep").click()
            expect(v.page.locator("#settings")).to_be_visible()
            v.page.keyboard.press("Escape")
        v.ask("hello")
        assert "## Tools" not in v.prompt()


def test_tokens_of_the_answer_the_cache_and_the_context_are_told(visit):
    with visit(THOUGHTFUL, step_s=0.01) as v:
        answer = v.ask("hello")
        usage = len(v.engine.requests[-1].ids)
        facts = answer.locator(".facts").inner_text()
        thoughts = len(TOKENIZER.encode("let me see"))
        tokens = thoughts + 1 + len(TOKENIZER.encode("it is **51**"))
        said = rf"\b{tokens} tokens, {thoughts} of them thoughts · [\d.]+ tokens/s · first after [\d.]+ m?s"
        assert re.search(said, facts), facts
        assert f"3 of {usage} prompt tokens from the cache" in facts
        counted = v.service.chat.render({"messages": [
            {"role": "user", "content": "hello"}, {"role": "assistant", "content": "it is **51**"}]})  # fmt: skip
        expect(v.page.locator("#meter-text")).to_have_text(f"{len(counted.ids)} / 1,048,576")
        v.page.fill("#draft", "some more words here")
        draft = len(TOKENIZER.encode("some more words here"))
        expect(v.page.locator("#meter-text")).to_have_text(f"{len(counted.ids) + draft} / 1,048,576")
        expect(v.page.get_by_role("meter", name="Context")).to_have_attribute(
            "aria-valuetext", f"{len(counted.ids) + draft} of 1,048,576 tokens of the context"
        )


def test_a_long_prompt_tells_how_far_it_is(visit):
    from pyrosome.options import ServerOptions

    options = ServerOptions(keep_alive_s=0.05)
    with visit("</think>done", options=options, prompt_steps=100, step_s=0.03) as v:
        v.say("long " * 50)
        expect(v.page.locator(".waiting")).to_have_text(re.compile(r"^Reading the prompt: \d+ of \d+ tokens$"))
        v.engine.step_s = 0
        v.answered()
        expect(v.page.locator(".waiting")).to_be_hidden()


def test_two_conversations_are_answered_at_once(visit):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("first")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        v.button("New conversation").click()
        v.say("second")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        expect(v.page.locator("#conversations .is-running")).to_have_count(2)
        v.engine.step_s = 0
        expect(v.answered().locator(".answer")).to_have_text(WORDS)
        v.page.locator("#conversations a").filter(has_text="first").click()
        expect(v.answered().locator(".answer")).to_have_text(WORDS)
        expect(v.page.locator("#conversations .is-running")).to_have_count(0)


def test_the_built_in_model_itself_answers_on_the_page(browser):
    from pyrosome.engine.loaded import open_engine
    from pyrosome.engine.worker import EngineThread
    from pyrosome.server.service import Service
    from tests.e2e.browser.visit import visiting_at
    from tests.server.scripted import MODEL, running

    cache = 64 << 20
    service = Service(MODEL, None, make_driver=lambda: EngineThread(lambda: open_engine(MODEL, cache_bytes=cache)))
    with running(service) as url, visiting_at(browser, url, None, service) as v:
        set_settings(v, temperature=0, maxTokens=24)
        first = said_in(v.ask("? falcon"))
        expect(v.page.locator(".facts")).to_contain_text("Think High")
        v.button("Regenerate").click()
        expect(v.page.locator(".steps")).to_have_text("2 / 2")
        assert said_in(v.answered()) == first  # at temperature 0
        assert first[1]


def said_in(answer):
    return answer.locator(".thought-text").text_content(), answer.locator(".answer").text_content()
