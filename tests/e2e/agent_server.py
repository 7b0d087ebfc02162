"""A server whose model plays its part in an agent's work: a real one, over an engine that follows a script."""

from __future__ import annotations

import json
import sys

from pyrosome import log
from pyrosome.engine.worker import EngineThread
from pyrosome.options import ServerOptions
from pyrosome.server.keys.door import door_for
from pyrosome.server.run import bound, serve
from pyrosome.server.service import Service
from tests.e2e.agent_part import part
from tests.server.scripted import MODEL, ScriptedEngine


def main(state: str) -> None:
    """Serve until a signal, and say where in one line of JSON."""
    log.configure()
    options = ServerOptions(state_path=state)
    service = Service(MODEL, options, make_driver=lambda: EngineThread(ScriptedEngine(part)), door=door_for(options))
    sockets = bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    serve(service, sockets, lambda: print(json.dumps({"url": url}), flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
