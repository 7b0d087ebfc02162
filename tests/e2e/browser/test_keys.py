"""The pages of accounts and of the administration, in a browser."""

import contextlib
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from pyrosome.server.caller import ACCOUNT, GENERATE, SCOPES
from pyrosome.server.keys import book
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import Limits
from pyrosome.server.keys.store import Store
from tests.e2e.browser.visit import WATCH, Visit
from tests.server.keys.serving import BODY, TALK, guarded

REFUSED = r"status of 40[0-9]"
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>\'"'


@pytest.fixture
def desk(browser, tmp_path):
    """Opens a page of a server with keys: a context manager of the visit and the server."""
    with contextlib.ExitStack() as open_ones:

        @contextlib.contextmanager
        def at(path, context=None, **options):
            server = open_ones.enter_context(
                guarded(Store(f"sqlite:///{tmp_path / 'keys.db'}"), price=Price(1_000_000, 0, 2_000_000), **options)
            )
            made = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **(context or {})})
            open_ones.callback(made.close)
            made.add_init_script(WATCH)
            visit = Visit(made, f"{server.url}/{path}", server.engine, None, meet=False)
            visit.allowed = [REFUSED]
            yield visit, server
            assert visit.wrongs() == []

        yield at


def sign_in(visit, text):
    visit.page.get_by_label("Key", exact=True).fill(text)
    visit.button("Use it").click()
    expect(visit.page.locator("#inside")).to_be_visible()


def shown_secret(visit):
    box = visit.page.locator("#secret-text")
    expect(box).not_to_have_value("")
    text = box.input_value()
    visit.page.locator("#secret").get_by_role("button", name="Close").click()
    return text


def row(visit, name, table="keys"):
    return visit.page.locator(f"#{table} tbody tr").filter(has_text=name)


def test_an_account_makes_changes_rotates_and_revokes_a_key(desk):
    with desk("account") as (visit, server):
        account = server.account("ACME", limits=Limits(max_concurrent=9))
        _, text = server.key(account, [GENERATE, ACCOUNT], name="first")
        sign_in(visit, text)
        expect(visit.page.locator("#summary")).to_contain_text("ACME, with the key first")
        visit.button("New key").click()
        form = visit.page.locator("#form")
        expect(form.get_by_label("generate:")).to_be_checked()
        assert form.get_by_label(re.compile("admin:|sessions:")).count() == 0, "what it has not it cannot give"
        form.get_by_label("Name").fill("app")
        form.get_by_label("Requests a minute").fill("5")
        form.get_by_label("Money a month").fill("12.50")
        form.get_by_label("It ends").fill("30d")
        visit.button("Make it").click()
        secret = shown_secret(visit)
        assert server.client(secret).post(TALK, json=BODY).headers["x-ratelimit-limit-requests"] == "5"
        assert secret not in visit.page.content()
        assert visit.page.locator("#secret-text").input_value() == ""
        (made,) = [k for k in server.store.read(lambda c: book.keys(c, account)) if k.name == "app"]
        assert made.limits == Limits(5, None, None, 12_500_000)

        visit.button("Change app").click()
        form.get_by_label("Name").fill("app 2")
        form.get_by_label("Requests a minute").fill("")
        form.get_by_label("Requests at once").fill("10")
        visit.button("Keep").click()
        expect(form.get_by_role("alert")).to_contain_text("max_concurrent")
        form.get_by_label("Requests at once").fill("2")
        visit.button("Keep").click()
        expect(row(visit, "app 2")).to_contain_text("requests at once 2")
        changed = server.store.read(lambda c: book.key(c, made.id))
        assert changed.limits == Limits(None, None, 2, 12_500_000)
        assert changed.expires == made.expires, "a day that was not touched keeps its hour"

        visit.button("Rotate app 2").click()
        visit.page.get_by_label("The old secret ends").select_option("in an hour")
        visit.button("Rotate", within=form).click()
        second = shown_secret(visit)
        for one in (secret, second):
            assert server.client(one).get("/v1/models").status_code == 200
        visit.button("Revoke app 2").click()
        visit.button("Revoke", within=form).click()
        expect(row(visit, "app 2")).to_have_count(0)
        visit.page.get_by_label("Show ended ones").check()
        expect(row(visit, "app 2")).to_contain_text("revoked")
        assert server.client(second).get("/v1/models").status_code == 401


