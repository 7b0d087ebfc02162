"""How several devices share one model: what each mode splits, and what it keeps whole."""

from __future__ import annotations

import dataclasses

from pyrosome.errors import RequestError

MODES = ("tp", "pp", "ep", "dp", "cp")


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Numbers of ranks that share each thing; their mode's own is all of them, the others 1."""

    mode: str
    ranks: int
    tensor: int = 1  # ranks that share every large matrix (experts among them)
    experts: int = 1  # ranks that the routed experts are dealt out to
    layers: int = 1  # pipeline stages
    replicas: int = 1  # groups that hold sessions of their own
    context: int = 1  # ranks that share one session's history

    @classmethod
    def of(cls, mode: str, ranks: int) -> Layout:
        """The layout of a mode.

        Raises:
            RequestError: no such mode, or no rank.
        """
        if mode not in MODES:
            raise RequestError(f"mode is {mode!r}; it is auto or one of {', '.join(MODES)}")
        if ranks < 1:
            raise RequestError(f"{ranks} devices were asked for; give 1 or more, as h200:2")
        n = ranks
        return {
            "tp": cls(mode, n, tensor=n, experts=n),
            "pp": cls(mode, n, layers=n),
            "ep": cls(mode, n, experts=n, replicas=n),  # attention and its sessions are each rank's own
            "dp": cls(mode, n, replicas=n),
            "cp": cls(mode, n, experts=n, context=n),
        }[mode]


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where routed experts and long rows are, when the devices do not hold all."""

    experts_on_device: float = 1.0  # share of each layer's routed experts
    experts_in_ram: float = 0.0
    experts_on_nvme: float = 0.0
    csa_on_host: bool = False  # CSA rows in mapped host memory: 512 of them are read per layer and token
