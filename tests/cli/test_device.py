"""`--device`: where a model runs, checked before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from pyrosome.cli import server_flags
from pyrosome.cli.engine_flags import load_options
from pyrosome.errors import RequestError
from tests.cli.sessions import REAL, at_terminal, ended, seen

GIB = 1 << 30


def test_the_processor_is_what_is_taken_when_nothing_is_said():
    assert load_options("resident", False, "auto", "cpu") == {}
    assert load_options("resident", False, "auto", "cuda:1") == {"device": "cuda:1"}


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "", "cpu:0"])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(RequestError, match="--device is"):
        load_options("resident", False, "auto", device)


def test_experts_in_files_are_for_the_processor():
    with pytest.raises(RequestError, match="only the CPU reads files in place"):
        load_options("mapped", False, "auto", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["run", "-p", "x"], ["ask", "builtin:ledger", "? falcon"], ["chat"]])
def test_without_a_gpu_commands_say_so(tmp_path, command):
    child = at_terminal(tmp_path, command[0], *command[1:], "--device", "cuda", program=REAL)
    assert ended(child) == 2
    assert "device 'cuda' was asked for and torch cannot use it" in " ".join(seen(child).plain.split())


def test_a_server_s_room_is_what_its_device_has_free(monkeypatch):
    two = {"version": "580", "gpus": [{"memory_free": 3 * GIB}, {"memory_free": 5 * GIB}]}
    monkeypatch.setattr(server_flags, "driver", lambda: two)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [server_flags.memory_for(d) // GIB for d in ("cuda", "cuda:0", "cuda:1", "cuda:2")]
    assert found == [3, 3, 5, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert server_flags.memory_for("cuda") == 5 * GIB
    monkeypatch.setattr(server_flags, "available_memory", lambda: 7 * GIB)
    assert server_flags.memory_for("cpu") == 7 * GIB
