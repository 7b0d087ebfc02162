"""Files that are dropped in or chosen: text becomes part of the message, everything else is refused in words."""

import re

from playwright.sync_api import expect

from tests.server.scripted import TOKENIZER

TEXT = "The whale is 30 metres long.\nIt weighs 150 tonnes – more or less.\n"
SAID = "</think>I see."

DROP = """(files) => {
    const held = new DataTransfer();
    for (const [name, bytes] of files) held.items.add(new File([new Uint8Array(bytes)], name));
    for (const kind of ["dragover", "drop"]) {
        document.querySelector("#log").dispatchEvent(
            new DragEvent(kind, {dataTransfer: held, bubbles: true, cancelable: true}));
    }
}"""


def drop(v, **files):
    v.page.evaluate(DROP, [[name.replace("_", "."), list(data)] for name, data in files.items()])


def test_a_dropped_text_becomes_part_of_the_message(visit):
    with visit(SAID) as v:
        drop(v, whale_txt=TEXT.encode())
        tokens = len(TOKENIZER.encode(TEXT))
        expect(v.page.locator(".chip")).to_contain_text(f"whale.txt{len(TEXT.encode())} B · {tokens} tokens")
        expect(v.page.locator("#meter-text")).to_have_text(f"{tokens} / 1,048,576")
        v.ask("How long?")
        assert TEXT in v.prompt()
        assert "whale.txt" in v.prompt()
        assert v.prompt().index("metres") < v.prompt().index("How long?")
        file = v.page.locator(".message.user .file")
        file.locator("summary").click()
        assert file.locator("pre").inner_text() == TEXT
        expect(v.page.locator(".chip")).to_have_count(0)
        v.page.reload()
        expect(file).to_contain_text("whale.txt")


def test_files_can_be_chosen_and_left_out_again_and_sent_alone(visit):
    with visit(SAID) as v:
        files = [{"name": f"{n}.md", "mimeType": "text/markdown", "buffer": f"file {n}".encode()} for n in "abc"]
        v.page.locator("#file-input").set_input_files(files)
        expect(v.page.locator(".chip")).to_have_count(3)
        v.button("Leave out b.md").click()
        expect(v.page.locator(".chip")).to_have_count(2)
        v.page.press("#draft", "Enter")
        v.answered()
        assert "file a" in v.prompt()
        assert "file c" in v.prompt()
        assert "file b" not in v.prompt()
        expect(v.page.locator("#conversations a")).to_have_text(["a.md"])


NO_TEXT = [
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "is not text"),
    (b"caf\xe9", "is not text"),
    (b"a\x00b", "is not text"),
    (b"", "is empty"),
]


def test_what_is_no_text_is_refused_with_its_name(visit):
    with visit(SAID) as v:
        for n, (data, words) in enumerate(NO_TEXT, 1):
            drop(v, thing_bin=data, good_txt=b"good")
            expect(v.page.locator(".chip")).to_have_count(n)  # the other one is taken
            expect(v.page.locator(".notice")).to_contain_text(f"thing.bin {words}")
            v.button("Close this notice").click()


def test_text_of_sixteen_bits_is_text(visit):
    with visit(SAID) as v:
        drop(v, wide_txt="Wal – 30 m".encode("utf-16"))
        expect(v.page.locator(".chip")).to_have_count(1)
        v.ask("?")
        assert "Wal – 30 m" in v.prompt()


def test_a_file_without_room_in_the_context_is_refused_with_both_numbers(visit):
    with visit(SAID, prepare=lambda service: small(service, 100)) as v:
        drop(v, long_txt=b"word " * 400)
        tokens = len(TOKENIZER.encode("word " * 400))
        expect(v.page.locator("#notices")).to_contain_text(f"long.txt has {tokens:,} tokens; there is room for 100")
        drop(v, one_txt=b"word " * 25)
        expect(v.page.locator(".chip")).to_have_count(1)
        drop(v, two_txt=b"word " * 25)  # what is in the message already takes room too
        expect(v.page.locator("#notices")).to_contain_text(
            re.compile(r"two\.txt has \d+ tokens; there is room for \d+ ")
        )


def small(service, tokens):
    import dataclasses

    service.card = dataclasses.replace(service.card, context_tokens=tokens)


def test_a_file_of_too_many_bytes_is_not_even_read(visit):
    with visit(SAID) as v:
        v.page.evaluate(
            """() => {
                const held = new DataTransfer();
                held.items.add(new File([new Uint8Array(17e6)], "huge.log"));
                document.querySelector("#log").dispatchEvent(
                    new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true}));
            }"""
        )
        expect(v.page.locator("#notices")).to_contain_text("huge.log has 17.0 MB; files of up to 16.0 MB are taken")
        assert not [r for r in v.requests if "tokenize" in r.url]


def test_the_place_to_drop_is_shown_while_files_are_over_the_page(visit):
    with visit(SAID) as v:
        over = "new DragEvent('%s', {dataTransfer: held, bubbles: true, cancelable: true})"
        hold = "const held = new DataTransfer(); held.items.add(new File(['x'], 'x.txt'));"
        v.page.evaluate(f"() => {{ {hold} document.body.dispatchEvent({over % 'dragover'}) }}")
        expect(v.page.locator("#drop")).to_be_visible()
        v.page.evaluate(f"() => {{ {hold} document.body.dispatchEvent({over % 'dragleave'}) }}")
        expect(v.page.locator("#drop")).to_be_hidden()
