"""The trace: a file that Chrome reads, whole or not there, of steps and of each completion."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from pyrosome.engine.trace import Trace, checked_path
from pyrosome.errors import RequestError
from tests.engine.engines import drain, engine_of, request, run, take
from tests.networks import agreeing_network

PHASES = {"admit", "plan", "forward", "choose", "draft", "settle"}


class Clock:
    def __init__(self, at: float = 1000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def refuse(name: str):
    raise ValueError(f"{name} is no JSON")


def read(path: Path) -> list[dict]:
    """The events of a file, each as Chrome needs it."""
    events = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    for e in events:
        assert isinstance(e["name"], str) and e["pid"] == os.getpid() and isinstance(e["tid"], int)
        assert e["ph"] in "XiM" and e["ts"] >= 0
        if e["ph"] == "X":
            assert e["dur"] >= 0
        elif e["ph"] == "i":
            assert e["s"] in ("t", "g")
        else:
            assert isinstance(e["args"]["name"], str)
    assert events[0]["name"] == "process_name"
    return events


def tracks(events: list[dict]) -> dict[str, list[dict]]:
    """Events by the name of their track, in order of time."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    by_track = {name: [] for name in names.values()}
    for e in events:
        if e["ph"] != "M":
            by_track[names[e["tid"]]].append(e)
    for track in by_track.values():
        track.sort(key=lambda e: (e["ts"], -e.get("dur", 0)))
    return by_track


def ns(e: dict) -> tuple[int, int]:
    """When it began and ended, in whole nanoseconds."""
    return round(e["ts"] * 1000), round(e["ts"] * 1000) + round(e["dur"] * 1000)


def parents(track: list[dict]) -> list[str]:
    """What each span of a track lies in, "" for nothing; spans that overlap are an error."""
    above, inside = [], []
    for e in track:
        began, ended = ns(e)
        while above and ns(above[-1])[1] <= began:
            above.pop()
        assert not above or ended <= ns(above[-1])[1], f"{e} is half in {above[-1]}"
        inside.append(above[-1]["name"] if above else "")
        above.append(e)
    return inside


def test_spans_instants_and_phases_are_where_and_when_they_were(tmp_path):
    clock = Clock()
    trace = Trace(tmp_path / "a.json", clock=clock)
    clock.at += 0.5
    with trace.phase("outer", tokens=3):
        clock.at += 0.25
        trace.instant("here", "r.0", why="because")
        with trace.phase("inner"):
            clock.at += 0.125
    trace.span("queued", 1000.0, 1000.75, "r.0")
    trace.close()
    by_track = tracks(read(tmp_path / "a.json"))
    assert [(e["name"], e["ts"], e["dur"]) for e in by_track["steps"]] == [
        ("outer", 5e5, 3.75e5),
        ("inner", 7.5e5, 1.25e5),
    ]
    assert by_track["steps"][0]["args"] == {"tokens": 3} and parents(by_track["steps"]) == ["", "outer"]
    assert [(e["name"], e["ph"], e["ts"]) for e in by_track["request r.0"]] == [
        ("queued", "X", 0),
        ("here", "i", 7.5e5),
    ]


def test_a_phase_that_fails_is_there_and_its_error_goes_on(tmp_path):
    trace = Trace(tmp_path / "a.json")
    with pytest.raises(KeyError), trace.phase("broken"):
        raise KeyError
    trace.close()
    assert [e["name"] for e in tracks(read(tmp_path / "a.json"))["steps"]] == ["broken"]


def test_what_follows_at_once_does_not_begin_before_the_end(tmp_path):
    """Times are rounded to nanoseconds, and a viewer draws what overlaps inside."""
    trace = Trace(tmp_path / "a.json", clock=Clock(0.0))
    times = [i * 0.0012345678 for i in range(3000)]
    for began, ended in pairwise(times):
        trace.span("part", began, ended, "r.0")
    trace.close()
    track = tracks(read(tmp_path / "a.json"))["request r.0"]
    assert parents(track) == [""] * 2999
    assert all(ns(a)[1] == ns(b)[0] for a, b in pairwise(track))


def test_what_began_before_the_trace_begins_with_it(tmp_path):
    trace = Trace(tmp_path / "a.json", clock=Clock(10.0))
    trace.span("early", 8.0, 11.0)
    trace.span("backwards", 12.0, 11.5)
    trace.close()
    assert [(e["ts"], e["dur"]) for e in tracks(read(tmp_path / "a.json"))["steps"]] == [(0, 1e6), (2e6, 0)]


def test_any_name_and_number_makes_a_file_that_can_be_read(tmp_path):
    trace = Trace(tmp_path / "a.json")
    odd = 'a "quote"\n\\ \u2028 深海 \ud800'
    trace.instant(odd, odd, nan=float("nan"), most=float("inf"), path=Path("x"), text=odd)
    trace.close()
    (event,) = tracks(read(tmp_path / "a.json"))[f"request {odd}"]
    assert event["args"] == {"nan": "nan", "most": "inf", "path": "x", "text": odd}


def test_what_is_beyond_the_bound_is_counted(tmp_path):
    trace = Trace(tmp_path / "a.json", max_events=3)
    for i in range(10):
        trace.instant(str(i), f"track {i}")
    trace.close()
    trace.instant("after the end")
    events = read(tmp_path / "a.json")
    assert [e["name"] for e in events if e["ph"] == "i"] == ["0", "1", "2", "7 further events were not kept"]
    assert trace.num_dropped == 8 and sum(e["name"] == "thread_name" for e in events) == 4


