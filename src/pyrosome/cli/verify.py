"""`pyrosome verify`: whether these weights, on this machine, compute what they should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli import machine
from pyrosome.cli.first_contact import MODEL_HELP
from pyrosome.cli.terminal import CHECK_FAILED, INTERRUPTED, Screen, can_style, printable
from pyrosome.errors import RequestError
from pyrosome.hub.offline import go_offline

if TYPE_CHECKING:
    from pyrosome.verify.finding import Finding, Wanted
    from pyrosome.verify.receipt import Record

_COLOURS = {"ok  ": "\x1b[32m", "look": "\x1b[33m", "FAIL": "\x1b[1;31m", "-   ": "\x1b[2m"}
MAX_SEED = 2**63 - 1


def verify(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples of everything.")] = False,
    only: Annotated[str, typer.Option(help="Run these checks alone, by commas.")] = "",
    skip: Annotated[str, typer.Option(help="Leave these checks out, by commas.")] = "",
    seed: Annotated[int, typer.Option(help="Of samples, ids and prompts.")] = 0,
    numerics: Annotated[
        str, typer.Option(help="Arithmetic of the checks that run the model: exact or trained.")
    ] = "trained",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu or cuda.")] = "cpu",
    logprobs: Annotated[
        Path | None, typer.Option(help="Official logprobs to compare with, JSON or JSON lines.")
    ] = None,
    checksums: Annotated[
        Path | None, typer.Option(help="'sha256  name' lines; left out: SHA256SUMS beside the shards.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Directory of tokenizer.json, if not the model's.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="Directory for receipt.json and receipt.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: the receipt.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="No connection to another machine (nothing here asks for one).")
    ] = False,
) -> None:
    """Check the files, values, tokenizer and computation of a model, and write a receipt.

    Exit status 1 where something is wrong.  Ctrl-C ends it, and the receipt holds what was found until then.
    """
    from pyrosome.verify import receipt as receipts
    from pyrosome.verify.finding import Wanted
    from pyrosome.verify.run import chosen, run

    if offline:
        go_offline()
    names = chosen(_names("--only", only) or None, _names("--skip", skip))
    for option, file, check in (("--logprobs", logprobs, "logprobs"), ("--checksums", checksums, "files")):
        if file is not None and check not in names:
            raise RequestError(f"{option} is for the check {check}, which is not to run; leave it out, or run {check}")
    _check_arguments(seed, numerics, device, logprobs, checksums, tokenizer)
    _check_model(model)
    if receipt is not None:
        receipts.prepare(receipt)
    screen = Screen()
    wanted = Wanted(
        model, quick, seed, numerics, logprobs, checksums, tokenizer, device, None if as_json else _progress(screen)
    )
    record = receipts.Record(wanted, names)
    try:
        for finding in record.watched(run(wanted, names)):
            if not as_json:
                _print(finding, screen)
    except KeyboardInterrupt:  # hours may have gone by: what was found is kept
        record.interrupted = True
    told = record.as_dict(_about(wanted))
    if receipt is not None:
        paths = receipts.write(receipt, told)
        screen.notice(f"receipt: {paths[0]} and {paths[1]}")
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False))
    else:
        _conclude(record, screen)
    if not record.ok:
        raise typer.Exit(INTERRUPTED if record.interrupted else CHECK_FAILED)


def _names(option: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if text and not names:
        raise RequestError(f"{option} is {text!r}; names of checks by commas are expected")
    return names


def _check_arguments(
    seed: int, numerics: str, device: str, logprobs: Path | None, checksums: Path | None, tokenizer: Path | None
) -> None:
    """Refuse what no check could use.

    Raises:
        RequestError: a number, name, file or directory that is not one.
    """
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"--seed is {seed}; an integer from 0 to {MAX_SEED} is expected")
    if numerics not in ("exact", "trained"):
        raise RequestError(f"--numerics is {numerics!r}; there are exact and trained")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise RequestError(f"--device is {device!r}; there are cpu, cuda and cuda:N")
    if device != "cpu":
        import torch

        if (count := torch.cuda.device_count()) <= int(device.partition(":")[2] or 0):
            raise RequestError(f"--device is {device!r} and torch finds {count} of its kind here; leave it out for cpu")
    for option, file in (("--logprobs", logprobs), ("--checksums", checksums)):
        if file is not None and not file.is_file():
            raise RequestError(f"{option} names {file}, which is not a file")
    if checksums is not None:
        from pyrosome.verify.files import read_sums

        read_sums(checksums)
    if logprobs is not None:
        from pyrosome.verify.recorded import read_vectors

        read_vectors(logprobs)
    if tokenizer is not None and not tokenizer.is_dir():
        raise RequestError(f"--tokenizer names {tokenizer}, which is not a directory; name the one of tokenizer.json")


def _check_model(model: str) -> None:
    from pyrosome.verify.files import folder_of

    if not any(folder_of(model).glob("*.safetensors")) and not (folder_of(model) / "config.json").exists():
        raise RequestError(
            f"{folder_of(model)} holds neither config.json nor .safetensors files; name the directory of a checkpoint"
        )


def _about(wanted: Wanted) -> dict[str, Any]:
    """What a receipt says of model, machine and versions."""
    from pyrosome.checkpoint.fingerprint import fingerprint
    from pyrosome.checkpoint.index import open_checkpoint
    from pyrosome.errors import CheckpointError

    model: dict[str, Any] = {"name": wanted.model}
    try:
        index = open_checkpoint(wanted.model)
        model |= {
            "path": str(index.path),
            "release": index.config.release,
            "tensors": len(index.tensors),
            "bytes": index.nbytes,
            "fingerprint": fingerprint(index, wanted.numerics, "fp8"),
        }
    except (CheckpointError, OSError) as error:
        model["unreadable"] = str(error)
    here = {"processor": machine.cpu(), "memory": machine.memory(), "gpus": machine.gpus()}
    return {"model": model, "machine": here, "versions": machine.versions(), "environment": machine.variables()}


def _progress(screen: Screen) -> Any:
    def tell(done: int, total: int, of_what: str) -> None:
        if screen.styled:
            screen.status(f"{done / max(1, total):.0%} {printable(of_what)[:60]}")

    return tell


def _print(finding: Finding, screen: Screen) -> None:
    state = {True: "ok  ", False: "FAIL", None: "-   "}[finding.ok]
    state = "look" if finding.ok and finding.warns else state
    if screen.styled:
        screen.out.write("\r\x1b[K")
        state = f"{_COLOURS[state]}{state}\x1b[0m" if can_style() else state
    line = printable(f"{finding.check}: {finding.what}: {finding.detail}".replace("\n", " "))
    screen.out.write(f"{state}  {line}\n")
    screen.out.flush()


def _conclude(record: Record, screen: Screen) -> None:
    n = record.counts
    said = "all is well" if record.ok else "something is wrong: see FAIL above"
    if not record.ok and not n["failed"]:
        said = "interrupted" if record.interrupted else "nothing could be looked at"
    more = f", {n['warned']} to look at" if n["warned"] else ""
    screen.out.write(f"\n{said}: {n['well']} held, {n['failed']} failed, {n['left_out']} left out{more}\n")
    screen.out.flush()
