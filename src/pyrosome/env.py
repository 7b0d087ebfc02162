"""Every environment variable this package reads.  They are diagnostics: what a user wants goes into options."""

from __future__ import annotations

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class Variable:
    """One variable: its name, its default, and what it does."""

    name: str
    default: str
    meaning: str

    def get(self) -> str:
        """Its value now."""
        return os.environ.get(self.name, self.default)


OPS = Variable(
    "PYROSOME_OPS",
    "auto",
    "version of an op that runs: 'torch', or 'op:version' for single ones, by commas; '-version' leaves one out",
)
LOG = Variable("PYROSOME_LOG", "WARNING", "level of log lines: DEBUG, INFO, WARNING or ERROR")
CPU = Variable("PYROSOME_CPU", "auto", "vector instructions of native kernels: auto, portable, avx2 or avx512")
OFFLINE = Variable("PYROSOME_OFFLINE", "0", "1: as `pyrosome --offline`, no connection to another machine is opened")
RANK = Variable("RANK", "", "number of this process among several, as launchers set it; begins its log lines")
ALL = (OPS, CPU, LOG, OFFLINE, RANK)
