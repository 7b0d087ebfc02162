"""`pyrosome serve --plan`: a plan's options, what was typed besides, and what does not hold here."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from pyrosome.cli import app
from pyrosome.cli.server_flags import available_memory
from pyrosome.errors import DoesNotFit, PlanError, PyrosomeError, RequestError
from pyrosome.options import EngineOptions
from pyrosome.plan.inventory import Model
from pyrosome.plan.serving import Server
from tests.plan import made

GIB = 1 << 30


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """Runs `serve` up to where it would serve; gives what the engine is made with, and what was said."""
    made_with: list[dict] = []
    monkeypatch.setattr("pyrosome.server.service.EngineProcess", lambda factory, given: made_with.append(given))

    def instead(service, sockets, when_ready):
        for one in sockets:
            one.close()
        service._make_driver()
        service.door.close()

    monkeypatch.setattr("pyrosome.server.run.serve", instead)

    def run(*arguments: str):
        made_with.clear()
        done = CliRunner().invoke(app, ["serve", "--state", str(tmp_path / "state"), "--port", "0", *arguments])
        if isinstance(done.exception, PyrosomeError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return made_with[0], done.stderr

    return run


@pytest.fixture(scope="module")
def nano_plan(tmp_path_factory):
    """The text of a plan for three sessions of the built-in model here."""
    done = CliRunner().invoke(app, ["plan", "builtin:nano", "--context", "64K", "--sessions", "3", "--json"])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def plan_file(nano_plan, tmp_path):
    """Writes the plan with changed options, and what was asked with changes."""

    def write(options=None, **changes):
        found = json.loads(nano_plan)
        found["options"].update(options or {})
        found.update(changes)
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(found))
        return str(path)

    return write


def test_a_plan_s_options_are_those_the_engine_is_made_with(taken, plan_file, nano_plan):
    given, said = taken("--plan", plan_file())
    planned = json.loads(nano_plan)["options"]
    assert given["path"] == "builtin:nano"
    assert (given["max_sequences"], given["max_context"]) == (3, 65_536)
    assert given["cache_bytes"] == planned["cache_bytes"]
    assert (given["numerics"], given["kv_format"]) == ("trained", "fp8")
    assert "Plan: 3 sessions of 65,536 tokens; there is room for " in said and "Predicted: " in said


def test_options_without_a_flag_are_taken_too(taken, plan_file):
    extra = {"step_tokens": 777, "snapshot_bytes": 3 << 20, "host_bytes": 5 << 20, "max_drafts": 1, "disk_bytes": 7}
    given, _ = taken("--plan", plan_file(extra))
    assert {name: given[name] for name in extra} == extra


def test_what_is_typed_wins_over_the_plan_and_is_said(taken, plan_file):
    given, said = taken("--plan", plan_file(), "--sequences", "5", "--kv-format", "bf16", "--cache-gib", "0.25")
    assert (given["max_sequences"], given["kv_format"], given["cache_bytes"]) == (5, "bf16", 1 << 28)
    assert "--sequences 5 replaces the plan's 3." in said
    assert "--kv-format bf16 replaces the plan's 'fp8'." in said and "--cache-gib 0.25 replaces" in said
    _, said = taken("--plan", plan_file(), "--sequences", "3")
    assert "replaces" not in said


def test_a_flag_typed_with_its_default_wins_too(taken, plan_file):
    given, said = taken("--plan", plan_file(), "--sequences", "8")
    assert given.get("max_sequences", 8) == 8 and "--sequences 8 replaces the plan's 3." in said


def test_a_plan_for_another_model_is_refused(taken, plan_file, nano_plan):
    asked = json.loads(nano_plan)["asked"]
    other = {**asked, "model": {**asked["model"], "layers": 43, "name": "flash"}}
    with pytest.raises(PlanError, match=r"is for flash with 43 layers, and builtin:nano has 4; plan for this one"):
        taken("builtin:nano", "--plan", plan_file(asked=other))
    with pytest.raises(PlanError, match=r"is for flash, which is no checkpoint of this machine; name one"):
        taken("--plan", plan_file(asked=other))
    heavier = {**asked, "model": {**asked["model"], "stored_bytes": 5}}
    with pytest.raises(PlanError, match=r"with 5 stored bytes, and builtin:nano has 3,\d+,\d+"):
        taken("--plan", plan_file(asked=heavier))


def test_a_plan_for_accelerators_gives_its_options_and_says_that_its_speeds_do_not_hold(taken, plan_file, nano_plan):
    asked = json.loads(nano_plan)["asked"]
    gpus = {**asked, "machine": made.ASKED["machine"] | {"count": 1}}
    _, said = taken("--plan", plan_file(asked=gpus))
    assert "The plan is for 1 x NVIDIA H200 SXM. This version serves on this machine's processor" in said


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"max_sequences": "many"}, "max_sequences is 'many'"),
        ({"cache_bytes": "all"}, "cache_bytes is 'all'"),
        ({"cache_bytes": True}, "cache_bytes is True"),
        ({"numerics": ["trained"]}, "--numerics is ['trained']"),
        ({"kv_format": "int3"}, "--kv-format is 'int3'"),
        ({"experts": 5}, "experts is 5"),
        ({"step_tokens": -1}, "step_tokens is -1"),
        ({"max_context": 1.5}, "max_context is 1.5"),
    ],
)
def test_options_that_cannot_be_are_refused(taken, plan_file, options, found):
    with pytest.raises(RequestError, match=re.escape(found)):
        taken("--plan", plan_file(options))


def test_what_is_no_plan_is_refused(taken, plan_file, tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        taken("--plan", str(tmp_path / "none.json"))
    path = tmp_path / "a.json"
    for text, found in (("{", "is not JSON"), ("{}", "version was expected"), ('{"version": 99}', "of version 99")):
        path.write_text(text)
        with pytest.raises(PlanError, match=rf"--plan .*a\.json: .*{found}"):
            taken("--plan", str(path))
    with pytest.raises(PlanError, match="does not fit the machine it is for: RAM lacks 3 GiB; more RAM"):
        taken("--plan", plan_file(fits=False, why_not="RAM lacks 3 GiB", change="more RAM"))
    path.write_bytes(b" " * (17 << 20))
    with pytest.raises(RequestError, match="more than 16 MiB"):
        taken("--plan", str(path))


def test_a_plan_that_this_machine_cannot_hold_is_refused_with_numbers(taken, plan_file, monkeypatch):
    monkeypatch.setattr("pyrosome.cli.server_flags.available_memory", lambda: 2 * GIB)
    with pytest.raises(DoesNotFit) as refused:
        taken("--plan", plan_file({"cache_bytes": 4 * GIB}))
    assert re.search(r"needs 4\.\d+ GiB on this machine, which has 2\.000 GiB free", str(refused.value))
    assert re.search(r"--cache-gib 1\.\d\d would fit", str(refused.value))


def test_without_a_plan_too_a_server_that_would_not_fit_is_refused(taken, monkeypatch):
    monkeypatch.setattr("pyrosome.cli.server_flags.available_memory", lambda: 2 * GIB)
    with pytest.raises(DoesNotFit, match="needs 8"):
        taken("--cache-gib", "8")
    _, said = taken("--cache-gib", "0.5")
    assert "of 2.00 GiB available: weights 3." in said and "are left." in said


def test_a_context_that_was_asked_for_is_held_or_refused(taken, monkeypatch):
    monkeypatch.setattr("pyrosome.cli.server_flags.available_memory", lambda: int(2.1 * GIB))
    given, said = taken("--context", "1048576")  # half of what the weights leave is 0.05 GiB
    server = Server.of(Model.open("builtin:nano"), "fp8", EngineOptions())
    assert given["cache_bytes"] == server.cache_bytes_for(1_048_576) > 0.06 * GIB
    assert "room for one sequence of 1,048,576 tokens" in said
    with pytest.raises(DoesNotFit, match=r"a sequence of 1,048,576 tokens \(--context\).*give it --cache-gib"):
        taken("--context", "1048576", "--cache-gib", "0.01")


def test_at_its_end_a_server_tells_what_was_reached_beside_what_was_predicted(taken, monkeypatch):
    asked = []

    def told(stats, model, kv_format):
        asked.append((stats, model.name, kv_format))
        return ["decoding: 5 tok/s measured, 6 predicted"]

    monkeypatch.setattr("pyrosome.measure.served.told_after", told)
    _, said = taken("--kv-format", "bf16")
    assert asked == [(None, "builtin:nano", "bf16")] and said.endswith("decoding: 5 tok/s measured, 6 predicted\n")
    assert "measured" not in taken("--json")[1]


def test_files_that_a_container_has_read_are_not_counted_as_used(tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {100 * GIB // 1024} kB\n")
    limits = {"memory.max": 10 * GIB, "memory.current": 9 * GIB}
    for name, value in limits.items():
        (group / name).write_text(f"{value}\n")
    (group / "memory.stat").write_text(f"anon {GIB}\ninactive_file {5 * GIB}\nactive_file {GIB}\n")
    assert available_memory(tmp_path) == 7 * GIB
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 100 * GIB
