"""Serve the built-in model until a signal, and say where in one line of JSON."""

from __future__ import annotations

import argparse
import json

from pyrosome import log
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.keys.door import door_for
from pyrosome.server.run import bound, serve
from pyrosome.server.service import Service, engine_process


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--state", default="")
    parser.add_argument("--keys", default="auto")
    given = parser.parse_args()
    log.configure()
    options = ServerOptions(port=0, state_path=given.state, keys=given.keys)
    engine = EngineOptions(cache_bytes=256 << 20)
    service = Service(
        given.model, options, engine, make_driver=engine_process(given.model, engine), door=door_for(options)
    )
    sockets = bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    serve(service, sockets, lambda: print(json.dumps({"url": url}), flush=True))


if __name__ == "__main__":
    main()
