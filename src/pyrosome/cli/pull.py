"""`pyrosome pull`: a checkpoint from a hub or mirror, planned from its headers before it is fetched."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli.terminal import BAD_INPUT, DONE, INTERRUPTED, Screen, can_style, printable, size
from pyrosome.errors import PlanError, RequestError

if TYPE_CHECKING:
    from pyrosome.hub.pull import Offer
    from pyrosome.hub.record import Record
    from pyrosome.plan.inventory import Model

CONTEXT = 131_072  # tokens of the session that is planned for
LINE_EVERY_S = 30.0  # between two lines of progress where they cannot be written over


def pull(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of a repository, as deepseek-ai/DeepSeek-V4-Flash.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    to: Annotated[
        Path | None,
        typer.Option(help="Directory; by default one in which OWNER/NAME is then found.", show_default=False),
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(help="Address of a hub or mirror; else HF_ENDPOINT.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Fetch without asking.")] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Say what would be fetched, and fetch nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, and no progress.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Open no connection: say what is there and what is missing.")
    ] = False,
) -> None:
    """Fetch a checkpoint: what it is and needs is said first, from its headers; then files, resumed and checked.

    Where nobody can be asked, --yes is needed.  HF_ENDPOINT and HF_TOKEN are kept to.  The second time it checks what
    is there.
    """
    from pyrosome.hub.offline import go_offline, is_offline
    from pyrosome.hub.pull import default_directory

    screen = Screen()
    directory = (to.expanduser() if to else default_directory(repo)).absolute()
    if offline or is_offline():
        go_offline()
        _survey(directory, repo, screen, as_json)
        return
    _pull(repo, revision, directory, mirror, screen, yes=yes, plan_only=plan_only, as_json=as_json)


def _pull(
    repo: str,
    revision: str,
    directory: Path,
    mirror: str | None,
    screen: Screen,
    *,
    yes: bool,
    plan_only: bool,
    as_json: bool,
) -> None:
    from pyrosome.hub.pull import prepare, take
    from pyrosome.hub.remote import Hub, Stopped

    said: Any = (lambda _: None) if as_json else (lambda text: screen.notice(printable(text)))
    hub = Hub(repo, mirror, told=said)
    with _stopping(hub.stop):
        try:
            offer = prepare(hub, revision, directory)
            report = describe(offer, hub.endpoint)
            if not as_json:
                _print(report)
            elif plan_only:
                typer.echo(json.dumps(report, ensure_ascii=False))
            offer.check_room()
            if plan_only:
                return
            if not (yes or not offer.missing_bytes or _agreed(offer, screen)):
                raise typer.Exit(DONE)
            with _progress(offer.num_bytes, screen, quiet=as_json) as progress:
                sums = take(hub, offer, progress.heard)
        except Stopped as stopped:
            screen.notice(str(stopped))
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        done = {"fetched_bytes": progress.fetched, "checked_bytes": offer.num_bytes, "sha256": sums}
        typer.echo(json.dumps(report | done, ensure_ascii=False))
    else:
        typer.echo(
            printable(
                f"{len(sums)} files of {offer.num_bytes:,} bytes are there and right, {progress.fetched:,} of them "
                f"fetched now: {directory}"
            )
        )


def describe(offer: Offer, endpoint: str) -> dict[str, Any]:
    """Everything that is known before a pull, as plain data.  Sizes are in bytes."""
    from pyrosome.cache.streams import plan_cache
    from pyrosome.plan.inventory import from_headers

    model = from_headers(offer.index, offer.listing.repo)
    c = model.config
    held = sum(t.stored_bytes for t in model.held)
    kv = plan_cache(c, "fp8", 1, c.max_position_embeddings, drafts=model.num_stages > 0)
    return {
        "repo": offer.listing.repo,
        "endpoint": endpoint,
        "revision": offer.revision,
        "commit": offer.listing.commit,
        "moved_to": offer.moved,
        "path": str(offer.directory),
        "release": c.release,
        "parameters": model.parameters,
        "tensors": len(offer.index.tensors),
        "tensor_bytes": offer.index.nbytes,
        "held_bytes": held,
        "expert_bytes": sum(t.stored_bytes for t in model.held if t.part == "routed experts"),
        "left_out": model.left_out,
        "kv_bytes_per_token": kv.bytes_per_token,
        "files": {f.name: f.num_bytes for f in offer.files},
        "file_bytes": offer.num_bytes,
        "there_bytes": offer.there_bytes,
        "missing_bytes": offer.missing_bytes,
        "free_bytes": offer.free_bytes,
        "header_bytes": offer.header_bytes,
        **_plan_here(model, offer),
    }


def _plan_here(model: Model, offer: Offer) -> dict[str, Any]:
    """A plan for one session on this machine; why there is none where this machine is not understood."""
    from pyrosome.plan.hardware import machine
    from pyrosome.plan.plan import Asked
    from pyrosome.plan.planner import make_plan

    context = min(CONTEXT, model.config.max_position_embeddings)
    try:
        # What is mapped is read where it is being fetched to, and has its room there.
        here = machine(nvme=max(offer.num_bytes, offer.free_bytes + offer.there_bytes))
        plan = make_plan(Asked(model, here, context))
    except (PlanError, RequestError) as error:
        return {"plan": None, "no_plan": str(error)}
    return {"plan": dataclasses.asdict(plan), "no_plan": ""}


def _print(r: dict[str, Any]) -> None:
    held, experts = r["held_bytes"], r["expert_bytes"]
    lines = [
        f"{r['repo']} at {r['revision']} (commit {r['commit'][:12]}) of {r['endpoint']}",
        f"  release  {r['release']}: {r['parameters']['trunk']:,} parameters, {r['tensors']:,} tensors of "
        f"{r['tensor_bytes']:,} bytes ({size(r['tensor_bytes'])}), all that config.json implies",
        f"  files    {len(r['files'])} of {r['file_bytes']:,} bytes; {r['there_bytes']:,} are there, "
        f"{r['missing_bytes']:,} to fetch ({size(r['missing_bytes'])})",
        f"  disk     {size(r['free_bytes'])} free at {r['path']}",
        f"  memory   {size(held)} of weights, or {size(held - experts)} with the routed experts mapped from disk; "
        f"{r['kv_bytes_per_token']:,.1f} bytes of KV a token (FP8)",
        f"  here     {_here(r)}",
    ]
    if r["left_out"]:
        lines.append(f"  note     {r['left_out']}")
    lines.append(f"  known from {r['header_bytes']:,} bytes of headers")
    if r["moved_to"]:
        lines.insert(
            1, f"  note     {r['revision']} is at {r['moved_to'][:12]} now; this directory stays at its commit, and "
            "another one (--to) takes the new one",
        )  # fmt: skip
    typer.echo("\n".join(printable(line) for line in lines))


def _here(r: dict[str, Any]) -> str:
    """How one session runs on this machine, or what it lacks."""
    plan = r["plan"]
    if plan is None:
        return f"not planned: {r['no_plan']}"
    machine, context = plan["asked"]["machine"], plan["asked"]["context"]
    asked = f"a session of {context:,} tokens on {machine['title']}"
    if not plan["fits"]:
        return f"{asked} does not fit: {plan['why_not']}; {plan['change']}"
    band, how = (
        plan["speed"]["decode_tok_s"],
        "mapped from disk" if plan["options"]["experts"] == "mapped" else "resident",
    )
    return (
        f"{asked} fits, experts {how}: {band['low']:.2g} to {band['high']:.2g} tok/s ({plan['speed']['source']}; "
        f"limit: {plan['speed']['limit']})"
    )


def _agreed(offer: Offer, screen: Screen) -> bool:
    if not (sys.stdin.isatty() and screen.err_is_terminal):
        raise RequestError(
            "nobody can be asked here whether to fetch; --yes fetches without asking, --plan-only fetches nothing"
        )
    return typer.confirm(f"Fetch {size(offer.missing_bytes)} to {offer.directory}?", default=False, err=True)


def _survey(directory: Path, repo: str, screen: Screen, as_json: bool) -> None:
    from pyrosome.hub.pull import survey
    from pyrosome.hub.record import Record

    known = Record.read(directory)
    total = sum(f.num_bytes for f in known.files) if known else 0
    with _progress(total, screen, quiet=as_json) as progress:
        record, states = survey(directory, repo, progress.heard)
    lacking = {name: state for name, state in states.items() if state != "right"}
    if as_json:
        found = {"repo": repo, "commit": record.commit, "path": str(directory), "files": states, "ok": not lacking}
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        _print_survey(record, lacking, directory)
    if lacking:
        raise typer.Exit(BAD_INPUT)


def _print_survey(record: Record, lacking: Mapping[str, str], directory: Path) -> None:
    sizes = {f.name: f.num_bytes for f in record.files}
    typer.echo(
        printable(
            f"{record.repo} at {record.revision} (commit {record.commit[:12]}): {len(sizes) - len(lacking)} of "
            f"{len(sizes)} files are there and right: {directory}"
        )
    )
    for name, state in lacking.items():
        typer.echo(printable(f"  {state:8}{name} ({sizes[name]:,} bytes)"))
    if lacking:
        typer.echo(f"`pyrosome pull {record.repo}` without --offline fetches what is missing", err=True)


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C ends what is fetched at the next chunk; a second one does not wait for that."""

    def on_signal(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(total: int, screen: Screen, *, quiet: bool) -> Iterator[_Progress]:
    progress = _Progress(total, screen, quiet)
    try:
        yield progress
    finally:
        progress.close()


class _Progress:
    """How far a pull is, on standard error: one line that is written over, or lines now and then where it is none."""

    def __init__(self, total: int, screen: Screen, quiet: bool) -> None:
        self.total, self.done, self.fetched = total, 0, 0
        self._screen, self._quiet = screen, quiet
        self._in_place = screen.err_is_terminal and can_style()
        self._lock = threading.Lock()
        self._begun = self._last = time.monotonic()
        self._shown = False

    def heard(self, what: str, num_bytes: int) -> None:
        with self._lock:
            self.done += -num_bytes if what == "dropped" else num_bytes
            self.fetched += num_bytes if what == "fetched" else 0
            now = time.monotonic()
            if not self._quiet and now - self._last >= (0.2 if self._in_place else LINE_EVERY_S):
                self._last = now
                self._show(now - self._begun)

    def _show(self, seconds: float) -> None:
        rate = self.fetched / seconds
        left = f", {_duration((self.total - self.done) / rate)} left" if rate else ""
        text = f"{size(self.done)} of {size(self.total)}, {size(rate)}/s{left}"
        self._screen.err.write(f"\r\x1b[K{text}" if self._in_place else text + "\n")
        self._screen.err.flush()
        self._shown = True

    def close(self) -> None:
        if self._shown and self._in_place:
            self._screen.err.write("\r\x1b[K")
            self._screen.err.flush()


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {int(seconds % 60)} s"
