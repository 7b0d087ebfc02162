"""The JSON of an answer, without the text round it, however it arrives."""

import pytest

from pyrosome.chat.json_output import JsonOutput

CASES = [
    ('Here:\n```json\n{"a": 1}\n```\nDone', '{"a": 1}'),
    ('{"a": [1, "}"]}', '{"a": [1, "}"]}'),
    ("Sure! [1,2] and more", "[1,2] and more"),
    ('```\n{"a": "```", "b": "\\"```"}\n```', '{"a": "```", "b": "\\"```"}'),
    ("```json\n[1]\n", "[1]\n"),
    ("```json\n[1]\n``` then {}", "[1]"),
    ("```not closed", "```not closed"),
    ("no json at all", "no json at all"),
    ("5", "5"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "want"), CASES)
def test_the_json_is_given_out_and_nothing_is_lost_where_there_is_none(text, want):
    for size in (1, 2, 3, 100):
        output = JsonOutput()
        parts = [output.feed(text[n : n + size]) for n in range(0, len(text), size)]
        assert "".join(parts) + output.feed("", final=True) == want
