"""A server under many clients of all kinds, for seconds; `python -m bench.serve` does it for minutes."""

from __future__ import annotations

import asyncio
import json

import pytest

from bench import serve
from bench.serve_clients import CHAT, Tally

STATS = {
    "running": 0, "waiting": 0, "inside": 0, "exchanges": 0, "num_slots": 8, "free_slots": 8,
    "num_pages": {"4": 10, "128": 3}, "free_pages": {"4": 6, "128": 3}, "tree_pages": {"4": 4},
}  # fmt: skip


def test_under_load_nothing_breaks_and_nothing_is_held_when_all_have_left():
    found = asyncio.run(serve.load(12, 100, weighs=False, max_queue=40))
    assert found["wrong"] == []
    counts = found["counts"]
    assert counts["stream whole"] > 10 and counts["malformed 400"] > 10
    assert counts["left before the answer"] + counts["left in the answer"] > 20
    assert any(name.endswith("429") for name in counts), "the queue was full at times"


def test_what_is_held_though_nobody_is_there_is_found():
    assert serve._held(STATS) == []
    for changes, said in (
        ({"exchanges": 1}, "1 exchanges"),
        ({"free_slots": 7}, "1 slots are not free"),
        ({"tree_pages": {"4": 3}}, "4 pages of 4 tokens a row are in use and 3 are of kept prefixes"),
    ):
        assert said in serve._held({**STATS, **changes})[0]


def test_memory_that_does_not_come_back_is_found():
    before = {"server": 100.0, "engine": 400.0}
    assert serve._grown(before, {"server": 130.0, "engine": 440.0}) == []
    assert "the server has 140 MiB" in serve._grown(before, {"server": 140.0, "engine": 400.0})[0]
    assert "the engine has 460 MiB" in serve._grown(before, {"server": 100.0, "engine": 460.0})[0]


REASON = json.dumps({"error": {"message": "full"}}).encode()


@pytest.mark.parametrize(
    ("kind", "status", "headers", "body", "is_wrong"),
    [
        ("stream", 200, {}, b"", False),
        ("malformed", 400, {}, b"", False),
        ("malformed", 200, {}, b"", True),
        ("stream", 500, {}, REASON, True),
        ("stream", 504, {}, REASON, True),
        ("stream", 503, {"retry-after": "1"}, REASON, False),
        ("stream", 503, {}, REASON, True),
        ("stream", 429, {"retry-after": "1"}, b"Too Many Requests", True),
    ],
)
def test_an_answer_that_must_not_be_is_written_down(kind, status, headers, body, is_wrong):
    tally = Tally()
    tally.answer(kind, status, headers, body)
    assert bool(tally.wrong) == is_wrong


def test_a_stream_that_breaks_off_is_written_down():
    tally = Tally()
    tally.stream("stream", CHAT, b'data: {"a":1}\n\ndata: [DONE]\n\n')
    assert not tally.wrong
    tally.stream("stream", CHAT, b'data: {"a":1}\n\n')
    tally.stream("stream", CHAT, b'data: {"error":{"message":"x"}}\n\ndata: [DONE]\n\n')
    assert len(tally.wrong) == 2
