"""A server in a thread around an engine that is made already, and clients that write bytes."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from funnel_engine import Engine
from funnel_serving import loading
from funnel_serving.server import Server, listen, make_server
from funnel_serving.settings import Settings


@contextlib.contextmanager
def running(engine: Engine, **options: Any) -> Iterator[Server]:
    """A server that is ready; afterwards it is gone, with its threads."""
    settings = Settings(**{"checkpoint": Path("tiny"), "port": 0, "warmup": "none", "drain_seconds": 60.0} | options)
    with listen(settings) as listener, patch.object(loading, "load_engine", lambda _: engine):
        server = make_server(settings)
        server.port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started and server.service.health.state == "ready")
            yield server
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
            assert server.has_ended


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def client(server: Server, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120, **options)


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def post(path: str, body: Any, **headers: str) -> bytes:
    """The bytes of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "x", "content-length": str(len(data)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received
