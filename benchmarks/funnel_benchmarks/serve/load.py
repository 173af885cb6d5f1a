"""The process that makes load, seen from ours: it sleeps until it gets a task."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from funnel_kernels.errors import FunnelError

PROCESS = f"{__package__}.load_process"  # not imported here: it needs what the extra `serve` installs

Texts = list[str]


class Replies(NamedTuple):
    """What became of n requests; see `load_process`.

    Attributes:
        statuses: [n] HTTP statuses, `connections.NO_REPLY` for none.
        latencies, lags: [n] seconds.
        seconds: from the beginning to the last reply.
        cpu_seconds: that the client computed for.
    """

    statuses: np.ndarray
    latencies: np.ndarray
    lags: np.ndarray
    seconds: float
    cpu_seconds: float


class Load:
    """Sends requests to a port of this machine, until `close`."""

    def __init__(self, port: int):
        command = [sys.executable, "-m", PROCESS, str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def closed(self, requests: Sequence[Texts], clients: int) -> Replies:
        """All requests, by clients that wait for each reply.

        Raises:
            FunnelError: one was not answered with 200, so that the time means nothing.
        """
        replies = self.run(requests=requests, clients=clients)
        if (wrong := replies.statuses[replies.statuses != 200]).size:
            raise FunnelError(
                f"{wrong.size} of {len(requests)} requests were not answered with 200 but {set(wrong.tolist())}"
            )
        return replies

    def opened(self, requests: Sequence[Texts], arrivals: np.ndarray) -> Replies:
        """All requests, at these seconds after the beginning."""
        return self.run(requests=requests, arrivals=arrivals.tolist())

    def run(self, **task: Any) -> Replies:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise FunnelError(f"the client ended with status {self.process.wait()}; what it printed says why")
        answer = json.loads(line)
        statuses, latencies, lags = (np.array(answer[name]) for name in ("statuses", "latencies", "lags"))
        return Replies(statuses, latencies, lags, answer["seconds"], answer["cpu_seconds"])

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.communicate()
