"""Kernels on what there is: a GPU, or Triton's interpreter on the CPU, which takes the branches of two capabilities."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.seam import Op, use
from pyrosome.testing.equal import same_bits as same_bits

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# In the interpreter: products of decoded values (A100), and of codes (H100 and later).
CAPABILITIES = (0,) if DEVICE.type == "cuda" else (80, 90)


@contextlib.contextmanager
def kernels(op: Op, capability: int = 90) -> Iterator[None]:
    """`op` runs its Triton kernel in the block."""
    with use(op, "triton"), gpu.pretend(capability), torch.no_grad():
        yield


def rms(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative to what was wanted."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def ahead(op: str, *capabilities: int) -> list[dict[str, Any]]:
    """What `pyrosome.testing.ahead` says of a module of calls, in a process that compiles and does not interpret."""
    asked = [part for c in capabilities for part in ("--capability", str(c))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pyrosome.testing.ahead", "--op", op, "--json", *asked]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert said.stdout, said.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(said.stdout)
    return found
