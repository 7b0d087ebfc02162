"""How several devices share one model: what each mode splits, and what it keeps whole."""

from __future__ import annotations

import dataclasses

from pyrosome.config import CSA_RATIO, ModelConfig
from pyrosome.errors import RequestError

MODES = ("tp", "pp", "ep", "dp", "cp")
MAX_RANKS = 4096


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
            RequestError: no such mode, no rank, or more than any machine has.
        """
        if mode not in MODES:
            raise RequestError(f"mode is {mode!r}; it is auto or one of {', '.join(MODES)}")
        if not 1 <= ranks <= MAX_RANKS:
            raise RequestError(f"{ranks} devices were asked for; give 1 to {MAX_RANKS:,}, as h200:2")
        n = ranks
        return {
            "tp": cls(mode, n, tensor=n, experts=n),
            "pp": cls(mode, n, layers=n),
            "ep": cls(mode, n, experts=n, replicas=n),  # attention and its sessions are each rank's own
            "dp": cls(mode, n, replicas=n),
            "cp": cls(mode, n, experts=n, context=n),
        }[mode]

    def why_not(self, config: ModelConfig) -> str:
        """Why a model cannot be shared so; "" where it can."""
        limits = [
            (self.layers, config.num_hidden_layers, "pp deals out layers"),
            (self.experts, config.n_routed_experts, f"{self.mode} deals out routed experts"),
            (self.tensor, config.o_groups, "tp cuts attention by its output groups"),
        ]
        if CSA_RATIO in config.layer_ratios:
            limits.append((self.tensor, config.index_n_heads, "tp cuts the indexer by its heads"))
        for ranks, most, what in limits:
            if ranks > most:
                return f"{what}, and the model has {most} for {ranks} devices"
        return ""


def share(num: int, rank: int, ranks: int) -> range:
    """Which of `num` things one of so many ranks has: a run of them, no two runs differing by more than one.

    The runs of 1, 2, 4 and 8 ranks are those of `dist.Mesh.part`.
    """
    return range(-(-num * rank // ranks), -(-num * (rank + 1) // ranks))


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where routed experts and long rows are, when the devices do not hold all.

    Shares are of each layer's routed experts, in whole experts: k / n_routed_experts.
    """

    experts_on_device: float = 1.0  # of a machine without accelerators: in its memory
    experts_in_ram: float = 0.0
    experts_on_nvme: float = 0.0
    csa_on_host: bool = False  # CSA rows in mapped host memory: 512 of them are read per layer and token

    @classmethod
    def of(cls, on_device: int, in_ram: int, num_experts: int, *, csa_on_host: bool = False) -> Placement:
        """So many experts of each layer on the devices, so many in RAM, the rest on NVMe."""
        on_nvme = num_experts - on_device - in_ram
        return cls(on_device / num_experts, in_ram / num_experts, on_nvme / num_experts, csa_on_host)

    def counts(self, num_experts: int) -> tuple[int, int, int]:
        """Whole experts of each layer on the devices, in RAM and on NVMe."""
        on_device = round(self.experts_on_device * num_experts)
        in_ram = round(self.experts_in_ram * num_experts)
        return on_device, in_ram, num_experts - on_device - in_ram
