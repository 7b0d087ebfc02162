"""Flags of `pyrosome plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyrosome.plan.layout import MODES

WEIGHTS = ("native", "fp8", "w4a16", "bf16")

ModelName = Annotated[
    str, typer.Argument(help="flash, flash-0731, pro, or a checkpoint, of which the headers are read.")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="Devices: a name of --list with a count, as h200:2; here: this machine; none: its processor alone. "
        "With --sweep several, with commas between.",
        show_default="here",
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        help="Tokens of each session, as 131072, 128K or 1M. With --sweep several, with commas between.",
        show_default="128K",
    ),
]
Sessions = Annotated[int | None, typer.Option(help="Sessions that generate at once.", show_default="1")]
Weights = Annotated[
    str, typer.Option(help=f"What is stored: {', '.join(WEIGHTS)}, or a checkpoint, of which the headers are read.")
]
Mode = Annotated[
    str, typer.Option(help=f"How devices share the model: {', '.join(MODES)}; auto: the best of them, all ranked.")
]
CsaHost = Annotated[
    bool,
    typer.Option("--csa-host", help="Keep CSA rows in host memory: of them 512 are read per layer and token."),
]
Cpu = Annotated[
    str | None, typer.Option(help="The host's processor, by its name in --list.", show_default="a usual one")
]
Ram = Annotated[
    str | None,
    typer.Option(help="Memory of the host, as 512G.", show_default="none that may be used; of this machine its own"),
]
Nvme = Annotated[str | None, typer.Option(help="Room on its NVMe drives, as 2T.", show_default="none")]
Price = Annotated[
    str | None, typer.Option(help="Dollars per hour of the whole machine.", show_default="as in the price list")
]
KvFormat = Annotated[str, typer.Option(help="Cache rows: fp8, bf16 or f32.")]
Prefilling = Annotated[int, typer.Option(help="Prompts that are computed at once: each takes a reserve.")]
Parked = Annotated[int, typer.Option(help="Idle sessions that are kept, in RAM first and then on disk.")]
SharedPrefix = Annotated[
    str | None, typer.Option(help="Tokens that all sessions begin with, as 8K: held once.", show_default="none")
]
Prompt = Annotated[
    str | None,
    typer.Option(help="Tokens of a turn that are not in the cache yet, as 2K.", show_default="the whole context"),
]
Output = Annotated[int, typer.Option(help="Tokens of an answer, for what a turn costs.")]
StepTokens = Annotated[
    int, typer.Option(help="Tokens of a prompt that are computed at once.", show_default="8192 on GPUs, 2048 on a CPU")
]
Drafts = Annotated[bool, typer.Option("--drafts/--no-drafts", help="Whether the draft head is held and used.")]
Numerics = Annotated[str, typer.Option(help="Arithmetic that serve is to use: trained or exact.")]
Hardware = Annotated[
    Path | None, typer.Option(help="A TOML file with more devices, as docs/plan.md has it.", show_default="none")
]
Prices = Annotated[Path | None, typer.Option(help="A TOML file of prices in place of the list.", show_default="none")]
Sweep = Annotated[bool, typer.Option("--sweep", help="Every context on each of the machines, as full as it gets.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the sweep into this .png or .svg.", show_default="none")]
Need = Annotated[
    str | None,
    typer.Option(
        help='What is needed, as "20 users, 128K, 30 tok/s each": the cheapest configurations that give it.',
        show_default="none",
    ),
]
List = Annotated[bool, typer.Option("--list", help="The hardware table, with sources.")]
Vendor = Annotated[
    bool, typer.Option("--vendor", help="A hosting vendor's sizing list, reproduced, beside what this engine holds.")
]
History = Annotated[bool, typer.Option("--history", help="How good plans have been here: predicted beside measured.")]
Out = Annotated[Path | None, typer.Option(help="Write the plan there, for `serve --plan`.", show_default="none")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
