"""`pyrosome pull` as a user runs it, and what is pulled found by its name."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from pyrosome import cli
from pyrosome.cli.terminal import Screen
from pyrosome.errors import PyrosomeError, RequestError
from tests.cli.sessions import REAL, ROOT, at_terminal, environment, piped
from tests.hub.files import REPO, make_source, same_files, shards
from tests.hub.server import COMMIT, PAGE, Fault, loop_hub

pull_command = importlib.import_module("pyrosome.cli.pull")  # the package has the function under that name
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def hub(source):
    with loop_hub(source) as server:
        yield server


THEIRS = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME", "XDG_DATA_HOME", "PYROSOME_OFFLINE")


def clean(**changes):
    """No token, address or switch of whoever runs the tests."""
    return dict.fromkeys(THEIRS) | changes


@pytest.fixture(autouse=True)
def _nothing_of_the_user(monkeypatch):
    for name in THEIRS:
        monkeypatch.delenv(name, raising=False)


def pulling(home, hub, *args, program=REAL):
    return piped(home, "pull", REPO, "--mirror", hub.url, *args, program=program, **clean())


def test_what_is_pulled_is_found_by_its_name(tmp_path, hub, source):
    done = pulling(tmp_path, hub, "--yes")
    place = tmp_path / ".local/share/pyrosome/models" / REPO
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert re.search(r"release +preview: [\d,]+ parameters, 208 tensors of [\d,]+ bytes", said)
    assert "bytes of KV a token" in said and re.search(r"here +a session of 8,192 tokens on .+ tok/s", said)
    assert said.splitlines()[-1].endswith(f"fetched now: {place}")
    assert same_files(source, place, shards(source))
    found = piped(tmp_path, "inspect", REPO, "--json", program=REAL, **clean())
    assert json.loads(found.stdout)["path"] == str(place)


def test_an_address_in_the_environment_is_used_and_json_is_one_object(tmp_path, hub, source):
    changes = clean(HF_ENDPOINT=hub.url)
    done = piped(tmp_path, "pull", REPO, "--yes", "--json", "--to", str(tmp_path / "a"), program=REAL, **changes)
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert told["commit"] == COMMIT and told["fetched_bytes"] == told["file_bytes"] == told["missing_bytes"]
    assert set(told["sha256"]) == set(told["files"])
    assert not any("authorization" in a.headers for a in hub.asked) and not hub.count("harness")


def within(hub, *args):
    """As `pulling`, in this process, which starts in a second's less time; errors are raised."""
    done = CliRunner().invoke(cli.app, ["pull", REPO, "--mirror", hub.url, *args])
    if isinstance(done.exception, PyrosomeError):
        raise done.exception
    return done


def test_a_plan_alone_fetches_nothing(tmp_path, hub):
    done = within(hub, "--plan-only", "--json", "--to", str(tmp_path / "a"))
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["missing_bytes"] == told["file_bytes"] > 0
    assert told["tensor_bytes"] >= told["held_bytes"] > told["expert_bytes"] > 0 and told["free_bytes"] > 0
    assert told["plan"]["fits"] and told["plan"]["asked"]["model"]["name"] == REPO
    assert not (tmp_path / "a").exists()


def test_nobody_to_ask_is_an_error(tmp_path, hub):
    with pytest.raises(RequestError, match="--yes"):
        within(hub, "--to", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("answer", "there"), [("", False), ("y", True)])
def test_at_a_terminal_it_asks(tmp_path, hub, source, answer, there):
    child = at_terminal(
        tmp_path, "pull", REPO, "--mirror", hub.url, "--to", str(tmp_path / "a"), program=REAL, **clean()
    )
    child.expect_exact("[y/N]")
    child.sendline(answer)
    child.wait()
    assert child.exitstatus == 0
    assert (tmp_path / "a" / "SHA256SUMS").exists() is there


def half_way(tmp_path, hub, num_bytes):
    """A process that pulls, once more than so many bytes of a shard are there; and the file that has them."""
    command = [sys.executable, *REAL, "pull", REPO, "--mirror", hub.url, "--to", str(tmp_path / "a"), "--yes", "--json"]
    partial = tmp_path / "a" / f"{SHARD}.partial"
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path, **clean()), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > num_bytes):
        assert child.poll() is None and time.monotonic() < until, child.stderr.read()
        time.sleep(0.005)
    return child, partial


def test_kill_9_half_way_and_a_second_run_goes_on(tmp_path, hub, source):
    hub.faults = [Fault(SHARD, "slow", times=2, at=8192, pause_s=0.02)]
    child, partial = half_way(tmp_path, hub, 16_384)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    had = partial.stat().st_size
    assert not partial.with_name(SHARD).exists() and not (tmp_path / "a" / "SHA256SUMS").exists()
    opened = piped(tmp_path, "inspect", str(tmp_path / "a"), program=REAL, **clean())
    assert opened.returncode == 2
    hub.asked.clear()
    hub.faults = []
    again = pulling(tmp_path, hub, "--yes", "--json", "--to", str(tmp_path / "a"))
    told = json.loads(again.stdout)
    assert again.returncode == 0 and told["there_bytes"] >= had
    assert told["fetched_bytes"] <= told["file_bytes"] - had
    assert same_files(source, tmp_path / "a", shards(source)) and not list((tmp_path / "a").glob("*.partial"))


def test_ctrl_c_keeps_what_came(tmp_path, hub):
    hub.faults = [Fault(SHARD, "slow", at=8192, pause_s=0.02)]
    child, partial = half_way(tmp_path, hub, 8192)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and b"goes on from there" in said and b"Traceback" not in said
    assert partial.stat().st_size > 8192


