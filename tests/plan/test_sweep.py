"""The frontier: machines as full as they get, at every context."""

from __future__ import annotations

import builtins
import dataclasses

import pytest

from pyrosome.errors import RequestError
from pyrosome.plan.picture import plot
from pyrosome.plan.sweep import MAX_POINTS, contexts_up_to, sweep
from tests.plan import made

MACHINES = [("h200:1", made.machine(1, 4.0)), ("h200:2", made.machine(2, 9.0)), ("h200:4", made.machine(4, 9.0))]


def planner(asked):
    """Room for 1M tokens in all per device beyond the first; ep has twice what tp has, and one is asked for."""
    room = max(0, (asked.machine.count - 1) * 1_048_576 // asked.context)
    modes = ["tp", "ep"] if asked.mode == "auto" else [asked.mode]
    found = []
    for mode in modes:
        mine = room * (2 if mode == "ep" else 1)
        price = asked.machine.price_usd_hour
        fits = asked.sessions <= mine
        found.append(made.plan(mode, fits=fits, room=mine, sessions=asked.sessions, hour=price, tok_s=100.0))
    return found


def test_each_machine_is_filled_by_the_mode_that_has_most_room():
    points = sweep(made.asked(), MACHINES, [131_072, 1_048_576], planner)
    found = {(p.machine, p.context): p for p in points}
    assert [(p.machine, p.context) for p in points] == [(m, c) for m, _ in MACHINES for c in (131_072, 1_048_576)]
    at = found["h200:2", 131_072]
    assert (at.sessions, at.mode, at.usd_hour, at.usd_session_hour) == (16, "ep", 9.0, 9.0 / 16)
    assert at.total_tok_s.mid == 16 * at.decode_tok_s.mid  # planned for all of them, not for one
    empty = found["h200:1", 131_072]
    assert (empty.sessions, empty.mode, empty.decode_tok_s, empty.usd_hour) == (0, "", None, 4.0)
    assert "lacks" in empty.why_not


def test_a_point_is_on_the_frontier_unless_another_machine_holds_more_for_as_little():
    points = sweep(made.asked(), MACHINES, [131_072], planner)
    assert [p.on_frontier for p in points] == [False, False, True]  # as dear as two, and with three times the room
    cheap = [MACHINES[1], ("h200:4", made.machine(4, 20.0))]
    assert [p.on_frontier for p in sweep(made.asked(), cheap, [131_072], planner)] == [True, True]
    unpriced = [("h200:4", made.machine(4, None))]
    found = sweep(made.asked(), unpriced, [131_072], lambda a: [dataclasses.replace(p, cost=None) for p in planner(a)])
    assert found[0].sessions and not found[0].on_frontier and found[0].usd_session_hour is None


def test_a_machine_is_on_the_frontier_of_one_context_whatever_it_holds_of_another():
    points = sweep(made.asked(), [MACHINES[2]], [131_072, 1_048_576], planner)
    assert [p.on_frontier for p in points] == [True, True]


def test_an_empty_machine_is_planned_for_as_many_sessions_as_prompts_run():
    seen = []

    def recording(asked):
        seen.append(asked.sessions)
        return planner(asked)

    sweep(made.asked(prefilling=4), MACHINES[1:2], [131_072], recording)
    assert seen == [4, 16]


def test_the_contexts_looked_at_end_with_the_model_s_own():
    assert contexts_up_to(1_048_576) == (8_192, 32_768, 131_072, 524_288, 1_048_576)
    assert contexts_up_to(4_096) == (4_096,)
    assert contexts_up_to(1_048_576, 40_000) == (131_072, 524_288, 1_048_576)
    assert contexts_up_to(200_000) == (8_192, 32_768, 131_072, 200_000)


@pytest.mark.parametrize(("machines", "contexts"), [([], [8192]), (MACHINES, []), (MACHINES, range(1, MAX_POINTS))])
def test_a_sweep_of_nothing_or_of_too_much_is_refused(machines, contexts):
    with pytest.raises(RequestError, match=r"points; 1 to 400 were expected"):
        sweep(made.asked(), machines, contexts, planner)


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_sweep_is_drawn_by_the_name_s_form(tmp_path, name, begins):
    pytest.importorskip("matplotlib")
    points = sweep(made.asked(), MACHINES, [131_072, 1_048_576], planner)
    plot(points, tmp_path / name, "flash")
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_picture_that_cannot_be_drawn_is_said_in_words(tmp_path, monkeypatch):
    points = sweep(made.asked(), MACHINES, [131_072], planner)
    for name, found in (("a.pdf", "ends in .png or .svg"), ("no/a.png", "there is no folder")):
        with pytest.raises(RequestError, match=found):
            plot(points, tmp_path / name, "flash")
    with pytest.raises(RequestError, match="nothing of this sweep fits"):
        plot(points[:1], tmp_path / "a.png", "flash")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"needs matplotlib.*pip install 'pyrosome\[train\]'"):
        plot(points, tmp_path / "a.png", "flash")
