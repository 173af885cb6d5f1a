"""The process of `funnel serve`: it answers while it loads, ends in an orderly way, and says why it cannot start."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from funnel_engine import ConfigError, Engine, convert
from funnel_serving.server import listen
from funnel_serving.settings import Settings
from running_server import wait_for
from sentence_models import save_embedding_gemma

COMMAND = """
from funnel_engine.cli import main
from funnel_serving.serve_command import serve
main.add_command(serve)
main()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_embedding_gemma(folder, layers=1)
    convert(folder / "source", folder / "model", dtype="float32")
    return folder / "model"


class Process:
    """A server in a process of its own."""

    def __init__(self, checkpoint: Path, *options: str, **variables: str):
        command = [sys.executable, "-c", COMMAND, "serve", str(checkpoint), "--max-batch-tokens", "16", *options]
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), **variables}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))
        self.reader.start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()

    def logged(self, message: str) -> dict | None:
        lines = [json.loads(line) for line in self.lines if line.startswith("{")]
        return next((line for line in lines if line["message"] == message), None)

    def url(self, path: str = "") -> str:
        wait_for(lambda: self.logged("listening"))
        return f"http://127.0.0.1:{self.logged('listening')['port']}{path}"

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.logged("ready"))

    def ended(self) -> int:
        return self.process.wait(60)


def test_it_answers_while_it_loads_and_finishes_requests_after_a_signal(checkpoint):
    with Process(checkpoint, "--port", "0", "--warmup", "small", "--grace-seconds", "1.5") as server:
        states = set()
        while (reply := httpx.get(server.url("/health/ready"))).status_code == 503:
            states.add(reply.json()["status"])
            assert httpx.get(server.url("/health/live")).status_code == 200
            refused = httpx.post(server.url("/v1/embeddings"), json={"input": "a", "model": "model"})
            assert refused.status_code in (503, 200)
            time.sleep(0.05)
        assert states <= {"loading", "compiling"}
        assert states
        with httpx.Client(base_url=server.url()) as client:
            body = {"inputs": ["a small funnel", "tokens"], "truncate": True}
            found = client.post("/embed", json=body).json()
            expected = Engine.load(checkpoint, max_batch_tokens=16).embed(body["inputs"], truncate=True)
            np.testing.assert_allclose(found, expected, atol=1e-5)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/health/ready").status_code == 503)
            assert client.get("/health/ready").json() == {"status": "stopping"}
            assert client.post("/embed", json=body).status_code == 200  # load balancers notice late
        assert server.ended() == 0
        assert server.logged("stopped")
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url("/health"))


def test_a_second_signal_ends_it_at_once_and_its_port_is_free(checkpoint):
    with Process(checkpoint, "--port", "0", "--warmup", "none", "--grace-seconds", "60") as server:
        server.wait_until_ready()
        port = int(server.url().rpartition(":")[2])
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(server.url("/health/ready")).status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.ended() == 128 + signal.SIGINT
    with Process(checkpoint, FUNNEL_SERVE_PORT=str(port), FUNNEL_SERVE_WARMUP="none") as server:
        server.wait_until_ready()
        server.process.kill()
        server.ended()
    socket.create_server(("127.0.0.1", port)).close()


def test_it_says_why_it_cannot_start(tmp_path):
    with Process(tmp_path / "none", "--port", "0") as server:
        assert server.ended() == 2
    assert re.match(r"Error: .*none", server.lines[-1])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: Address already in use"):
            listen(Settings(checkpoint=tmp_path, port=port))
    with pytest.raises(ConfigError, match=r"cannot listen on --host no\.such\.host"):
        listen(Settings(checkpoint=tmp_path, host="no.such.host.invalid"))


def test_it_warns_where_anybody_can_use_it(tmp_path, caplog):
    for options in ({}, {"host": "0.0.0.0", "api_keys": ("a-secret-key",)}):
        listen(Settings(checkpoint=tmp_path, port=0, **options)).close()
    assert not caplog.text
    listen(Settings(checkpoint=tmp_path, port=0, host="0.0.0.0")).close()
    assert "anybody who reaches 0.0.0.0 can use this server; set --api-keys" in caplog.text
