"""The server of `bench.serve`: what `pyrosome serve` runs, and the engine's own numbers at /bench/stats.

    python -m bench.serve_side '{"max_sequences": 8, "max_queue": 128, ...}'

Prints one JSON line once requests are answered.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse

from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.run import Server, bound, config_of
from pyrosome.server.service import Service, engine_process


def main() -> int:
    """The command."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    model = asked.pop("model")
    fields = {f.name for f in dataclasses.fields(EngineOptions)}
    engine = EngineOptions(**{k: v for k, v in asked.items() if k in fields})
    options = ServerOptions(**{k: v for k, v in asked.items() if k not in fields})
    service = Service(model, options, engine, make_driver=engine_process(model, engine))
    config = config_of(service)
    config.app.add_api_route("/bench/stats", stats)  # type: ignore[union-attr]
    sockets = bound("127.0.0.1", 0)

    def ready() -> None:
        about = {"port": sockets[0].getsockname()[1], "pid": os.getpid(), "engine": service.driver.pid}  # type: ignore[union-attr]
        print(json.dumps(about), flush=True)

    Server(config, service, ready).run(sockets)
    return 0


async def stats(request: Request) -> JSONResponse:
    """The engine's numbers, and the server's."""
    service: Service = request.app.state.service
    found = await service.engine.call("stats")
    inside = {"inside": service.gate.num_inside, "exchanges": len(service.exchanges)}
    return JSONResponse({**found.as_dict(), **inside})


if __name__ == "__main__":
    sys.exit(main())
