"""The process: a socket, a thread that loads the model, and an orderly end."""

import asyncio
import ipaddress
import logging
import os
import socket
import sys
from types import FrameType

import uvicorn

from funnel_kernels.errors import ConfigError
from funnel_serving.app import App
from funnel_serving.connection import Connection
from funnel_serving.health import Health
from funnel_serving.loading import load_in_thread
from funnel_serving.logs import log_as_json
from funnel_serving.metrics import Metrics
from funnel_serving.service import Service
from funnel_serving.settings import Settings

log = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds; clients keep connections for less, so they do not use one that is just being closed
BACKLOG = 2048  # connections
SWITCH_INTERVAL = 0.0005  # seconds after which Python's threads take turns; the engine's must not wait for replies


class Server(uvicorn.Server):
    """Uvicorn's server with another end.

    On the first signal /health/ready fails and the server goes on for a while, because load balancers notice late. Then
    it takes no more connections, and ends when all requests are done, or when the time is over. The second signal ends
    the process at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self.failure: Exception | None = None
        self.has_ended = False  # with all threads

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.loading = load_in_thread(self.service, self.fail)
        await super().serve(sockets)
        # Batches whose clients have left may still run; their results need the loop.
        is_done = await asyncio.to_thread(self.service.close, self.service.settings.drain_seconds)
        self.has_ended = is_done and not self.loading.is_alive()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.health.state == "stopping":
            os._exit(128 + sig)
        is_loaded = self.service.batcher is not None
        self.service.health.state = "stopping"
        self.end_after(self.service.settings.grace_seconds if is_loaded else 0.0)

    def fail(self, failure: Exception) -> None:
        """The model cannot be loaded; called by the thread that loads it."""
        self.failure = failure
        self.end_after(0.0)

    def end_after(self, seconds: float) -> None:
        self.loop.call_soon_threadsafe(self.loop.call_later, seconds, setattr, self, "should_exit", True)


def make_server(settings: Settings) -> Server:
    """A server that does not listen yet."""
    service = Service(settings, Metrics(), Health())
    protocol = type("Connection", (Connection,), {"seconds": settings.body_seconds})
    config = uvicorn.Config(
        App(service),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=settings.drain_seconds,  # type: ignore[arg-type] # a float is as good
    )
    return Server(config, service)


def listen(settings: Settings) -> socket.socket:
    """The socket of the server.

    Raises:
        ConfigError: the address does not exist here, or the port is taken.
    """
    host, port = settings.host, settings.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"the server cannot listen on --host {host} --port {port}: {error.strerror}; choose another one"
        ) from error
    address = listener.getsockname()
    log.info("listening", extra={"host": address[0], "port": address[1]})
    if not settings.api_keys and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        log.warning("anybody who reaches %s can use this server; set --api-keys, or listen on 127.0.0.1", address[0])
    return listener


def run(settings: Settings) -> int:
    """Serves until a signal. Returns the exit status of the process.

    Raises:
        FunnelError: the server cannot listen, or the model cannot be loaded.
    """
    log_as_json()
    sys.setswitchinterval(SWITCH_INTERVAL)
    with listen(settings) as listener:
        server = make_server(settings)
        server.run([listener])
    if server.failure:
        raise server.failure
    log.info("stopped")
    if not server.has_ended:  # threads that still compute cannot be stopped, and would crash in the interpreter's end
        logging.shutdown()
        os._exit(0)
    return 0