def test_a_trace_of_nothing_can_be_read(tmp_path):
    Trace(tmp_path / "a.json").close()
    assert tracks(read(tmp_path / "a.json")) == {"steps": []}


def test_a_file_is_written_whole_at_the_end_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "er" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text("what was there")
    trace = Trace(path)
    trace.instant("now")
    assert path.read_text() == "what was there"

    def fails(*_):
        assert [p.name for p in path.parent.iterdir()] != ["a.json"], "it is written beside it first"
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space left"):
            trace.close()
    assert path.read_text() == "what was there" and list(path.parent.iterdir()) == [path]
    trace.close()
    assert path.read_text() == "what was there", "there is one end"
    other = Trace(path)
    other.close()
    assert read(path) and list(path.parent.iterdir()) == [path]


def test_where_no_file_can_be_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path, text in (
        (tmp_path, "it is a folder; name a file in it"),
        (tmp_path / "file" / "a.json", "and cannot be"),
        ("a\0b/c.json", "null"),
    ):
        with pytest.raises(RequestError, match=text):
            Trace(path)
    with pytest.raises(RequestError, match="it is a folder"):
        engine_of(trace_path=str(tmp_path))
    assert checked_path(tmp_path / "new" / "a.json").parent.is_dir()


# Through an engine


def test_an_engine_traces_its_steps_and_each_completion(tmp_path):
    path = tmp_path / "trace.json"
    engine = engine_of(trace_path=str(path), max_sequences=3, step_tokens=100)
    requests = [request("a", 300, 8), request("b", 20, 5, 700, n=2), request("c", 70, 1, 900), request("d", 9, 3, 99)]
    said = run(engine, requests)
    said |= run(engine, [request("a2", 300, 2)])
    assert not path.exists()
    engine.close()
    by_track = tracks(read(path))
    assert set(by_track) == {"steps", *(f"request {name}.{index}" for name, index in said)}

    steps = [e for e in by_track["steps"] if e["name"] == "step"]
    assert len(steps) == engine.stats.steps
    assert sum(e["args"]["tokens"] for e in steps) == engine.stats.computed_tokens
    assert sum(e["args"]["events"] for e in steps) == engine.stats.output_tokens + len(said)
    assert {e["name"] for e in by_track["steps"]} == {"step"} | PHASES
    inside = parents(by_track["steps"])
    assert set(inside) == {"", "step"}
    assert all((e["name"] == "step") == (parent == "") for e, parent in zip(by_track["steps"], inside, strict=True))

    for (name, index), s in said.items():
        track = by_track[f"request {name}.{index}"]
        assert [e["name"] for e in track] == ["queued", "prompt", "output"]
        queued, prompt, output = track
        assert ns(queued)[1] == ns(prompt)[0] and ns(prompt)[1] == ns(output)[0]
        assert queued["args"] == {"prompt_tokens": 20 if name == "b" else s.end.reuse.prompt_tokens}
        assert prompt["args"] == {"reused_tokens": s.end.reuse.reused_tokens}
        assert output["args"] == {"tokens": len(s.tokens), "reason": "length", "parks": s.end.timeline.num_parks}
    assert by_track["request a2.0"][1]["args"]["reused_tokens"] > 0
    first = min(ns(e)[0] for e in steps)
    assert all(ns(t[-1])[1] <= ns(steps[-1])[1] and ns(t[1])[0] >= first for t in list(by_track.values())[1:])


def test_what_never_began_was_queued_alone(tmp_path):
    engine = engine_of(trace_path=str(tmp_path / "a.json"), max_sequences=1)
    said = {}
    for name in "ab":
        engine.add(request(name, 20, 6))
    take(engine.step(), said)
    engine.abort("b")
    take(engine.step(), said)
    assert said["b", 0].end.reason == "abort" and engine.has_work
    engine.close()
    by_track = tracks(read(tmp_path / "a.json"))
    durations = [e["dur"] for e in by_track["request b.0"]]
    assert durations[0] > 0 and durations[1:] == [0, 0]
    assert by_track["request b.0"][-1]["args"] == {"tokens": 0, "reason": "abort", "parks": 0}
    assert by_track["request a.0"][-1]["args"]["reason"] == "abort", "what runs is ended with the engine"


def test_steps_that_fail_nest_too(tmp_path):
    engine = engine_of(agreeing_network(), trace_path=str(tmp_path / "a.json"), drafter="mtp")
    forward, calls = engine.runner.forward, []

    def sometimes(*args, **kwargs):
        calls.append(None)
        if len(calls) % 3 == 0:
            raise RuntimeError("a broken step")
        return forward(*args, **kwargs)

    engine.runner.forward = sometimes
    for i in range(4):
        engine.add(request(str(i), 20 + i, 10, 100 * i))
    said = drain(engine)
    engine.close()
    by_track = tracks(read(tmp_path / "a.json"))
    assert set(parents(by_track["steps"])) == {"", "step"}
    reasons = {name: s.end.reason for (name, _), s in said.items()}
    assert {by_track[f"request {name}.0"][-1]["args"]["reason"] == reason for name, reason in reasons.items()} == {True}
    assert "error" in reasons.values()
