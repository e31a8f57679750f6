"""The server's life: it listens, drains when told to stop, and gives up when the engine is stuck."""

import asyncio
import logging
import os
import signal
import socket
import sys
from time import monotonic
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .app import create_app
from .errors import ApiError
from .safety import Guard
from .service import Service

HEADERS = 2**16  # bytes of a request's headers
LAST_WORDS = 3.0  # seconds that a server with a stuck engine still answers 503


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose headers are not endless."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.room = HEADERS

    def on_url(self, url: bytes) -> None:
        self.spend(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.spend(len(name) + len(value))
        super().on_header(name, value)

    def spend(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise ValueError("headers too large")  # the parser makes it its own error: 400


class Server(uvicorn.Server):
    """uvicorn's, with a drain and a watchdog."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self.stuck_since: float | None = None

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: looks whether the engine lives."""
        if self.stuck_since is None and not self.service.scheduler.alive:
            self.stuck_since = monotonic()
            logging.getLogger("lazulite.server").error("the engine is stuck: the server ends")
            if self.service.mailbox:
                self.service.mailbox.fail(ApiError(500, "The engine is stuck"))
        if self.stuck_since is not None and monotonic() - self.stuck_since > LAST_WORDS:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests; those under way have drain_seconds to end, then they are cut with a last event."""
        self.service.draining = True
        seconds = 0.0 if self.stuck_since is not None else self.drain_seconds
        drained = asyncio.get_running_loop().run_in_executor(None, self.service.scheduler.drain, seconds)
        await super().shutdown(sockets)
        if self.stuck_since is None:
            await drained


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        error.filename = f"{host}:{port}"
        raise


def serve(service: Service, guard: Guard, listener: socket.socket, *, drain_seconds: float, verbose: bool) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code: 0, or 1 if the engine was stuck."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    config = uvicorn.Config(
        create_app(service, guard), http=Protocol, ws="none", lifespan="off", log_config=None, access_log=verbose,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=int(drain_seconds) + 5,
        timeout_keep_alive=75,  # longer than clients keep idle connections: they close first, and no request is lost
    )  # fmt: skip
    server = Server(config, service, drain_seconds)
    sys.setswitchinterval(0.0005)  # the engine's thread waits no longer than this for the event loop's Python
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it is done: that is then no news
        signal.signal(number, ignore)
    server.run([listener])
    if server.stuck_since is not None:
        os._exit(1)  # its thread will never be joined
    service.scheduler.close()
    return 0


def ignore(number: int, frame: Any) -> None:
    pass
