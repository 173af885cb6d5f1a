"""The example server of `examples/cpp_server`, and its batcher by itself."""

import json
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import tiny_models
from c_library import OPTIONS, run

OK, BAD_REQUEST = 0, 1


def test_the_batcher(built):
    """Budget, order, overload, a failing batch, and the end: see batcher.cc."""
    run(built.programs / "batcher")


class Client:
    def __init__(self, path: Path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))

    def send(self, body: bytes, size: int | None = None) -> None:
        self.socket.sendall(struct.pack("=I", len(body) if size is None else size) + body)

    def answer(self) -> tuple[int, bytes] | None:
        """Code and body, or None if the server has hung up; never half of an answer."""
        head = self.read(8)
        if not head:
            return None
        size, code = struct.unpack("=II", head)
        body = self.read(size)
        assert len(head) == 8
        assert len(body) == size
        return code, body

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (piece := self.socket.recv(size - len(data))):
            data += piece
        return data

    def embed(self, ids: np.ndarray) -> np.ndarray:
        self.send(ids.astype(np.int32).tobytes())
        code, body = self.answer()
        assert code == OK, body
        return np.frombuffer(body, np.float32)


class Server(NamedTuple):
    process: subprocess.Popen
    path: Path

    def connect(self) -> Client:
        return Client(self.path)

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Asks it to end, checks that it did so cleanly, and returns what it printed."""
        self.process.send_signal(number)
        printed, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        assert not self.path.exists()
        return printed


@pytest.fixture(scope="module")
def start_server(built, checkpoints, tmp_path_factory) -> Iterator[Any]:
    processes = []

    def start(*options: str) -> Server:
        path = tmp_path_factory.mktemp("server") / "socket"
        command = [built.server, *options, "--options", OPTIONS, checkpoints["plain"], path]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == f"listening on {path}\n", process.stderr.read()
        return Server(process, path)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_server_answers_its_clients(start_server, engines):
    """One server for all: it starts an interpreter, which takes seconds."""
    server = start_server("--batch-tokens", "16", "--connections", "6")
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    sequences = tiny_models.random_ids([1, 5, 16, 9, 15, 2, 11, 8] * 4, seed=3)
    expected = engines["plain"].embed(sequences)

    def client(first: int) -> None:
        connection = server.connect()
        for index in range(first, len(sequences), 4):
            # Company changes the order of sums, and nothing else.
            np.testing.assert_allclose(connection.embed(sequences[index]), expected[index], atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))

    good, bad = server.connect(), server.connect()
    for body, size, message in (
        (b"", 0, "a request has 0 bytes; give 4 for each token id, and 1 ... 16 ids"),
        (b"12345", None, "a request has 5 bytes"),
        (bytes(4 * 17), None, "a request has 68 bytes"),
        (bytes(1_000_000), None, "a request has 1000000 bytes"),
        (np.array([5, 101], np.int32).tobytes(), None, "token id 101 is not in 0 ... 100"),
        (np.array([-1], np.int32).tobytes(), None, "token id -1 is not in 0 ... 100"),
    ):
        bad.send(body, size)
        code, said = bad.answer()
        assert (code, said.decode()[: len(message)]) == (BAD_REQUEST, message)
        np.testing.assert_allclose(good.embed(sequences[0]), expected[0], atol=1e-5)
    np.testing.assert_allclose(bad.embed(sequences[1]), expected[1], atol=1e-5)  # its next request is understood

    bad.send(b"1234", size=40)  # leaves in the middle of a request
    bad.socket.close()
    np.testing.assert_allclose(good.embed(sequences[2]), expected[2], atol=1e-5)

    stalled = server.connect()
    stalled.socket.sendall(b"\x08")  # begins a request and falls silent; must not hold up the end
    counters = json.loads(server.stop())
    assert counters["compilations_after_warmup"] == 0
    assert counters["sequences"] == len(sequences) + 8
    assert stalled.answer() is None


def test_the_end_with_requests_in_flight(start_server, engines):
    """All that was sent before the signal is answered, whole and right; a full house and a busy path are refused."""
    server = start_server("--batch-tokens", "16", "--connections", "4")
    again = subprocess.run([*server.process.args[:-1], str(server.path)], capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert again.stderr == f"{server.path} is served already\n"

    ids = tiny_models.random_ids([12], seed=5)[0]
    expected = engines["plain"].embed([ids])[0]
    clients = [server.connect() for _ in range(4)]
    for client in clients:
        np.testing.assert_allclose(client.embed(ids), expected, atol=1e-5)
    assert server.connect().answer() is None  # the fifth
    for client in clients:
        for _ in range(50):
            client.send(ids.tobytes())
    counters = json.loads(server.stop(signal.SIGINT))
    assert counters["sequences"] == 4 + 4 * 50
    for client in clients:
        for _ in range(50):
            code, body = client.answer()
            assert code == OK
            np.testing.assert_allclose(np.frombuffer(body, np.float32), expected, atol=1e-5)
        assert client.answer() is None


def test_a_server_that_cannot_start(built, checkpoints, tmp_path):
    for arguments, message in (
        ([], "usage: funnel_server"),
        (["--queue", "0", "a", "b"], "--queue is 0; give a number of at least 1"),
        (["--batch-tokens", "7x", "a", "b"], "--batch-tokens is 7x"),
        ([tmp_path / "nowhere", tmp_path / "socket"], "nowhere is not a checkpoint"),
    ):
        done = subprocess.run(list(map(str, [built.server, *arguments])), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr
