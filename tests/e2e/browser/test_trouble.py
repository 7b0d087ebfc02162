"""What goes wrong is said in words, nothing that was written is lost, and it can be tried again."""

import contextlib
import re
from urllib.parse import urlsplit

from playwright.sync_api import expect

from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.caller import ANYBODY, OpenDoor
from pyrosome.server.problems import Refused
from pyrosome.server.service import FAILED, LOADING, READY
from tests.e2e.browser.test_chat import SLOW, WORDS, set_settings
from tests.e2e.browser.visit import ELSEWHERE, Cable
from tests.server.scripted import saying

SAID = "</think>answer"
KEY = "pyr-" + "k" * 27
FAILED_LOAD = r"Failed to load resource"  # the browser's own line for any status of 400 and above, and for no answer


class KeyDoor(OpenDoor):
    """Lets in whoever has the key."""

    is_needed = True

    def __init__(self):
        self.presented = []

    async def caller(self, presented):
        self.presented.append(presented)
        if presented != KEY:
            raise Refused(401, "this key is not known here" if presented else "a key is needed")
        return ANYBODY


class BusyDoor(OpenDoor):
    """Admits nobody while it has a `refusal`."""

    refusal = Refused(429, "60 requests in this minute, as many as this key may", headers={"Retry-After": "7"})

    async def enter(self, caller, request, prompt_tokens, max_tokens):
        if self.refusal:
            raise self.refusal
        return await super().enter(caller, request, prompt_tokens, max_tokens)


def with_door(door):
    return lambda service: setattr(service, "door", door)


def problem_of(v):
    return v.page.locator(".problem")


def test_a_key_is_asked_for_when_the_server_wants_one(visit):
    door = KeyDoor()
    with visit(SAID, prepare=with_door(door), meet=False) as v:
        v.allowed = [FAILED_LOAD]
        dialog = v.page.locator("#key-dialog")
        expect(dialog).to_be_visible()
        v.page.get_by_label("Key", exact=True).fill("pyr-wrong")
        v.page.keyboard.press("Enter")
        expect(dialog).to_contain_text("this key is not known here")
        v.page.get_by_label("Key", exact=True).fill(KEY)
        v.page.keyboard.press("Enter")
        expect(v.page.locator("#model")).to_have_text("builtin:nano")
        v.ask("hello")
        assert door.presented[-1] == KEY
        kept = v.page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie]")
        assert [KEY in text for text in kept] == [False, True, False]
        assert not [r for r in v.requests if KEY in r.url]
        v.page.reload()
        expect(v.page.locator("#model")).to_have_text("builtin:nano")  # the tab still has it
        v.button("Settings").click()
        v.button("Forget the key").click()
        assert KEY not in v.page.evaluate("JSON.stringify(sessionStorage)")


def test_the_page_works_without_tls_from_another_machine(visit):
    """There a browser withholds the clipboard and more."""

    def through(url):
        return contextlib.nullcontext(url.replace("127.0.0.1", ELSEWHERE))

    with visit(SAID, prepare=with_door(KeyDoor()), through=through, meet=False) as v:
        v.allowed = [FAILED_LOAD, "Cross-Origin-Opener-Policy header has been ignored"]
        v.page.get_by_label("Key", exact=True).fill(KEY)
        v.page.keyboard.press("Enter")
        expect(v.page.locator("#model")).to_have_text("builtin:nano")
        assert v.page.evaluate("window.isSecureContext") is False
        v.ask("hello")
        v.button("Regenerate").click()
        v.answered()
        v.button("Fork").last.click()
        expect(v.page.locator("#conversations a")).to_have_count(2)
        v.button("Copy this answer").click()
        expect(v.page.locator("#notices")).to_contain_text("does not let this page copy")
        v.page.reload()
        v.shows(("user", "hello"), ("assistant", "answer"))


def test_without_a_key_the_message_stays_and_can_be_sent_again(visit):
    door = KeyDoor()
    with visit(SAID) as v:
        v.allowed = [FAILED_LOAD]
        v.service.door = door
        v.say("hello")
        expect(v.page.locator("#key-dialog")).to_be_visible()
        v.page.keyboard.press("Escape")
        expect(problem_of(v)).to_contain_text("The server did not let you in")
        expect(problem_of(v)).to_contain_text("a key is needed")
        v.button("Try again").click()
        v.page.get_by_label("Key", exact=True).fill(KEY)
        v.page.locator("#key-dialog").get_by_role("button", name="Use it").click()
        expect(v.answered().locator(".answer")).to_have_text("answer")
        v.shows(("user", "hello"), ("assistant", "answer"))
        expect(v.page.locator(".steps")).to_have_count(0)


