"""docs/chat.md says what the tests hold."""

from tests.chat.exceptions import DOCUMENT, documented


def test_the_tables_of_exceptions_are_those_the_tests_hold():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == documented(text), "run python -m tests.chat.exceptions"
