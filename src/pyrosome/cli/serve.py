"""`pyrosome serve`: the model over HTTP."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli import server_flags as flags
from pyrosome.cli.doctor import short
from pyrosome.cli.engine_flags import (
    Device,
    Drafter,
    Experts,
    LockMemory,
    LogEvery,
    Numa,
    TracePath,
    engine_options,
    load_options,
)
from pyrosome.cli.first_contact import BUILTIN, MODEL_HELP, official_note
from pyrosome.cli.key_store import Database, PriceOf, State, price_from
from pyrosome.cli.pointers import NO_KEY, pointers
from pyrosome.cli.replay import Replay, typed
from pyrosome.cli.terminal import Screen
from pyrosome.errors import CheckpointError
from pyrosome.options import EngineOptions, ServerOptions

if TYPE_CHECKING:
    from pyrosome.chat import Chat
    from pyrosome.checkpoint.index import CheckpointIndex
    from pyrosome.plan.serving import Room
    from pyrosome.server.service import Service

_SERVER, _ENGINE = ServerOptions(), EngineOptions()


def serve(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=BUILTIN)] = None,
    host: flags.Host = _SERVER.host,
    port: flags.Port = _SERVER.port,
    name: flags.Names = None,
    exact_names: flags.ExactNames = False,
    compat: flags.Compat = "",
    tokenizer: flags.TokenizerDir = None,
    dialect: flags.Dialect = None,
    thinking: flags.Thinking = True,
    effort: flags.Effort = _SERVER.effort,
    reasoning_field: flags.ReasoningField = False,
    max_queue: flags.MaxQueue = _SERVER.max_queue,
    deadline: flags.Deadline = _SERVER.deadline_s,
    keep_alive: flags.KeepAlive = _SERVER.keep_alive_s,
    drain: flags.Drain = _SERVER.drain_s,
    max_body_mib: flags.MaxBody = _SERVER.max_body_bytes / 2**20,
    cors: flags.Cors = None,
    allow_host: flags.AllowHosts = None,
    keys: flags.Keys = _SERVER.keys,
    sign_up: flags.SignUp = False,
    price: PriceOf = None,
    usage_days: flags.UsageDays = _SERVER.usage_days,
    state: State = "",
    database: Database = "",
    tls_certificate: flags.Certificate = "",
    tls_key: flags.TlsKey = "",
    numerics: flags.NumericsName = "trained",
    kv_format: flags.KvFormat = None,
    cache_gib: flags.Cache = None,
    sequences: flags.Sequences = _ENGINE.max_sequences,
    context: flags.Context = _ENGINE.max_context,
    disk: flags.Disk = "",
    drafter: Drafter = "auto",
    experts: Experts = "resident",
    lock_memory: LockMemory = False,
    numa: Numa = "auto",
    device: Device = "cpu",
    log_every: LogEvery = 0,
    trace: TracePath = None,
    plan: flags.PlanFile = None,
    as_json: flags.AsJson = False,
) -> None:
    """Answer OpenAI's and Anthropic's protocols over HTTP, until Ctrl-C.

    The first Ctrl-C, or SIGTERM, takes nothing new and waits for what runs; the second one ends it.
    """
    replay = None if plan is None else Replay.read(plan)
    values: dict[str, Any] = {
        "sequences": sequences, "context": context, "cache_gib": cache_gib, "drafter": drafter, "numerics": numerics,
        "kv_format": kv_format, "experts": experts,
    }  # fmt: skip
    replaced: list[str] = []
    named = model or BUILTIN
    if replay:
        named = replay.model_named(model)
        values, replaced = replay.values(values, typed(ctx))
    sequences, context, cache_gib, drafter, numerics, kv_format, experts = values.values()
    paid = price_from(price) if price else None
    options = ServerOptions(
        host=host, port=port, names=tuple(name or ()), any_name=not exact_names, compat=compat, thinking=thinking,
        effort=effort, reasoning_field=reasoning_field, max_queue=max_queue, deadline_s=deadline,
        keep_alive_s=keep_alive, drain_s=drain, max_body_bytes=int(max_body_mib * 2**20), cors=tuple(cors or ()),
        hosts=tuple(allow_host or ()), keys=keys, sign_up=sign_up, usage_days=usage_days, state_path=state,
        database_url=database, tls_certificate=tls_certificate, tls_key=tls_key,
        prices=dataclasses.astuple(paid) if paid else _SERVER.prices,
    )  # fmt: skip
    rows = flags.check_arithmetic(numerics, kv_format, dialect)
    engine = engine_options(flags.USUAL_BYTES / 2**30 if cache_gib is None else cache_gib, drafter, log_every, trace)
    engine = dataclasses.replace(engine, max_sequences=sequences, max_context=context, disk_path=disk)
    if replay:
        engine = replay.engine_options(engine)
    held = load_options(experts, lock_memory, numa, device)

    from pyrosome.checkpoint.index import open_checkpoint
    from pyrosome.measure.served import told_after
    from pyrosome.plan.inventory import Model
    from pyrosome.plan.serving import Server
    from pyrosome.server.keys.door import door_for
    from pyrosome.server.run import bound, check_tls
    from pyrosome.server.run import serve as run
    from pyrosome.server.service import Service, engine_process

    index = open_checkpoint(named)
    planned = Model.open(named)
    if replay:
        replay.check_model(planned)
    server = Server.of(planned, rows, engine, numerics=numerics, mapped=experts == "mapped")
    size, available = None, flags.memory_for(device)
    if cache_gib is None:
        size = flags.cache_size(index, rows, sequences, context, available, mapped=server.mapped)
        size = flags.at_least(size, server.cache_bytes_for(context), context) if context else size
        engine = dataclasses.replace(engine, cache_bytes=size.num_bytes)
    room = dataclasses.replace(server, options=engine).checked_room(available)
    chat = _chat(index, tokenizer, dialect, options)
    if options.tls_certificate:
        check_tls(options.tls_certificate, options.tls_key)
    sockets = bound(options.host, options.port)
    load: dict[str, Any] = {**held, "numerics": numerics, "kv_format": kv_format}
    if tokenizer is not None:
        load["tokenizer_path"] = str(tokenizer / "tokenizer.json")
    service = Service(
        named, options, engine, make_driver=engine_process(named, engine, **load), door=door_for(options), chat=chat
    )
    said = _Said(service, sockets[0], as_json=as_json)
    said.loading(size, room, [*replay.lines(), *replaced] if replay else [], is_unnamed=model is None and not replay)
    _join_logs()
    run(service, sockets, said.ready)
    said.after(told_after(service.final_stats, planned, rows))


def _chat(index: CheckpointIndex, tokenizer: Path | None, dialect: str | None, options: ServerOptions) -> Chat:
    """The template, by another tokenizer than the checkpoint's where one is named.

    Raises:
        CheckpointError: it is not one for these weights.
    """
    from pyrosome.chat import Chat
    from pyrosome.chat.parser import END

    config = index.config
    chat = Chat(tokenizer or index.path, dialect, options.compat or None, default_thinking=options.thinking)
    if chat.tokenizer.vocab_size > config.vocab_size or chat.tokenizer.id_of(END) != config.eos_token_id:
        raise CheckpointError(
            f"the tokenizer in {tokenizer or index.path} has {chat.tokenizer.vocab_size:,} ids and ends texts with "
            f"{chat.tokenizer.id_of(END)}; the weights have {config.vocab_size:,} rows and end with "
            f"{config.eos_token_id}: they do not belong together"
        )
    return chat


class _Said:
    """What is told at the start: on standard error in words, or one JSON line on standard output."""

    def __init__(self, service: Service, listener: socket.socket, *, as_json: bool) -> None:
        self._service, self._as_json, self._screen = service, as_json, Screen()
        host, port = listener.getsockname()[:2]
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        scheme = "https" if service.options.tls_certificate else "http"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def loading(self, size: flags.CacheSize | None, room: Room, of_plan: list[str], *, is_unnamed: bool) -> None:
        """Before the model is there."""
        if self._as_json:
            return
        if is_unnamed:
            self._screen.notice(official_note("serve /path/to/DeepSeek-V4-Flash") + "\n")
        cache = self._service.engine_options.cache_bytes / 2**30
        why = f" ({size.reason}; --cache-gib sets it)" if size else ""
        loading = f"Loading {self._service.card.path}, with a cache of {cache:,.2f} GiB{why}."
        self._screen.notice("\n".join([*of_plan, loading, str(room), *short()]))

    def ready(self) -> None:
        """Once requests are answered."""
        card, options = self._service.card, self._service.options
        if self._as_json:
            told = {
                "url": self.url, "model": card.name, "pid": os.getpid(), "context_tokens": card.context_tokens,
                "mode": card.mode, "key_needed": self._service.door.is_needed,
            }  # fmt: skip
            typer.echo(json.dumps(told))
            return
        other = "; requests for other names are answered too" if options.any_name else ""
        lines = [
            f"{self.url} answers as {card.name}{other}.",
            f"Context {card.context_tokens:,} tokens; a request that says nothing about thinking is answered in mode "
            f"{card.mode}; up to {self._service.engine_options.max_sequences} at once.",
            f"A page to talk on: {self.url}/   metrics: {self.url}/metrics   API: {self.url}/openapi.json",
            *self._about_keys(),
        ]
        key = "KEY" if self._service.door.is_needed else NO_KEY
        self._screen.notice("\n".join(lines) + "\n\n" + pointers(self.url, card.name, key=key) + "\n")

    def after(self, lines: list[str]) -> None:
        """At the end: what was reached beside what the planner predicts."""
        if lines and not self._as_json:
            self._screen.notice("\n".join(lines))

    def _about_keys(self) -> Iterator[str]:
        from pyrosome.server.keys.door import is_loopback

        options = self._service.options
        if self._service.door.is_needed:
            yield "A key is needed: `pyrosome keys create NAME` makes one."
            return
        yield "No key is needed; clients that want one may send any."
        if not is_loopback(options.host):
            yield f"Whoever reaches {options.host or 'this machine'} may use it, since --keys is off."
        if "*" in options.cors:
            yield "Any web page that is open on a machine that reaches it may use it, since --cors is *."


def _join_logs() -> None:
    """uvicorn's warnings are written as this package's own."""
    logger = logging.getLogger("uvicorn")
    logger.handlers[:] = logging.getLogger("pyrosome").handlers
    logger.setLevel(logging.WARNING)
    logger.propagate = False