def test_an_admin_makes_accounts_keys_and_invites_and_a_stranger_signs_up(desk):
    with desk("admin", sign_up=True) as (visit, server):
        expect(visit.page.locator("#door-hint")).to_contain_text("pyrosome keys create --admin")
        _, text = server.key(scopes=SCOPES, name="root")
        sign_in(visit, text)
        visit.button("New account").click()
        form = visit.page.locator("#form")
        form.get_by_label("Name").fill("ACME")
        form.get_by_label("Tokens a minute").fill("5000")
        visit.button("Make it").click()
        expect(row(visit, "ACME", "accounts")).to_contain_text("tokens a minute 5,000")
        visit.button("New key").click()
        form.get_by_label("Name").fill("theirs")
        form.get_by_role("combobox").select_option("ACME")
        for part, price in (("Prompt", "0.28"), ("Cached", "0.028"), ("Output", "0.42")):
            form.get_by_label(part, exact=True).fill(price)
        visit.button("Make it").click()
        client = server.client(shown_secret(visit))
        assert client.post(TALK, json=BODY).headers["x-ratelimit-limit-tokens"] == "5000"
        (theirs,) = [k for k in server.store.read(book.keys) if k.name == "theirs"]
        assert theirs.price == Price(280_000, 28_000, 420_000)
        expect(row(visit, "theirs")).to_contain_text("price 0.28 / 0.028 / 0.42")
        visit.button("Close ACME").click()
        visit.button("Close", within=form).click()
        expect(row(visit, "ACME", "accounts")).to_contain_text("closed")
        assert client.get("/v1/models").status_code == 401

        visit.button("New invite").click()
        form.get_by_label("Name").fill("friends")
        visit.button("Make it").click()
        code = shown_secret(visit)
        visit.button("Forget the key").click()
        assert visit.page.evaluate("sessionStorage.length") == 0
        visit.page.goto(f"{server.url}/account")
        visit.page.get_by_label("Invite code").fill(code)
        visit.page.get_by_label("Name of your account").fill("newcomer")
        visit.button("Make an account").click()
        assert server.client(shown_secret(visit)).get("/account/me").json()["account"]["name"] == "newcomer"
        expect(visit.page.locator("#summary")).to_contain_text("newcomer")


def test_usage_is_shown_by_day_key_and_model_and_saved_as_csv(desk):
    with desk("account") as (visit, server):
        _, text = server.key(scopes=[GENERATE, ACCOUNT], name="first")
        for model in ("m1", "m1", "m2"):
            server.client(text).post(TALK, json={**BODY, "model": model})
        sign_in(visit, text)
        visit.page.locator("#by").select_option("Model")
        visit.button("Show").click()
        expect(visit.page.locator("#usage tbody tr")).to_have_count(2)
        cells = [c.inner_text() for c in row(visit, "m1", "usage").locator("td").all()]
        assert cells[2] == "2"
        together = server.client(text).get("/account/usage").json()["total"]
        expect(visit.page.locator("#usage tfoot td").last).to_have_text(together["cost"])
        with visit.page.expect_download() as saved:
            visit.button("Save as CSV").click()
        lines = saved.value.path().read_text().splitlines()
        assert saved.value.suggested_filename == "usage.csv"
        assert len(lines) == 4


