"""Running a service: sockets, TLS, signals, and an end in which everybody is told.

The first SIGTERM or SIGINT begins the end: the sockets stay open, health says that the server closes, new requests get
503, those that run end by themselves or are told when the time is over.  The second one ends them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn

from pyrosome.engine.worker import close_all
from pyrosome.errors import EngineError, RequestError
from pyrosome.options import ServerOptions
from pyrosome.server.app import make_app
from pyrosome.server.connection import Connection, Limits
from pyrosome.server.memory import Tidy
from pyrosome.server.service import FAILED, READY, Service

log = logging.getLogger(__name__)

BACKLOG = 2048
CLOSING_S = 2  # from the last answer to the end of its connection
THREADS = 8  # for prompts, files and what else would hold the event loop up
FILES = 256  # that a server has open besides its connections
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(service: Service, sockets: Sequence[socket.socket], when_ready: Callable[[], object] = lambda: None) -> None:
    """Serve until a signal; `when_ready` is called once requests are answered.

    Raises:
        EngineError: the model could not be loaded, or the engine ended and is not started again.
    """
    server = Server(config_of(service), service, when_ready)
    try:
        server.run(list(sockets))
    finally:
        close_all()
    if server.failure:
        raise EngineError(server.failure)


def config_of(service: Service, **changes: Any) -> uvicorn.Config:
    """uvicorn's settings for a service.  Its own access log, time limits and websockets are off."""
    options = service.options
    fields: dict[str, Any] = {
        "http": functools.partial(Connection, limits=limits_of(options, service.gate.num_places)),
        "ws": "none",
        "loop": "asyncio",
        "log_config": None,
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "backlog": BACKLOG,
        "timeout_keep_alive": 86400,  # a `Connection` has its own
        "timeout_graceful_shutdown": CLOSING_S,
        "ssl_certfile": options.tls_certificate or None,
        "ssl_keyfile": options.tls_key or None,
    }
    return uvicorn.Config(make_app(service), **{**fields, **changes})


def limits_of(options: ServerOptions, num_places: int) -> Limits:
    """What clients may take, connections as many as there may be files."""
    wanted = max(Limits().max_connections, 2 * (num_places + options.max_queue))
    return Limits(
        max_connections=max(16, _open_files(wanted + FILES) - FILES),
        max_header_bytes=options.max_header_bytes,
        header_s=options.header_s,
        write_s=options.write_s,
    )


class Server(uvicorn.Server):
    """uvicorn's server with an end of its own.

    Args:
        when_ready: called once requests are answered.
        owns_process: there is nothing else in this process; it ends when its engine does, and every engine with it.

    Attributes:
        failure: why there is no engine, if that is why it ended.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        when_ready: Callable[[], object] = lambda: None,
        *,
        owns_process: bool = True,
    ) -> None:
        super().__init__(config)
        self._service, self._when_ready, self._owns_process = service, when_ready, owns_process
        self._ending: asyncio.Task[None] | None = None
        self._has_told = False
        self._tidy = Tidy()
        self.failure = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server and nothing else; the process then ends as it would without them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Begin to end; asked again, do it at once."""
        if self._ending:
            self._service.hurry.set()
        else:
            self._ending = asyncio.get_running_loop().create_task(self._drained())

    async def _drained(self) -> None:
        running = len(self._service.exchanges)
        if running:
            log.info("closing: %d requests run, and may for %g s; a second signal ends them now", running,
                     self._service.options.drain_s)  # fmt: skip
        await self._service.drain()
        await self._service.last_numbers()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._owns_process and self._tidy.is_due:
            asyncio.get_running_loop().run_in_executor(None, self._tidy)
        state = self._service.state
        if state == READY and not self._has_told:
            self._has_told = True
            self._when_ready()
        if state == FAILED and self._owns_process and not self.failure:
            self.failure = self._service.reason
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the sockets; what takes long is done by a few threads, so that many long prompts do not fill memory."""
        loop, config = asyncio.get_running_loop(), self.config
        loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="pyrosome-server"))
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise RuntimeError("the application did not start; the log says why")
        made_by: Any = config.http_protocol_class
        connection = functools.partial(
            made_by, config=config, server_state=self.server_state, app_state=self.lifespan.state
        )
        self.servers = [
            await loop.create_server(
                connection, sock=made, ssl=config.ssl, backlog=config.backlog,
                ssl_handshake_timeout=self._service.options.header_s if config.ssl else None,
            )
            for made in sockets or bound(config.host, config.port)
        ]  # fmt: skip
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is open; an engine that is still being loaded is not waited for."""
        await super().shutdown(sockets)
        if self._owns_process:
            await asyncio.to_thread(close_all)


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets for an address, all on one port.

    Raises:
        RequestError: it is in use, or not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise RequestError(f"--host is {host!r}, and there is no such address here ({error.strerror})") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made = socket.socket(family, kind, protocol)
            sockets.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            port = port or sockets[0].getsockname()[1]
            try:
                made.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or len(sockets) == 1:  # `localhost` may mean what is not there
                    raise
                sockets.pop().close()
    except OSError as error:
        for made in sockets:
            made.close()
        if isinstance(error, PermissionError):
            why = "only the system's administrator may use it; choose one above 1023 with --port"
        elif error.errno == errno.EADDRINUSE:
            why = "something listens there already; end it, or choose another with --port (0: any free one)"
        else:
            why = f"{error.strerror}; see --host and --port"
        raise RequestError(f"port {port} of {host or 'every address'} cannot be had: {why}") from None
    return sockets


def check_tls(certificate: str, key: str) -> None:
    """See that a certificate and its key can be used.

    Raises:
        RequestError: they cannot.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise RequestError(
            f"--tls-certificate {certificate} and --tls-key {key} cannot be used together: {error}; both are PEM "
            "files, the key without a password"
        ) from None


def _open_files(wanted: int) -> int:
    """How many files may be open, once as many are allowed as are wanted, as far as the system lets."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