def test_a_busy_server_is_told_of_with_the_time_to_wait(visit):
    door = BusyDoor()
    with visit(SAID, prepare=with_door(door)) as v:
        v.allowed = [FAILED_LOAD]
        v.ask("hello")
        expect(problem_of(v)).to_have_text(re.compile(
            "The server is busy.*as many as this key may\\. It says to wait 7 seconds", re.DOTALL
        ))  # fmt: skip
        door.refusal = None
        v.button("Try again").click()
        expect(v.answered().locator(".answer")).to_have_text("answer")
        expect(problem_of(v)).to_be_hidden()


def test_a_full_queue_is_told_of(visit):
    options, engine = ServerOptions(max_queue=0), EngineOptions(max_sequences=1)
    with visit("</think>" + WORDS, options=options, engine_options=engine, **SLOW) as v:
        v.allowed = [FAILED_LOAD]
        v.say("one")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        v.button("New conversation").click()
        v.ask("two")
        expect(problem_of(v)).to_contain_text("The server is busy")


def test_a_request_that_is_wrong_is_told_in_the_servers_words(visit):
    with visit(SAID) as v:
        v.allowed = [FAILED_LOAD]
        set_settings(v, tools='[{"type": "function", "function": {"name": "no such name"}}]')
        v.ask("hello")
        expect(problem_of(v)).to_contain_text("The server did not take this")
        expect(problem_of(v)).to_contain_text("tools[0].function.name")


def test_an_engine_that_fails_in_mid_answer_is_told_of_and_what_came_is_kept(visit):
    with visit("</think>" + WORDS, **SLOW) as v:
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        v.engine.fail = "a value that is no number"
        answer = v.answered()
        expect(problem_of(v)).to_contain_text("The server failed")
        expect(problem_of(v)).to_contain_text("a value that is no number")
        expect(answer.locator(".answer")).to_contain_text("word1")
        v.engine.script, v.engine.step_s = saying(SAID), 0
        v.button("Try again").click()
        expect(v.answered().locator(".answer")).to_have_text("answer")
        v.button("Earlier version").click()
        expect(v.page.locator(".answer")).to_contain_text("word1")  # what came is a version beside it


def test_a_server_that_goes_away_in_mid_answer_is_told_of(visit):
    cables = []

    @contextlib.contextmanager
    def through(url):
        cables.append(Cable(urlsplit(url).port))
        yield cables[0].url
        cables[0].cut()

    with visit("</think>" + WORDS, through=through, **SLOW) as v:
        v.allowed = [FAILED_LOAD, "net::ERR"]
        v.say("talk")
        expect(v.page.locator(".answer")).to_contain_text("word1")
        cables[0].cut()
        answer = v.answered()
        expect(problem_of(v)).to_contain_text("broke off before the answer was complete")
        expect(answer.locator(".answer")).to_contain_text("word0 word1")
        v.button("Try again").click()
        v.answered()
        expect(problem_of(v)).to_contain_text("could not be reached")
        assert [who for who, _ in v.messages()] == ["user", "assistant"]


def test_a_model_that_is_being_loaded_is_waited_for(visit):
    with visit(SAID, meet=False, prepare=lambda s: setattr(s, "_state", LOADING)) as v:
        v.allowed = [FAILED_LOAD]
        expect(v.page.locator("#state")).to_have_text("The model is being loaded…")
        v.service._state = READY
        expect(v.page.locator("#state")).to_contain_text("builtin:nano")


def test_a_model_that_could_not_be_loaded_is_told_of(visit):
    def fail(service):
        service._state, service._reason = FAILED, "the file has no tensors"

    with visit(SAID, meet=False, prepare=fail) as v:
        v.allowed = [FAILED_LOAD]
        expect(v.page.locator("#state")).to_have_text("The model could not be loaded: the file has no tensors")


def test_a_browser_without_room_says_so_and_the_answer_is_shown(visit):
    with visit(SAID) as v:
        v.page.evaluate(
            """() => {
                IDBObjectStore.prototype.put = () => { throw new DOMException("no room", "QuotaExceededError"); };
            }"""
        )
        v.ask("hello")
        expect(v.page.locator("#notices")).to_contain_text("could not keep this: no room")
        v.shows(("user", "hello"), ("assistant", "answer"))
