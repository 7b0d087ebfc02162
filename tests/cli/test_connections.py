"""No command but `pull` opens a connection to another machine, in Python or in native code, asked to or not.

A library that stands before the system's own sees every `connect` and every name that is looked up, in each process a
command starts.  What leads elsewhere than to this machine is written down and refused.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.cli.sessions import ROOT, environment

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="needs the system's loader and a compiler"
)

WATCH = r"""
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static void note(const char *what, const char *where) {
    FILE *f = fopen(getenv("WATCHED"), "a");
    fprintf(f, "%s %s\n", what, where);
    fclose(f);
}

extern "C" int connect(int fd, const struct sockaddr *to, socklen_t size) {
    char text[INET6_ADDRSTRLEN] = "";
    if (to->sa_family == AF_INET) {
        const struct in_addr *a = &((const struct sockaddr_in *)to)->sin_addr;
        inet_ntop(AF_INET, a, text, sizeof text);
    } else if (to->sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)to)->sin6_addr, text, sizeof text);
    }
    if (*text && strncmp(text, "127.", 4) && strcmp(text, "::1")) {
        note("connect", text);
        errno = ECONNREFUSED;
        return -1;
    }
    typedef int (*Real)(int, const struct sockaddr *, socklen_t);
    return ((Real)dlsym(RTLD_NEXT, "connect"))(fd, to, size);
}

extern "C" int getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **found) {
    unsigned char address[16];
    int is_name = host && *host && strcmp(host, "localhost") && inet_pton(AF_INET, host, address) != 1 &&
                  inet_pton(AF_INET6, host, address) != 1;
    if (is_name) {
        note("name", host);
        return EAI_NONAME;
    }
    typedef int (*Real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    return ((Real)dlsym(RTLD_NEXT, "getaddrinfo"))(host, port, hints, found);
}
"""

COMMANDS = """
import json, sys
from pyrosome.cli import app
for args in json.loads(sys.argv[1]):
    try:
        status = app(args, standalone_mode=False)
    except SystemExit as end:
        status = end.code
    assert not status, (args, status)
"""


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    """The library, built."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "watch.cpp").write_text(WATCH)
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-o", str(folder / "watch.so"), str(folder / "watch.cpp"), "-ldl"], check=True
    )
    return folder / "watch.so"


@pytest.fixture
def watched(watch, tmp_path):
    """An environment in which connections are written down, and the file they are written to."""
    log = tmp_path / "connections"
    log.touch()
    # Switches that would keep libraries quiet are taken away: nothing is asked of anybody even so.
    quiet = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "TRANSFORMERS_OFFLINE", "DISABLE_TELEMETRY")
    changes = dict.fromkeys(quiet) | {"LD_PRELOAD": str(watch), "WATCHED": str(log)}
    return environment(tmp_path, **changes), log


def test_the_watch_sees_python_and_native_code(watched):
    env, log = watched
    code = """
import contextlib, ctypes, socket, struct
with contextlib.suppress(OSError):
    socket.create_connection(("192.0.2.1", 80))
with contextlib.suppress(OSError):
    socket.create_connection(("example.org", 80))
to = struct.pack("=HH4s8x", socket.AF_INET, 80, socket.inet_aton("192.0.2.2"))
ctypes.CDLL(None).connect(ctypes.CDLL(None).socket(2, 1, 0), to, 16)
listening = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listening.getsockname())
"""
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert log.read_text().splitlines() == ["connect 192.0.2.1", "name example.org", "connect 192.0.2.2"]


def test_commands_open_no_connection(watched, tmp_path):
    env, log = watched
    (tmp_path / "note.txt").write_text("falcon = 12; heron = 31")
    commands = [
        ["run", "builtin:nano", "-p", "37 + 25", "--max-tokens", "4"],
        ["chat", "builtin:nano", "--max-tokens", "4", "--cache-gib", "0.05"],
        ["ask", str(tmp_path / "note.txt"), "? falcon", "--cache-gib", "0.05"],
        ["inspect", "builtin:nano"],
        ["plan", "--gpu", "h200:2"],
        ["verify", "builtin:nano", "--only", "files,dialect,layers", "--quick"],
        ["doctor", "--json", "--no-speeds"],
        ["--offline", "run", "builtin:nano", "-p", "37 + 25", "--max-tokens", "4"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], env=env, cwd=ROOT, input=b"37 + 25", capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert log.read_text() == ""


def test_a_server_opens_no_connection(watched, tmp_path):
    env, log = watched
    options = ("--port", "0", "--json", "--cache-gib", "0.05")
    command = [sys.executable, "-m", "pyrosome", "serve", "builtin:nano", *options]
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            url = json.loads(server.stdout.readline())["url"]
            body = {"model": "builtin:nano", "messages": [{"role": "user", "content": "37 + 25"}], "max_tokens": 4}
            request = urllib.request.Request(
                f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"]
        finally:
            server.send_signal(signal.SIGTERM)
    assert log.read_text() == ""


@pytest.mark.parametrize(("before", "changes"), [(["--offline"], {}), ([], {"PYROSOME_OFFLINE": "1"})])
def test_offline_forbids_connections_to_whatever_a_command_would_call(tmp_path, before, changes):
    code = f"""
import socket
from pyrosome.cli import app
from pyrosome.errors import RequestError
app([*{before!r}, "inspect", "builtin:nano", "--json"], standalone_mode=False)
try:
    socket.create_connection(("192.0.2.1", 80), timeout=0.01)
except RequestError as refused:
    print(refused)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path, **changes), capture_output=True)
    assert b"192.0.2.1 port 80 was asked for and --offline forbids it" in done.stdout.splitlines()[-1], done.stderr
