"""`pyrosome plan`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from pyrosome.cli import app, plan_tables
from pyrosome.cli.terminal import Screen
from pyrosome.errors import PyrosomeError, RequestError
from pyrosome.plan.history import keep
from pyrosome.plan.inventory import Model
from pyrosome.plan.plan import Item, Place, Plan
from tests.cli.plan_examples import PAGE, commands, filled
from tests.plan import made

TWO_H200 = ("--gpu", "h200:2", "--context", "1M", "--sessions", "7", "--price", "9.42")


def run(*arguments: str, status: int = 0) -> str:
    """Standard output of `pyrosome plan`, whose own errors are raised here."""
    done = CliRunner().invoke(app, ["plan", *arguments])
    if isinstance(done.exception, PyrosomeError):
        raise done.exception
    assert done.exit_code == status, done.output
    return done.stdout


@pytest.fixture(scope="module")
def two_h200():
    return run(*TWO_H200)


def test_a_plan_says_whether_it_fits_what_goes_where_how_fast_and_for_how_much(two_h200):
    for part in (
        "flash on 2 x H200", "284,332,240,471 parameters, 159,609,485,896 bytes stored", "It fits, by ",
        "what goes where, in GiB", "routed experts", "csa_kv", "prefill reserve",
        "room for sessions of 1,048,576 tokens", "decode, tok/s of one session", "first token, s", "limited by ",
        "source: ", "$9.42 an hour, $6,876.60 a month", "per million tokens: $", "modes, the best first",
    ):  # fmt: skip
        assert part in two_h200, part
    assert all(mode in two_h200 for mode in ("\ntp ", "\npp ", "\nep ", "\ndp ", "\ncp "))


@pytest.mark.parametrize("arguments", [TWO_H200, ("--gpu", "a100:3", "--context", "1M", "--sessions", "9")])
def test_a_plan_is_read_in_100_columns(arguments):
    said = run(*arguments)
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 100


def test_the_longest_context_that_fits_is_told_and_is_the_longest():
    asked = ("--gpu", "h200:2", "--sessions", "60", "--mode", "pp")
    longest = json.loads(run(*asked, "--context", "256K", "--json"))["longest_context"]
    assert f"longest context{longest:>10,}  tokens of each of 60 sessions" in run(*asked, "--context", str(longest))
    assert "It does not fit" in run(*asked, "--context", str(longest + 128), status=1)
    said = run("--gpu", "h200:1", "--context", "8K", status=1)
    assert "longest context      none  for one session" in said


def test_what_does_not_fit_says_why_and_what_would_with_status_1():
    said = run("--gpu", "h200:1", "--context", "1M", "--sessions", "7", status=1)
    assert "It does not fit." in said and "\nwhy     h200 0 lacks " in said and "\nchange  it fits with " in said
    assert "speed, as a band" not in said  # of what cannot run nothing is said


def test_json_is_the_plan_that_serve_reads_with_the_other_modes_beside_it():
    found = json.loads(run(*TWO_H200, "--json"))
    assert {p["mode"] for p in (found, *found["others"])} == {"tp", "pp", "ep", "dp", "cp"}
    read = Plan.from_json(json.dumps(found))
    assert (read.mode, read.asked["sessions"]) == (found["mode"], 7)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "plan.json"
    run(*TWO_H200, "--out", str(path))
    found = json.loads(run(*TWO_H200, "--json"))
    written = json.loads(path.read_text())
    assert written == {key: value for key, value in found.items() if key not in ("others", "longest_context")}
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(RequestError, match="name another file"):
        run(*TWO_H200, "--out", str(tmp_path / "none" / "plan.json"))


def test_this_machine_is_planned_for_where_none_is_named():
    said = run("builtin:nano", "--context", "64K")
    assert said.startswith("\nbuiltin:nano on ") and "It fits." in said and "modes" not in said
    assert "operating system" in said and "\ncost\n" not in said


def test_weights_may_be_named_or_be_a_checkpoint(monkeypatch):
    real, opened = Model.open, []

    def recorded(name, weights="native"):
        opened.append((name, weights))
        return real("builtin:nano")

    monkeypatch.setattr(Model, "open", recorded)
    for weights in ("w4a16", "builtin:nano"):
        found = json.loads(run("--gpu", "h200", "--context", "8K", "--json", "--weights", weights))
        assert found["asked"]["model"]["layers"] == 4
    assert opened == [("flash", "w4a16"), ("builtin:nano", "native")]
    with pytest.raises(RequestError, match="a checkpoint is named once"):
        run("pro", "--weights", "builtin:nano")


def test_what_is_asked_for_reaches_the_plan():
    asked = json.loads(
        run(
            "--gpu", "h200:4", "--context", "64K", "--sessions", "3", "--mode", "ep", "--csa-host", "--ram", "512G",
            "--nvme", "2T", "--kv-format", "bf16", "--prefilling", "2", "--parked", "5", "--shared-prefix", "8K",
            "--prompt", "2K", "--output", "100", "--step-tokens", "4096", "--no-drafts", "--numerics", "exact",
            "--cpu", "epyc-9654", "--price", "20", "--json",
        )
    )["asked"]  # fmt: skip
    machine = asked.pop("machine")
    asked.pop("model")
    assert asked == {
        "context": 65_536, "sessions": 3, "mode": "ep", "csa_host": True, "kv_format": "bf16", "prefilling": 2,
        "parked": 5, "shared_prefix": 8_192, "prompt": 2_048, "output": 100, "step_tokens": 4_096, "drafts": False,
        "numerics": "exact",
    }  # fmt: skip
    assert (machine["device"], machine["count"], machine["host"]) == ("h200", 4, "epyc-9654")
    assert (machine["ram_bytes"], machine["nvme_bytes"], machine["usd_hour"]) == (512 << 30, 2 * 10**12, 20.0)


REFUSED = [
    (("--gpu", "h9000"), "no device is called 'h9000'"),
    (("--gpu", "h200:0"), "h200:0"),
    (("--gpu", "h200:-2"), "h200:-2"),
    (("--gpu", ""), "--gpu is ''"),
    (("--context", "0"), "--context is '0'"),
    (("--context", "-5"), "--context is '-5'"),
    (("--context", "nan"), "--context is 'nan'"),
    (("--context", "2M"), "2,097,152"),
    (("--gpu", "h200", "--sessions", "0"), "sessions is 0"),
    (("--gpu", "h200", "--sessions", "-1"), "sessions is -1"),
    (("--gpu", "h200", "--sessions", "999999999999"), "sessions is 999999999999"),
    (("--gpu", "h200", "--prefilling", "-1"), "prefilling is -1"),
    (("--gpu", "h200", "--mode", "zz"), "mode is 'zz'"),
    (("--gpu", "h200", "--kv-format", "int3"), "kv_format is 'int3'"),
    (("--gpu", "h200", "--weights", "q3"), "--weights q3: native, fp8, w4a16, bf16, or a checkpoint"),
    (("--gpu", "h200", "--price", "-3"), "--price is '-3'"),
    (("--gpu", "h200", "--price", "nan"), "--price is 'nan'"),
    (("--gpu", "h200", "--ram", "12"), "a unit is missing"),
    (("--gpu", "h200", "--nvme", "much"), "--nvme is 'much'"),
    (("--gpu", "h200", "--cpu", "h200"), "no processor"),
    (("--gpu", "h200", "--output", "0"), "output is 0"),
    (("--gpu", "h200", "--hardware", "/nowhere.toml"), "--hardware /nowhere.toml cannot be read"),
    (("--gpu", "h200", "--prices", "/nowhere.toml"), "--prices /nowhere.toml cannot be read"),
    (("/nowhere",), "/nowhere"),
    (("--need", "twenty"), "'twenty' was not understood"),
    (("--need", "20 users, 128K", "--gpu", "h200"), "--gpu has no effect with --need"),
    (("--need", "20 users, 128K", "--sweep"), "--sweep and --need were asked for"),
    (("--sweep", "--sessions", "3"), "--sessions has no effect with --sweep"),
    (("--sweep", "--gpu", "h200,,b200"), "between two commas there is nothing"),
    (("--plot", "a.png"), "--plot has no effect here"),
    (("--list", "--gpu", "h200"), "--gpu has no effect with --list"),
    (("--sweep", "--gpu", "h200:2", "--plot", "a.pdf"), "ends in .png or .svg"),
]


@pytest.mark.parametrize(("arguments", "found"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_nonsense_is_refused_in_one_line_that_names_it(arguments, found):
    with pytest.raises(PyrosomeError) as refused:
        run(*arguments)
    assert found in str(refused.value) and "\n" not in str(refused.value)


def test_a_sweep_is_a_table_of_machines_and_contexts_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sweep.svg"
    said = run("--sweep", "--gpu", "h200:1,h200:2", "--context", "128K,1M", "--mode", "pp", "--plot", str(picture))
    rows = [line.split() for line in said.splitlines() if line.startswith("h200:")]
    assert [r[0] for r in rows[:2]] == ["h200:1", "h200:2"]
    assert rows[0][-2:] == ["-", "-"] and "h200:1 at 128K: h200 0 lacks" in said
    assert rows[1][1] == "$9.42" and rows[1][2].endswith("*")
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 100
    assert "<!-- h200:2, $9.42/h -->" in picture.read_text()  # of each text that is drawn as paths


def test_a_sweep_in_which_nothing_fits_ends_with_status_1():
    found = json.loads(run("--sweep", "--gpu", "h200:1", "--context", "1M", "--json", status=1))
    assert [(p["machine"], p["sessions"]) for p in found["points"]] == [("h200:1", 0)]


def test_a_need_is_answered_from_the_price_list_the_cheapest_first(tmp_path):
    prices = tmp_path / "prices.toml"
    entries = (
        f'[[configuration]]\nname = "{n}"\ngpu = "h200:{c}"\nusd_hour = {c}.5\n' for n, c in (("b", 3), ("a", 2))
    )
    prices.write_text("".join(entries))
    said = run("--need", "20 users, 128K, 30 tok/s each", "--prices", str(prices))
    assert re.findall(r"^\w +\$[\d.]+ ", said, re.MULTILINE) == ["a              $2.50 ", "b              $3.50 "]
    assert "needed: 20 sessions of 131,072 tokens, 30 tok/s each" in said and "2 of 2 configurations" in said


def test_a_need_that_nothing_meets_names_the_nearest_and_what_it_lacks(tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text('[[configuration]]\nname = "mine"\ngpu = "h200:2"\nusd_hour = 8.0\n')
    asked = ("--need", "20 users, 128K, $5/h", "--prices", str(prices))
    said = run(*asked, status=1)
    assert "No configuration of the price list gives this" in said
    assert "mine  $8.00/h is $3.00 too much" in said
    found = json.loads(run(*asked, "--json", status=1))
    assert found["need"] == {
        "sessions": 20, "context": 131_072, "tok_s": 0.0, "total_tok_s": 0.0, "first_token_s": None, "usd_hour": 5.0,
    }  # fmt: skip
    assert [o["name"] for o in found["offers"]] == ["mine"] and not found["offers"][0]["surely"]


def test_the_hardware_is_listed_with_its_sources(tmp_path):
    said = run("--list")
    line = next(one for one in said.splitlines() if one.startswith("h200 "))
    assert line.split()[1:3] == ["140.4", "4,800"]
    assert "sources\n" in said and "h200: H200" in said
    found = {d["name"]: d for d in json.loads(run("--list", "--json"))["devices"]}
    assert found["h200"]["memory_bytes"] == 143_771 << 20 and all(d["source"] for d in found.values())


def test_many_places_are_shown_by_the_first_the_fullest_and_the_last(capsys):
    def place(number: int, num_bytes: int) -> Place:
        return Place(f"b200 {number}", 100 << 30, (Item("routed experts", "weights", num_bytes << 30),))

    places = tuple(place(i, n) for i, n in enumerate((10, 20, 70, 30, 40, 50)))
    plan_tables._placed(plan_tables.console(Screen()), made.plan(places=places))
    said = capsys.readouterr().out
    assert next(line.split() for line in said.splitlines() if "b200" in line) == [
        *("b200", "0"),
        *("b200", "2"),
        *("b200", "5"),
    ]
    assert "3 more sorts of devices are between these" in said


def test_the_vendor_s_cells_stand_beside_what_this_engine_holds(monkeypatch):
    cell = {"table": "T1", "name": "teslaa100-3", "weights": "w4a16", "gpus": 3, "mode": "pp", "predicted": 3.017}
    report = {"cells": [cell | {"listed": 3.017, "ours": {"tp": 6, "pp": 19}, "why": "pp: too low"}]}
    monkeypatch.setattr("pyrosome.plan.vendor.report", lambda: report)
    said = run("--vendor")
    row = next(line.split() for line in said.splitlines() if "teslaa100-3" in line)
    assert row == ["T1", "teslaa100-3", "w4a16", "3", "pp", "3.017", "3.017", "6", "19"]
    assert "- pp: too low" in said
    assert json.loads(run("--vendor", "--json")) == report


def test_the_history_says_how_far_plans_were_off(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert "nothing was measured beside a prediction yet" in run("--history")
    assert json.loads(run("--history", "--json")) == {"errors": []}
    for measured in (90.0, 110.0, 125.0):
        keep("decode tok/s", 100.0, measured, "a machine")
    row = next(line for line in run("--history").splitlines() if line.startswith("decode tok/s"))
    assert row.split()[2:6] == ["3", "11.1%", "20.0%", "-9.1%"]
    assert json.loads(run("--history", "--json"))["errors"][0]["count"] == 3


def test_the_documents_show_what_the_commands_print():
    page = PAGE.read_text(encoding="utf-8")
    assert len(commands(page)) >= 5
    assert filled(page) == page, "run: python -m tests.cli.plan_examples"
