"""The whole application of the server in a test: called directly, or behind a socket."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from funnel_serving.app import App
from funnel_serving.health import Health
from funnel_serving.loading import load_model
from funnel_serving.metrics import Metrics
from funnel_serving.service import Service
from funnel_serving.settings import Settings

MAX_BATCH_TOKENS = 512


@contextlib.contextmanager
def application(checkpoint: Path, **settings: Any) -> Iterator[App]:
    """What `funnel serve` runs, with its threads. Programs are compiled as they are needed."""
    options = {"warmup": "none", "max_batch_tokens": MAX_BATCH_TOKENS} | settings
    service = Service(Settings(checkpoint=checkpoint, **options), Metrics(), Health())
    load_model(service)
    try:
        yield App(service)
    finally:
        assert service.close(60)


@contextlib.contextmanager
def client(checkpoint: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of an application without a socket."""
    with application(checkpoint, **settings) as app:
        yield TestClient(app)


@contextlib.contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """The address of a server that runs this application in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
