"""A launch by Triton's own runtime is what was compiled ahead of time, and numbers never make it compile again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_every_launch_is_compiled_once_as_it_was_ahead_of_time():
    """Up to the compiler: there a device that is not there takes over."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.gpu.as_launched"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    found = json.loads(said.stdout)
    assert found["wrong"] == []
    assert found["kernels"] == found["compiled"] > 100
