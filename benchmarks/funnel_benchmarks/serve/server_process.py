"""A server that is measured over HTTP: a process of its own on this machine, ours or a peer."""

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from funnel_benchmarks.machine import usable_cores
from funnel_benchmarks.peers.peer import limits
from funnel_benchmarks.results import Row
from funnel_benchmarks.serve import peer_server
from funnel_benchmarks.serve.load import Load, Texts
from funnel_kernels.errors import FunnelError
from funnel_serving.settings import ENVIRONMENT, option_name

# The command `funnel`, also where no distribution has made it.
FUNNEL = """
from funnel_engine.cli import main
from funnel_serving.serve_command import serve
main.add_command(serve)
main()
"""
START_SECONDS = 1800.0  # in which programs are compiled, on a machine that does other things too
COMPILATIONS = re.compile(r"^funnel_compilations_after_warmup_total (\S+)$", re.MULTILINE)


def own_command(checkpoint: Path, settings: Mapping[str, Any]) -> list[str]:
    """`funnel serve` with these settings."""
    options = [word for name, value in settings.items() for word in (option_name(name), str(value))]
    return [sys.executable, "-c", FUNNEL, "serve", str(checkpoint), *options]


def peer_command(model: Path, dtype: str) -> list[str]:
    """sentence-transformers behind FastAPI."""
    return [sys.executable, "-m", peer_server.__name__, str(model), dtype, str(usable_cores())]


class Server:
    """A server that is ready, and the client that asks it, until `close`.

    Attributes:
        load: sends requests to it.
    """

    def __init__(self, command: list[str]):
        """Waits until it is ready.

        Raises:
            FunnelError: it ended, or is not ready in time.
        """
        self.log = tempfile.NamedTemporaryFile()  # noqa: SIM115, until `close`
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT)} | limits()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        self.load: Load | None = None
        try:
            self.until = time.monotonic() + START_SECONDS
            while (port := self.logged_port()) is None:
                self.wait()
            self.port = port
            while not self.is_ready():
                self.wait()
            self.load = Load(port)
        except BaseException:
            self.close()
            raise

    def logged_port(self) -> int | None:
        """The port that it listens on, once its log says so."""
        for line in self.lines():
            if line.startswith("{") and line.endswith("}") and (entry := json.loads(line))["message"] == "listening":
                return int(entry["port"])
        return None

    def lines(self) -> list[str]:
        return Path(self.log.name).read_text(encoding="utf-8", errors="replace").splitlines()

    def wait(self) -> None:
        """Raises `FunnelError` if there is nothing to wait for."""
        if self.process.poll() is not None or time.monotonic() > self.until:
            ended = "did not start" if self.process.poll() is None else "ended"
            raise FunnelError(f"the server {ended}: {' '.join(self.lines())[-400:]}")
        time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            return self.fetch("GET", "/health/ready")[0] == 200
        except (OSError, http.client.HTTPException):  # it has just ended, which `wait` notices
            return False

    def fetch(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of the reply, for what is not timed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        try:
            connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def embed(self, texts: Texts) -> np.ndarray:
        """The vectors of texts, [B, D].

        Raises:
            FunnelError: there are none.
        """
        status, body = self.fetch("POST", "/embed", {"inputs": texts})
        if status != 200:
            raise FunnelError(f"the server answered {status}: {body[:200].decode(errors='replace')}")
        return np.array(json.loads(body), np.float32)

    def compilations(self) -> int:
        """Programs that it compiled after its warm-up; only ours has any, and must have none."""
        status, body = self.fetch("GET", "/metrics")
        found = COMPILATIONS.search(body.decode()) if status == 200 else None
        return int(float(found[1])) if found else 0

    def memory(self) -> Row:
        """Resident memory in bytes: now, and the most since its start. Empty where the system does not tell."""
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return {}
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return {name: 1024 * int(fields[field].split()[0]) for name, field in (("now", "VmRSS"), ("most", "VmHWM"))}

    def close(self) -> None:
        """Ends both processes, whatever they are doing."""
        if self.load is not None:
            self.load.close()
        self.process.kill()
        self.process.wait()
        self.log.close()
