"""`pyrosome serve`: the model over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from pyrosome.cli.engine_flags import CACHE_GIB, CacheGiB, Drafter, engine_options
from pyrosome.cli.first_contact import BUILTIN, MODEL_HELP
from pyrosome.options import ServerOptions


def serve(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=BUILTIN)] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any free one.")] = 8000,
    cache_gib: CacheGiB = CACHE_GIB,
    drafter: Drafter = "auto",
) -> None:
    """Answer OpenAI's and Anthropic's protocols over HTTP, until Ctrl-C."""
    import uvicorn

    from pyrosome.server.app import make_app
    from pyrosome.server.service import Service, engine_process

    options = ServerOptions(host=host, port=port)
    engine = engine_options(cache_gib, drafter, 0, None)
    name = model or BUILTIN
    service = Service(name, options, engine, make_driver=engine_process(name, engine))
    uvicorn.run(make_app(service), host=host, port=port, log_level="warning")