def test_a_limit_on_the_size_of_files_is_said(tmp_path, hub):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "from pyrosome.cli import main; main()"
    )
    done = pulling(tmp_path, hub, "--yes", "--to", str(tmp_path / "a"), program=("-c", code))
    assert done.returncode == 2 and b"cannot be written (File too large)" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr


def test_what_fails_is_one_sentence_and_status_2(tmp_path, hub):
    hub.faults = [Fault(SHARD, "html")]
    done = pulling(tmp_path, hub, "--yes", "--to", str(tmp_path / "a"))
    assert done.returncode == 2 and b"text/html" in done.stderr and PAGE not in done.stderr
    assert done.stderr.startswith(b"pyrosome: ") and done.stderr.count(b"\n") == 1


def test_a_repository_that_there_is_not_is_said(tmp_path, hub):
    hub.faults = [Fault("/api/", "status", status=404, headers={"X-Error-Code": "RepoNotFound"})]
    with pytest.raises(RequestError, match="no repository of that name"):
        within(hub, "--yes", "--to", str(tmp_path / "a"))


# Without a connection.


def test_offline_says_what_is_there_and_what_is_missing(tmp_path, hub):
    target = str(tmp_path / "a")
    within(hub, "--yes", "--json", "--to", target)
    (tmp_path / "a" / SHARD).unlink()
    hub.asked.clear()
    changes = clean(PYROSOME_OFFLINE="1")
    done = piped(tmp_path, "pull", REPO, "--mirror", hub.url, "--to", target, program=REAL, **changes)
    assert done.returncode == 2 and hub.asked == []
    assert f"missing {SHARD}" in done.stdout.decode() and "9 of 10 files are there and right" in done.stdout.decode()
    assert b"pyrosome pull" in done.stderr


def test_offline_is_content_with_a_whole_checkpoint(tmp_path, hub):
    within(hub, "--yes", "--json", "--to", str(tmp_path / "a"))
    hub.asked.clear()
    done = pulling(tmp_path, hub, "--offline", "--json", "--to", str(tmp_path / "a"))
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"] and set(told["files"].values()) == {"right"} and hub.asked == []


# Names of repositories elsewhere.


@pytest.mark.parametrize("command", [("inspect",), ("run", "-p", "x")])
def test_a_name_that_was_not_pulled_says_how_to(tmp_path, command):
    done = piped(tmp_path, command[0], "deepseek-ai/DeepSeek-V4-Flash", *command[1:], program=REAL, **clean())
    assert done.returncode == 2 and b"`pyrosome pull deepseek-ai/DeepSeek-V4-Flash`" in done.stderr


def test_a_name_that_was_pulled_in_part_says_how_to_go_on(tmp_path, hub):
    hub.faults = [Fault(SHARD, "html", times=10**9)]
    place = tmp_path / "data/pyrosome/models" / REPO
    place.mkdir(parents=True)
    (place / ".pull.json").write_text("{}")
    done = piped(tmp_path, "inspect", REPO, program=REAL, **clean(XDG_DATA_HOME=str(tmp_path / "data")))
    assert done.returncode == 2 and b"in part" in done.stderr and f"`pyrosome pull {REPO}`".encode() in done.stderr


# What is said on the way.


class Ticking:
    """A clock that goes on by a second each time it is looked at."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(
    ("in_place", "said"),
    [
        (True, ["1.0 MiB of 4.0 MiB, 1.0 MiB/s, 0 min 3 s left", "2.0 MiB of 4.0 MiB, 1.0 MiB/s, 0 min 2 s left",
                "1.0 MiB of 4.0 MiB, 682.7 KiB/s, 0 min 4 s left", ""]),
        (False, []),
    ],
)  # fmt: skip
def test_progress_is_written_over_on_a_terminal_and_rare_elsewhere(monkeypatch, in_place, said):
    monkeypatch.setattr(pull_command, "time", Ticking())
    monkeypatch.setattr(pull_command, "can_style", lambda: True)
    screen = Screen()
    screen.err, screen.err_is_terminal = io.StringIO(), in_place
    progress = pull_command._Progress(4 << 20, screen, quiet=False)
    for what in ("fetched", "fetched", "dropped"):
        progress.heard(what, 1 << 20)
    progress.close()
    assert screen.err.getvalue().split("\r\x1b[K")[1:] == said


def test_progress_is_a_line_now_and_then_where_nothing_is_written_over(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr(pull_command, "time", clock)
    screen = Screen()
    screen.err, screen.err_is_terminal = io.StringIO(), False
    progress = pull_command._Progress(4 << 20, screen, quiet=False)
    for _ in range(2):
        clock.now += pull_command.LINE_EVERY_S
        progress.heard("checked", 1 << 20)
    assert screen.err.getvalue() == "1.0 MiB of 4.0 MiB, 0 B/s\n2.0 MiB of 4.0 MiB, 0 B/s\n"


def test_a_machine_it_does_not_fit_on_is_told_what_it_lacks():
    asked = {"context": 131_072, "machine": {"title": "a small one"}}
    plan = {"fits": False, "why_not": "RAM lacks 5 bytes", "change": "5 bytes more RAM", "asked": asked}
    said = pull_command._here({"plan": plan})
    assert said == "a session of 131,072 tokens on a small one does not fit: RAM lacks 5 bytes; 5 bytes more RAM"
    assert pull_command._here({"plan": None, "no_plan": "a GPU not known"}) == "not planned: a GPU not known"
