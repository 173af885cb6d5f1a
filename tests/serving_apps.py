"""The server's application in a test: called directly, or behind a socket."""

import contextlib
import socket
import sys
import threading
import time
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.testclient import TestClient

from funnel_serving import wire
from funnel_serving.refusals import Refusal
from funnel_serving.settings import Settings

sys.path.insert(0, str(Path(__file__).parent / "serving/wire"))
from direct_service import DirectService

MAX_BATCH_TOKENS = 512


def make_app(checkpoint, **settings):
    service = DirectService(Settings(checkpoint=checkpoint, max_batch_tokens=MAX_BATCH_TOKENS, **settings))

    async def refuse(request, refusal):
        return wire.refusal_response(request.url.path, refusal)

    return Starlette(routes=wire.routes(service), exception_handlers={Refusal: refuse})


@contextlib.contextmanager
def client(checkpoint, **settings):
    with TestClient(make_app(checkpoint, **settings)) as each:
        yield each


@contextlib.contextmanager
def listening(app):
    """The address of a server that runs this application in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
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
