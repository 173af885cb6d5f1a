"""An embedding server in one file: HTTP from the standard library, and one batch for the requests of all clients.

    python examples/serve.py embeddinggemma-engine --funnel 12:2/mean
    curl localhost:8000/embed -d '{"texts": ["a text", "another one"]}'

POST /embed answers {"vectors": [[...], ...]}, or {"error": "..."} with a status: 400 for a request that cannot be run,
413 for one that is too large, 503 when too many wait. GET /health answers 200 once every bucket is compiled.

It listens on this machine only. Put a proxy in front of it for TLS, authentication and limits on clients.
"""

import argparse
import json
import queue
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np

from funnel_engine import Engine, FunnelError, InputError, parse_funnel

MAX_BODY_BYTES = 2**20
MAX_WAITING = 256  # requests
BATCH_TOKENS = 4096  # a batch with as many is not made larger, so that its first client does not wait longer
CLIENT_SECONDS = 30  # a client that is slower is disconnected


class Request(NamedTuple):
    sequences: list[np.ndarray]  # token ids
    tokens: int
    answer: Future[np.ndarray]  # its vectors, [B, D]


class Batcher:
    """Requests wait in a queue. One thread takes as many as fit into a batch, runs them, and answers each."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.waiting: queue.Queue[Request] = queue.Queue(MAX_WAITING)
        threading.Thread(target=self.run, daemon=True).start()

    def embed(self, texts: Any, prompt_name: Any) -> np.ndarray:
        """The vectors of texts, [B, D]. Called by many threads.

        Raises:
            InputError: the texts cannot be run. They are checked here, so that no batch fails because of one client.
            queue.Full: too many requests wait.
        """
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError('"texts" must be a list of strings')
        ids = self.engine.token_ids(texts, prompt_name=prompt_name)
        request = Request(np.split(ids.ids, ids.offsets[1:-1]), len(ids.ids), Future())
        self.waiting.put_nowait(request)
        return request.answer.result()

    def run(self) -> None:
        while True:
            batch = [self.waiting.get()]
            while not self.waiting.empty() and sum(request.tokens for request in batch) < BATCH_TOKENS:
                batch.append(self.waiting.get())
            try:
                vectors = self.engine.embed([ids for request in batch for ids in request.sequences])
            except Exception as error:  # the thread must go on: the next batch may be fine
                for request in batch:
                    request.answer.set_exception(error)
                continue
            ends = np.cumsum([len(request.sequences) for request in batch])
            for request, part in zip(batch, np.split(vectors, ends[:-1]), strict=True):
                request.answer.set_result(part)


class Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS
    batcher: Batcher

    def do_GET(self) -> None:
        self.reply(*(200, {"status": "ready"}) if self.path == "/health" else (404, {"error": "use GET /health"}))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/embed":
            self.reply(404, {"error": "use POST /embed"})
        elif not length.isdecimal():
            self.reply(411, {"error": "send the header Content-Length"})
        elif int(length) > MAX_BODY_BYTES:
            self.reply(413, {"error": f"{length} bytes are more than the limit of {MAX_BODY_BYTES}; send fewer texts"})
        else:
            self.reply(*self.embed(self.rfile.read(int(length))))

    def embed(self, data: bytes) -> tuple[int, dict[str, Any]]:
        """The status and the content of the answer to a request."""
        try:
            body = json.loads(data)
            if not isinstance(body, dict):
                raise InputError('the body must be a JSON object, for example {"texts": ["a text"]}')
            vectors = self.batcher.embed(body.get("texts"), body.get("prompt_name"))
        except (ValueError, RecursionError, FunnelError) as error:  # ValueError: not JSON, or not UTF-8
            return 400, {"error": str(error)}
        except queue.Full:
            return 503, {"error": f"{MAX_WAITING} requests are waiting already; try again later"}
        except Exception as error:
            self.log_error("%r", error)
            return 500, {"error": "the engine failed; see the server's log"}
        return 200, {"vectors": vectors.tolist()}

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, *_: Any) -> None:
        """Only errors are logged."""


def make_server(engine: Engine, port: int) -> ThreadingHTTPServer:
    """A server on this machine; port 0 takes a free one."""
    handler = type("Handler", (Handler,), {"batcher": Batcher(engine)})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the vectors of a checkpoint over HTTP.")
    parser.add_argument("checkpoint", help="a folder that `funnel convert` has made")
    parser.add_argument("--funnel", type=parse_funnel, help="for example 12:2/mean; default: the checkpoint's")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    engine = Engine.load(options.checkpoint, funnel=options.funnel, max_batch_tokens=BATCH_TOKENS)
    engine.warmup()
    with make_server(engine, options.port) as server:
        print(f"ready on http://127.0.0.1:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
