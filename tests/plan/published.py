"""What deployments of DeepSeek-V4-Flash were published to reach, by whatever engine: `shared/design/planner.md`, 3.

Rates are tokens per second, prompts in tokens, times in seconds.
"""

import dataclasses

from pyrosome.config import ModelConfig
from pyrosome.plan.hardware import device, machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.plan import Band
from pyrosome.plan.speed import coefficients_for, prompt_time, step_time
from pyrosome.plan.work import Load

FLASH = Model.of(ModelConfig.preset("flash"), 1, name="flash")
ACCEPTED = Band(0.5, 0.75, 0.9)  # share of MTP drafts, as plans take it
CONTEXT = 4096
RESIDENT = Placement()
IN_RAM = Placement(0.0, 1.0)
SOME_IN_RAM = Placement(230 / 256, 26 / 256)  # so many experts of each layer fit one H200 beside the rest
LAYERS_IN_RAM = Placement(24 / 43, 19 / 43)


def smaller(expert_bits: float, dense_bits: float) -> Model:
    """Flash with so many bits for each weight of its experts, and of its other FP8 matrices."""

    def num_bytes(t):
        if t.expert >= 0:
            return int(t.numel * expert_bits / 8)
        return int(t.numel * dense_bits / 8) if t.dtype == "F8_E4M3" else t.stored_bytes

    return dataclasses.replace(
        FLASH, tensors=tuple(dataclasses.replace(t, stored_bytes=num_bytes(t)) for t in FLASH.tensors)
    )


def _beside(gpu, host_name, read=None, count=1):
    host = device(host_name)
    host = dataclasses.replace(host, read_bytes_s=count * host.read_bytes_s if read is None else read)
    return dataclasses.replace(machine(gpu), host=host)


def _epyc_9v45():
    """A part of one: 32 cores, whose memory was measured by its owner at 186 GB/s."""
    whole = device("epyc-9v45")
    part = dataclasses.replace(whole, read_bytes_s=186e9)
    return dataclasses.replace(machine("epyc-9v45", ram="512G"), device=part, host=part)


@dataclasses.dataclass(frozen=True)
class Published:
    """One point, with what was not published and is taken to be so in its name."""

    name: str
    low: float
    high: float
    machine: object
    mode: str = "tp"
    drafts: int = 0
    placement: Placement = RESIDENT
    model: Model = FLASH
    prompt: int = 0  # tokens; 0: decoding one sequence
    unit: str = "tok/s"

    def predicted(self) -> Band:
        c = coefficients_for(self.machine)
        layout = Layout.of(self.mode, self.machine.count)
        low, high = c.band
        if self.prompt:
            seconds = prompt_time(self.model, self.machine, layout, self.placement, self.prompt, c).seconds
            if self.unit == "s":
                return Band(seconds * low, seconds, seconds * high)
            return Band(*(self.prompt / seconds / factor for factor in (high, 1, low)))
        load = Load(1, 1 + self.drafts, CONTEXT, head_rows=1 + self.drafts, drafts=self.drafts)
        seconds = step_time(self.model, self.machine, layout, self.placement, load, c).seconds
        given = (ACCEPTED.low, ACCEPTED.mid, ACCEPTED.high) if self.drafts else (0.0, 0.0, 0.0)
        return Band(*((1 + a) / seconds / factor for a, factor in zip(given, (high, 1, low), strict=True)))


POINTS = (
    Published("4x H200, MTP", 266, 297, machine("h200:4"), drafts=1),
    Published("8x B200, no drafts", 230, 263, machine("b200:8")),
    Published("2x DGX Spark, MTP", 38, 38, machine("gb10:2"), drafts=1),
    Published("GB10, 2 bits", 18, 21, machine("gb10"), model=smaller(2.3, 8)),
    Published("M3 Ultra, 4 bits", 35.5, 35.5, machine("m3-ultra-512"), model=smaller(4.5, 4.5)),
    Published("RTX 5090, experts in 8 channels of DDR4", 24.5, 26.9, _beside("rtx-5090", "epyc-7543"),
              placement=IN_RAM),
    Published("RTX PRO 6000, 24 layers' experts resident, 8 channels of DDR4", 42.4, 42.4,
              _beside("rtx-pro-6000", "epyc-7543"), placement=LAYERS_IN_RAM),
    Published("RTX PRO 6000, experts in 2x EPYC 9B14", 30, 30, _beside("rtx-pro-6000", "epyc-9b14", count=2),
              placement=IN_RAM),
    Published("EPYC 9V45, 4 bits", 9.7, 9.7, _epyc_9v45(), model=smaller(4.5, 4.5)),
    Published("EPYC 9V45, 4 bits, prompt of 4,096", 70, 70, _epyc_9v45(), model=smaller(4.5, 4.5), prompt=4096),
    Published("1x H200, experts beyond its memory in RAM", 70, 70, machine("h200"), placement=SOME_IN_RAM),
    Published("8x B200, prompt of 1M", 26_700, 26_700, machine("b200:8"), prompt=1 << 20),
    Published("2x DGX Spark, prompt of 900K", 875, 875, machine("gb10:2"), prompt=900_000),
    Published("8x A100, first token of 512K", 74.8, 74.8, machine("a100-80:8"), prompt=512 << 10, unit="s"),
)  # fmt: skip
# Both of other engines, and why is a guess: one may read the experts of two sockets across them; of the other its users
# report an idle memory bus.
OUTSIDE = {"RTX PRO 6000, experts in 2x EPYC 9B14", "EPYC 9V45, 4 bits, prompt of 4,096"}


def table() -> tuple[str, set[str]]:
    """All points beside the bands, as text, and the names of those that lie outside."""
    lines, outside = [f"{'':64s}{'published':>18s}{'band by specifications alone':>40s}"], set()
    for p in POINTS:
        band = p.predicted()
        inside = band.low <= p.high and p.low <= band.high
        if not inside:
            outside.add(p.name)
        found = f"{p.low:,g} to {p.high:,g}" if p.high > p.low else f"{p.low:,g}"
        said = f"{band.low:,.1f} .. {band.mid:,.1f} .. {band.high:,.1f} {p.unit:5s}"
        lines.append(f"{p.name:64s}{found:>18s}{said:>40s}{'' if inside else '  OUTSIDE'}")
    return "\n".join(lines), outside