def test_names_that_look_like_markup_are_text(desk):
    with desk("admin") as (visit, server):
        account = server.account(HOSTILE)
        _, text = server.key(account, SCOPES, name=HOSTILE)
        server.client(text).post(TALK, json={**BODY, "model": HOSTILE})
        sign_in(visit, text)
        for by in ("Key", "Model", "Account"):
            visit.page.locator("#by").select_option(by)
            visit.button("Show").click()
            expect(visit.page.locator("#usage tbody td").first).to_have_text(HOSTILE)
        expect(visit.page.locator("#keys tbody td").first).to_contain_text(HOSTILE)
        visit.page.get_by_role("button", name="Change").last.click()
        expect(visit.page.locator("#form-title")).to_have_text(f"Change {HOSTILE}")
        assert visit.page.locator("main img, main script, dialog img, dialog script").count() == 0


def test_a_wrong_or_ended_key_leads_back_to_the_door(desk):
    with desk("account") as (visit, server):
        visit.page.get_by_label("Key", exact=True).fill("pyr-nonsense")
        visit.button("Use it").click()
        expect(visit.page.locator("#problem")).to_contain_text("not valid here")
        key, text = server.key(scopes=[ACCOUNT])
        sign_in(visit, text)
        server.store.write(lambda c: book.revoke_key(c, key, 1.0))
        server.door.forget()
        visit.button("Show").click()
        expect(visit.page.locator("#problem")).to_contain_text("revoked")
        expect(visit.page.locator("#inside")).to_be_hidden()
        _, lacks = server.key(scopes=[GENERATE])
        visit.page.get_by_label("Key", exact=True).fill(lacks)
        visit.button("Use it").click()
        expect(visit.page.locator("#problem")).to_contain_text("needs the scope 'account'")


def test_the_key_is_kept_for_the_tab_alone(desk):
    with desk("account") as (visit, server):
        _, text = server.key(scopes=[ACCOUNT])
        sign_in(visit, text)
        visit.page.reload()
        expect(visit.page.locator("#inside")).to_be_visible()
        other = visit.open()
        expect(other.locator("#door")).to_be_visible()
        kept = visit.page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href]")
        assert all(text not in k for k in kept)
        assert kept[1] == ""


def test_everything_is_done_by_keyboard(desk):
    with desk("account") as (visit, server):
        _, text = server.key(scopes=[GENERATE, ACCOUNT], name="first")
        press, focused = visit.page.keyboard.press, "document.activeElement"
        expect(visit.page.locator("#door-key")).to_be_focused()
        visit.page.keyboard.type(text)
        press("Enter")
        expect(visit.page.locator("#inside")).to_be_visible()
        for _ in range(20):
            press("Tab")
            if visit.page.evaluate(f"{focused}.id") == "new-key":
                break
        press("Enter")
        visit.page.keyboard.type("typed")
        press("Enter")
        secret = visit.page.locator("#secret-text")
        expect(secret).to_be_focused()
        assert secret.input_value().startswith("pyr-")
        press("Escape")
        expect(row(visit, "typed")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_axe_finds_nothing_wrong_and_nothing_is_wider_than_the_screen(desk, scheme, width):
    context = {"color_scheme": scheme, "reduced_motion": "reduce", "bypass_csp": True,
               "viewport": {"width": width, "height": 800}}  # fmt: skip
    with desk("admin", context=context, sign_up=True) as (visit, server):
        audit(visit.page)
        account = server.account("ACME with a rather long name that does not fit", limits=Limits(5, 6, 7, 8_000_000))
        _, text = server.key(account, SCOPES, name="root", price=Price(1, 2, 3))
        server.client(text).post(TALK, json=BODY)
        server.client(text).post("/admin/invites", json={"name": "friends"})
        sign_in(visit, text)
        audit(visit.page)
        visit.button("New key").click()
        audit(visit.page)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width


def audit(page):
    found = Axe().run(page).response
    assert found["passes"]
    wrong = [f"{r['id']}: {[n['html'][:160] for n in r['nodes']]}" for r in found["violations"]]
    assert wrong == []
