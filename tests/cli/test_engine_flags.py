"""Flags of `run` and `chat` for the engine: what it may use, and what it says of its work."""

from __future__ import annotations

import json
import re

import pytest

from pyrosome.cli.engine_flags import engine_options
from pyrosome.errors import RequestError
from pyrosome.options import EngineOptions
from tests.cli.sessions import REAL, piped

FLAGS = ("--cache-gib", "--drafter", "--log-every", "--trace")


def options(home, command, *flags):
    """The engine's options that come of flags."""
    more = ("-p", "options") if command == "run" else ()
    done = piped(home, command, "builtin:nano", *more, *flags, stdin=b"options")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, b"closed"), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", ["run", "chat"])
def test_help_shows_the_flags(tmp_path, command):
    shown = piped(tmp_path, command, "--help", program=REAL, COLUMNS="200").stdout.decode()
    assert all(flag in shown for flag in FLAGS)
    assert "auto, mtp, lookup, off" in shown and "ui.perfetto.dev" in shown


@pytest.mark.parametrize("command", ["run", "chat"])
def test_flags_become_the_engine_s_options_and_the_engine_is_closed(tmp_path, command):
    plain = options(tmp_path, command)
    assert EngineOptions(**plain) == EngineOptions()
    trace = str(tmp_path / "new" / "out.json")
    given = ("--cache-gib", "0.25", "--drafter", "lookup", "--log-every", "7", "--trace", trace)
    assert options(tmp_path, command, *given) == {
        **plain, "cache_bytes": 1 << 28, "drafter": "lookup", "log_every": 7, "trace_path": trace
    }  # fmt: skip


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--drafter", "magic"), "drafter is 'magic'; it is one of auto, mtp, lookup, off"),
        (("--cache-gib", "0"), "--cache-gib is 0.0"),
        (("--log-every", "-1"), "log_every is -1"),
        (("--trace", "."), "it is a folder; name a file in it"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2_before_anything_is_loaded(tmp_path, command, flags, said):
    done = piped(tmp_path, command, "/no/such/model", *flags, stdin=b"hello")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"pyrosome: ") and done.stderr.count(b"\n") == 1
    assert said in done.stderr.decode()


@pytest.mark.parametrize("gib", [-1.0, float("nan"), float("inf"), 1e-12])
def test_a_cache_of_no_size_is_refused(gib):
    with pytest.raises(RequestError, match=r"--cache-gib is .* above 0 was expected"):
        engine_options(gib, "auto", 0, None)


def test_run_writes_its_trace_and_logs_every_so_many_steps(tmp_path, noise_checkpoint):
    done = piped(
        tmp_path, "run", str(noise_checkpoint), "--max-tokens", "12", "--drafter", "off", "--log-every", "4",
        "--trace", str(tmp_path / "out.json"), program=REAL, PYROSOME_LOG="ERROR",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    lines = re.findall(
        r"^\S+ I pyrosome\.engine\.engine: 1 running, 0 waiting; .*$", done.stderr.decode(), re.MULTILINE
    )
    assert len(lines) == 2, "the twelfth step ends the request"
    events = json.loads((tmp_path / "out.json").read_text())
    assert sum(e["name"] == "step" for e in events) == 12
    assert [e["args"]["tokens"] for e in events if e["name"] == "output"] == [12]


def test_chat_writes_its_trace(tmp_path):
    done = piped(
        tmp_path, "chat", "builtin:nano", "--max-tokens", "4", "--trace", str(tmp_path / "out.json"), stdin=b"hello",
        program=REAL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert any(e["name"] == "output" for e in json.loads((tmp_path / "out.json").read_text()))
