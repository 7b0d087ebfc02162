"""`pyrosome serve`: what its flags mean, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.cli import app
from pyrosome.cli.pointers import pointers
from pyrosome.cli.serve import _Said
from pyrosome.cli.server_flags import KV_FORMATS, LEAST_BYTES, NUMERICS, USUAL_BYTES, cache_size
from pyrosome.errors import CheckpointError, PyrosomeError, RequestError
from pyrosome.model.numerics import NUMERICS as REAL_NUMERICS
from pyrosome.options import EngineOptions, LoadOptions, ServerOptions
from pyrosome.testing.full_vocabulary import full_vocabulary
from tests.cli.sessions import ROOT
from tests.server.processes import LONG, is_alive, served
from tests.server.scripted import events_of, until
from tests.server.wires import Wire, post

CHAT = "/v1/chat/completions"
TOKENIZER = ROOT / "tests" / "data" / "tokenizer"
SHORT = {"messages": [{"role": "user", "content": "? falcon"}], "max_tokens": 4, "thinking": {"type": "disabled"}}
ENDLESS = {**SHORT, "max_tokens": 200_000, "ignore_eos": True, "stream": True}


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """Runs the command up to where it would serve; gives the service and its sockets."""
    found = []

    def instead(service, sockets, when_ready):
        for made in sockets:
            made.close()
        found.append((service, service._make_driver))
        service.door.close()

    monkeypatch.setattr("pyrosome.server.run.serve", instead)

    def run(*arguments: str):
        found.clear()
        result = CliRunner().invoke(app, ["serve", "--state", str(tmp_path), "--port", "0", *arguments])
        if isinstance(result.exception, PyrosomeError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return found[0][0]

    return run


def test_every_option_of_a_server_has_a_flag(taken, tmp_path):
    flags = {
        "host": ("--host", "localhost"), "names": ("--name", "a", "--name", "b"), "any_name": ("--exact-names",),
        "compat": ("--compat", "deepseek"), "thinking": ("--no-thinking",), "effort": ("--effort", "max"),
        "reasoning_field": ("--reasoning-field",), "max_queue": ("--max-queue", "7"), "deadline_s": ("--deadline", "9"),
        "keep_alive_s": ("--keep-alive", "3"), "drain_s": ("--drain", "5"), "max_body_bytes": ("--max-body-mib", "1"),
        "cors": ("--cors", "https://a.example"), "hosts": ("--allow-host", "box"), "keys": ("--keys", "off"),
        "sign_up": ("--sign-up",), "usage_days": ("--usage-days", "9"), "prices": ("--price", "1,0.1,2"),
    }  # fmt: skip
    wanted = {
        "host": "localhost", "names": ("a", "b"), "any_name": False, "compat": "deepseek", "thinking": False,
        "effort": "max", "reasoning_field": True, "max_queue": 7, "deadline_s": 9, "keep_alive_s": 3, "drain_s": 5,
        "max_body_bytes": 1 << 20, "cors": ("https://a.example",), "hosts": ("box",), "keys": "off", "sign_up": True,
        "usage_days": 9, "prices": (1_000_000, 100_000, 2_000_000),
    }  # fmt: skip
    elsewhere = {"port", "state_path", "database_url", "tls_certificate", "tls_key"}
    patience = {"max_header_bytes", "header_s", "body_s", "write_s"}
    assert set(wanted) | elsewhere | patience == set(ServerOptions.__dataclass_fields__)
    options = taken(*(a for flag in flags.values() for a in flag)).options
    for name, value in wanted.items():
        assert getattr(options, name) == value != getattr(ServerOptions(), name), name
    assert options.state_path == str(tmp_path)


def test_every_option_of_an_engine_that_a_server_may_want_has_a_flag(taken, tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr("pyrosome.server.service.EngineProcess", lambda factory, arguments: made.update(arguments))
    service = taken(
        "--numerics", "exact", "--kv-format", "bf16", "--cache-gib", "0.5", "--sequences", "3", "--context", "999",
        "--drafter", "off", "--experts", "mapped", "--lock-memory", "--numa", "off", "--log-every", "5",
        "--disk", str(tmp_path / "disk"), "--trace", str(tmp_path / "trace.json"), "--tokenizer",
        str(open_checkpoint("builtin:nano").path),
    )  # fmt: skip
    service._make_driver()
    tokenizer = made.pop("tokenizer_path")
    assert tokenizer == str(open_checkpoint("builtin:nano").path / "tokenizer.json")
    assert made == {
        "path": "builtin:nano", "numerics": "exact", "kv_format": "bf16", "cache_bytes": 1 << 29, "max_sequences": 3,
        "max_context": 999, "drafter": "off", "experts": "mapped", "lock_memory": True, "numa": "off", "log_every": 5,
        "disk_path": str(tmp_path / "disk"), "trace_path": str(tmp_path / "trace.json"),
    }  # fmt: skip
    unasked = {"snapshot_bytes", "host_bytes", "disk_bytes", "step_tokens", "max_drafts", "self_check"}
    known = set(EngineOptions.__dataclass_fields__) | set(LoadOptions.__dataclass_fields__)
    assert known - unasked == set(made) - {"path", "numerics", "kv_format"}


def test_numerics_and_rows_are_those_the_loader_knows():
    assert {n.name: n.default_kv_format for n in REAL_NUMERICS.values()} == NUMERICS
    assert set(NUMERICS.values()) < set(KV_FORMATS)


REFUSED = [
    (("--compat", "openai"), "compat is 'openai'"),
    (("--effort", "hard"), "effort is 'hard'"),
    (("--keys", "maybe"), "keys is 'maybe'"),
    (("--keep-alive", "0"), "keep_alive_s is 0"),
    (("--deadline", "-1"), "deadline_s is -1"),
    (("--sequences", "0"), "max_sequences is 0"),
    (("--context", "-1"), "max_context is -1"),
    (("--cache-gib", "-1"), "cache-gib is -1"),
    (("--cache-gib", "0"), "cache-gib is 0"),
    (("--drafter", "best"), "drafter is 'best'"),
    (("--experts", "far"), "experts is 'far'"),
    (("--numerics", "fast"), "--numerics is 'fast'"),
    (("--kv-format", "int4"), "--kv-format is 'int4'"),
    (("--dialect", "swiss"), "--dialect is 'swiss'"),
    (("--max-body-mib", "0"), "max_body_bytes is 0"),
    (("--price", "1,2"), "--price is '1,2'"),
    (("--tls-certificate", "a.pem"), "TLS needs both"),
    (("--tls-certificate", "/nowhere.pem", "--tls-key", "/nowhere.pem"), "cannot be used together"),
    (("--host", "no.such.host.invalid"), "no such address"),
    (("--host", "192.0.2.1", "--keys", "off"), "cannot be had"),
    (("--host", "0.0.0.0"), "there is no key yet"),
    (("--keys", "required"), "there is no key yet"),
    (("--tokenizer", "/nowhere"), "/nowhere"),
    (("--tokenizer", str(TOKENIZER)), "do not belong together"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_cannot_be_is_said_before_anything_is_loaded(taken, arguments, said):
    with pytest.raises((RequestError, CheckpointError), match=re.escape(said)) as error:
        taken(*arguments)
    assert "\n" not in str(error.value)


def test_an_address_open_to_others_is_served_once_there_is_a_key(taken, tmp_path):
    made = CliRunner().invoke(app, ["keys", "create", "first", "--state", str(tmp_path)])
    assert made.exit_code == 0, made.output
    assert taken("--host", "0.0.0.0").door.is_needed
    assert not taken().door.is_needed


def test_who_may_use_it_is_told(taken):
    def told(*arguments):
        return " ".join(_Said(taken(*arguments), socket.socket(), as_json=False)._about_keys())

    assert told() == "No key is needed; clients that want one may send any."
    assert "Whoever reaches 0.0.0.0 may use it" in told("--host", "0.0.0.0", "--keys", "off")
    assert "Any web page" in told("--cors", "*")


def test_a_port_in_use_is_said_in_one_line_with_status_2(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ran = subprocess.run(
            [sys.executable, "-m", "pyrosome", "serve", "--port", str(port), "--state", str(tmp_path)],
            capture_output=True, text=True, timeout=LONG, check=False,
        )  # fmt: skip
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert f"port {port} of 127.0.0.1 cannot be had: something listens there already" in ran.stderr


GIB = 1 << 30


def test_a_cache_takes_half_of_what_the_weights_leave_and_no_more_than_is_of_use():
    nano = open_checkpoint("builtin:nano")

    def size(available, **changes):
        return cache_size(nano, "fp8", 8, changes.pop("context", 0), available, mapped=False)

    assert size(64 * GIB).num_bytes == USUAL_BYTES, "small weights get the usual size"
    assert size(0).num_bytes == USUAL_BYTES
    little = size(3 * GIB)
    assert little.num_bytes == (3 * GIB - nano.nbytes - 2 * GIB) // 2 and "half of what" in little.reason
    assert size(GIB).num_bytes == LEAST_BYTES
    short = size(64 * GIB, context=100_000)
    assert LEAST_BYTES < short.num_bytes < USUAL_BYTES / 4 and "8 sequences of 100,000 tokens" in short.reason


NAMES = ["builtin:nano", "deepseek-ai/DeepSeek-V4-Flash", "a \"name\" with 'quotes' and 中文"]


@pytest.mark.parametrize("model", NAMES)
def test_what_can_be_pasted_can_be_read_by_whom_it_is_for(model):
    text = pointers("http://127.0.0.1:8000", model, key="KEY")
    parts = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            title = line.rstrip(":")
            parts[title] = []
        else:
            parts[title].append(line[4:])
    parts = {title: "\n".join(lines).strip() for title, lines in parts.items()}
    for title in ("OpenAI, Python", "Anthropic, Python"):
        compile(parts[title], title, "exec")
        assert "http://127.0.0.1:8000" in parts[title]
    opencode = json.loads(parts["opencode, in opencode.json"])
    provider = opencode["provider"]["pyrosome"]
    assert provider["options"] == {"baseURL": "http://127.0.0.1:8000/v1", "apiKey": "KEY"}
    assert opencode["model"] == f"pyrosome/{model}" and list(provider["models"]) == [model]
    codex = tomllib.loads(parts["Codex, in ~/.codex/config.toml"])
    assert codex["model"] == model
    assert codex["model_providers"][codex["model_provider"]] == {
        "name": "pyrosome", "base_url": "http://127.0.0.1:8000/v1", "wire_api": "responses", "env_key": "PYROSOME_KEY",
    }  # fmt: skip
    curl = shlex.split(parts["curl"].replace("\\\n", " "))
    assert json.loads(curl[-1])["model"] == model
    claude = dict(word.partition("=")[::2] for word in shlex.split(parts["Claude Code"].replace("\\\n", " "))[:-1])
    assert claude["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8000"
    assert claude["ANTHROPIC_MODEL"] == claude["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == model


# As processes, with real signals


def stream(server, body=ENDLESS):
    """A stream that has begun: its connection, and what came so far is thrown away."""
    wire = Wire(server.port).send(post(body))
    wire.socket.settimeout(LONG)
    assert wire.until(b"\r\n").endswith(b"200 OK")
    wire.until(b"content")
    return wire


def rest_of(wire):
    """What else comes, until the server closes."""
    data = wire.rest
    while more := wire.socket.recv(1 << 16):
        data += more
    return data.decode()


def test_reas_13_it_says_where_to_point_clients_and_in_which_mode_they_are_answered(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pyrosome",
        "serve",
        "--port",
        "0",
        "--state",
        str(tmp_path),
        "--cache-gib",
        "0.06",
    ]
    process = subprocess.Popen([*command, "--effort", "max"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        said = ""
        while "Codex" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG) == 0
        said += process.stderr.read()
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
    assert "answers as builtin:nano" in said and "No key is needed" in said
    assert "Context " in said and "answered in mode max" in said
    assert "A page to talk on: http://127.0.0.1:" in said
    assert "Traceback" not in said


def test_idle_it_ends_at_once_and_its_engine_with_it(tmp_path):
    with served(state=tmp_path) as server:
        with server.client() as client:
            assert client.post(CHAT, json=SHORT).status_code == 200
            assert client.get("/health").json()["status"] == "ready"
        assert server.ready["mode"] == "high" and server.ready["model"] == "builtin:nano"
        assert not server.ready["key_needed"] and server.ready["context_tokens"] > 1000
        engine = server.engine
        assert is_alive(engine)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        assert not is_alive(engine)
        assert "Traceback" not in "".join(server.log)


def test_at_the_first_signal_what_runs_goes_on_and_nothing_new_is_taken(tmp_path):
    with served(state=tmp_path) as server, server.client() as client:
        wire = stream(server, {**ENDLESS, "max_tokens": 1500})
        server.signal(signal.SIGTERM)
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["status"] == "draining"
        refused = client.post(CHAT, json=SHORT)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1 and refused.headers["connection"] == "close"
        text = rest_of(wire)
        assert '"finish_reason":"length"' in text and "[DONE]" in text and '"error"' not in text
        assert server.ended() == 0


def test_when_the_time_is_over_streams_are_told_and_who_reads_nothing_holds_nobody_up(tmp_path):
    with served("--drain", "1", state=tmp_path) as server:
        reader = stream(server)
        deaf = Wire(server.port, receive_bytes=4096).send(post(ENDLESS))
        whole = Wire(server.port).send(post({**ENDLESS, "stream": False}))
        idle = Wire(server.port)
        time.sleep(0.3)
        server.signal(signal.SIGTERM)
        text = rest_of(reader)
        last = events_of(text.partition("\r\n")[2].replace("\r\n", "\n"))
        assert "the server is shutting down" in text and "[DONE]" in text, last[-3:]
        status, headers, body = whole.answer()
        assert status == 503 and "shutting down" in json.loads(body)["error"]["message"] and headers["retry-after"]
        began = time.monotonic()
        assert server.ended() == 0
        assert time.monotonic() - began < 30
        for wire in (reader, deaf, whole, idle):
            wire.close()
        assert "Traceback" not in "".join(server.log)


def test_the_second_signal_ends_it_at_once(tmp_path):
    with served("--drain", "3600", state=tmp_path) as server:
        wires = [stream(server) for _ in range(2)]
        server.signal(signal.SIGINT)
        texts: list[str] = []
        threads = [threading.Thread(target=lambda w=w: texts.append(rest_of(w))) for w in wires]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert server.process.poll() is None, "the first one waits for what runs"
        server.signal(signal.SIGINT)
        assert server.ended() == 0
        for thread in threads:
            thread.join(LONG)
        assert len(texts) == 2 and all("the server is shutting down" in text for text in texts)
        for wire in wires:
            wire.close()


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def test_a_signal_while_the_model_is_loaded_ends_both(tmp_path):
    with served(state=tmp_path, ready=False) as server:
        until(lambda: server.engine and b"-c" in command_of(server.engine), LONG)  # it has become what it is to be
        engine = server.engine
        os.kill(engine, signal.SIGSTOP)  # it would take for ever
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        assert not is_alive(engine)


def test_a_model_that_cannot_be_loaded_is_said_in_words_with_status_2(tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(open_checkpoint("builtin:nano").path, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    with served(state=tmp_path / "state", model=str(broken), ready=False) as server:
        assert server.ended() == 2
        assert server.process.stdout.read() == ""
        assert "pyrosome: " in server.log[-1] and "Traceback" not in "".join(server.log)


def test_weights_without_a_tokenizer_are_served_with_another_directorys(tmp_path):
    """The official vocabulary on generated weights; the grammar of an answer is of that tokenizer too."""
    model = full_vocabulary(tmp_path / "model", TOKENIZER / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (model / name).unlink(missing_ok=True)
    flags = ("--tokenizer", str(TOKENIZER), "--dialect", "0731", "--compat", "deepseek", "--name", "flash")
    with served(*flags, state=tmp_path / "state", model=str(model)) as server, server.client() as client:
        assert server.ready["model"] == "flash"
        body = {"messages": [{"role": "user", "content": "Grüße aus 深海, as json"}], "reasoning_effort": "max"}
        shown = client.post(f"{CHAT}/render", json=body).json()
        assert shown["prompt"].startswith("<｜begin▁of▁sentence｜>Reasoning Effort: Beyond maximum")
        assert shown["token_ids"][0] == 0 and shown["token_ids"][-1] == 128_821
        asked = {
            **body, "thinking": {"type": "disabled"}, "max_tokens": 40,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {
                "type": "object", "properties": {"a": {"type": "string", "enum": ["b", "c"]}}, "required": ["a"],
                "additionalProperties": False}}},
        }  # fmt: skip
        answer = client.post(CHAT, json=asked).json()
        assert "choices" in answer, answer
        assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("b", "c")
