"""The example server of `examples/cpp_server`, and its batcher by itself."""

import json
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import tiny_models
from c_library import OPTIONS, run

OK, BAD_REQUEST, BUSY = 0, 1, 2
LOADING = BUSY, b"the model is being loaded; try again later"


def test_the_batcher(built):
    """Budget, order, overload, notices, a failing batch, and the end: see batcher.cc."""
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

    def ask(self, body: bytes) -> tuple[int, bytes] | None:
        self.send(body)
        return self.answer()

    def embed(self, ids: np.ndarray) -> np.ndarray:
        code, body = self.ask(ids.astype(np.int32).tobytes())
        assert code == OK, body
        return np.frombuffer(body, np.float32)

    def flood(self) -> None:
        """Sends requests and reads no answer, until that fails."""
        while True:
            self.send(b"1\0\0\0")


class Server(NamedTuple):
    process: subprocess.Popen
    path: Path
    log: Path

    def connect(self) -> Client:
        return Client(self.path)

    def wait_for_log(self, text: str) -> None:
        eventually(lambda: text in self.log.read_text())

    def listed(self, name: str) -> set[int]:
        """The ids of its threads, "task", or its descriptors, "fd"."""
        return set(map(int, os.listdir(f"/proc/{self.process.pid}/{name}")))

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Asks it to end, checks that it does so cleanly, and returns what it has printed."""
        self.process.send_signal(number)
        printed, _ = self.process.communicate(timeout=30)  # it promises ten seconds
        assert self.process.returncode == 0, self.log.read_text()
        assert not self.path.exists()
        return printed


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def launch_server(built, checkpoints, tmp_path_factory) -> Iterator[Any]:
    processes = []

    def launch(*arguments: str, engine_options: str = OPTIONS, environment: dict[str, str] | None = None) -> Server:
        folder = tmp_path_factory.mktemp("server")
        command = [built.server, *arguments, "--options", engine_options, checkpoints["plain"], folder / "socket"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        processes.append(process)
        return Server(process, folder / "socket", folder / "log")

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def start_server(launch_server) -> Callable[..., Server]:
    def start(*arguments: str) -> Server:
        server = launch_server(*arguments)
        assert server.process.stdout.readline() == f"ready on {server.path}\n", server.log.read_text()
        return server

    return start


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
        (b"12345", None, "a request has 5 bytes; give 4 for each token id, and 1 ... 16 ids"),
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
    assert bad.ask(b"") == (OK, b"")  # the health request

    bad.send(b"1234", size=40)  # leaves in the middle of a request
    bad.socket.close()
    np.testing.assert_allclose(good.embed(sequences[2]), expected[2], atol=1e-5)

    stalled = server.connect()
    stalled.socket.sendall(b"\x08")  # begins a request and falls silent; must not hold up the end
    counters = json.loads(server.stop())
    assert counters["compilations_after_warmup"] == 0
    assert counters["sequences"] == len(sequences) + 7
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
    fifth = server.connect()
    assert fifth.answer() == (BUSY, b"4 clients; try again later")
    assert fifth.answer() is None
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


def test_a_server_that_cannot_start(built, tmp_path):
    """Arguments and the path of the socket are checked before the checkpoint is looked at."""
    taken, link, long = tmp_path / "taken", tmp_path / "link", str(tmp_path / ("long" * 30))
    taken.write_text("precious")
    link.symlink_to(taken)
    nowhere = tmp_path / "nowhere"
    for arguments, message in (
        ([], "usage: funnel_server"),
        (["--patience", "1", "a", "b"], "usage: funnel_server"),
        (["--queue", "0", "a", "b"], "--queue is 0; give a number of 1 ... 999999"),
        (["--batch-tokens", "7x", "a", "b"], "--batch-tokens is 7x"),
        (["--timeout", "-1", "a", "b"], "--timeout is -1"),
        (["--connections", "9" * 30, "a", "b"], "--connections is 9999"),
        ([nowhere, ""], "SOCKET is empty; give a path"),
        ([nowhere, long], f"{long} has {len(long)} bytes; the path of a socket has at most 107"),
        ([nowhere, taken], f"{taken} exists and is not a socket; give another path"),
        ([nowhere, link], f"{link} exists and is not a socket"),
        ([nowhere, tmp_path], f"{tmp_path} exists and is not a socket"),
        ([nowhere, nowhere / "socket"], f"cannot open {nowhere}: No such file or directory"),
        ([nowhere, tmp_path / "socket"], "nowhere is not a checkpoint"),
    ):
        done = subprocess.run(list(map(str, [built.server, *arguments])), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr
    assert taken.read_text() == "precious"
    assert link.is_symlink()
    assert not (tmp_path / "socket").exists()


def test_the_end_while_the_model_is_loaded(launch_server, tmp_path):
    """Clients are told to wait, the path is taken, and a signal is not held up by the compiler."""
    slow = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    server = launch_server(engine_options="{}", environment=slow)  # every bucket, none of them compiled before
    server.wait_for_log("loading ")
    client = server.connect()
    assert client.ask(b"") == LOADING
    assert client.ask(bytes(1_000_000)) == LOADING
    again = subprocess.run(server.process.args, capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stderr) == (1, f"{server.path} is served already\n")
    server.wait_for_log("compiling every size of batch\n")
    assert server.stop() == ""


def test_a_client_that_does_nothing_is_disconnected(start_server):
    server = start_server("--timeout", "2")
    silent, half, slow, deaf = (server.connect() for _ in range(4))
    half.socket.sendall(b"\x08")
    slow.send(b"1234", size=8)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        deaf.flood()
    for client in (silent, half, slow):
        assert client.answer() is None
    assert server.connect().ask(b"") == (OK, b"")

    server.path.unlink()  # somebody else has the path by now
    server.path.touch()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=30)
    assert server.path.exists()


def test_more_clients_than_it_can_serve(start_server, engines):
    """With the settings that it has by default."""
    server = start_server()
    threads, descriptors = len(server.listed("task")), len(server.listed("fd"))
    clients = [server.connect() for _ in range(250)]
    for client in clients:
        assert client.ask(b"") == (OK, b"")
    assert len(server.listed("task")) < threads + 25  # a client costs no thread; a few are the engine's

    ids = tiny_models.random_ids([16], seed=6)[0]
    expected = engines["plain"].embed([ids])[0]
    codes: set[int] = set()
    for _ in range(100):  # the queue overflows sooner or later, and not every request is refused
        for client in clients:
            client.send(ids.tobytes())
        for client in clients:
            code, body = client.answer()
            codes.add(code)
            if code == OK:
                np.testing.assert_allclose(np.frombuffer(body, np.float32), expected, atol=1e-5)
            else:
                assert (code, body) == (BUSY, b"64 requests wait; try again later")
        if codes == {OK, BUSY}:
            break
    assert codes == {OK, BUSY}
    for client in clients[1:]:
        client.socket.close()
    client = clients[0]

    # Without descriptors it serves those whom it has, waits without work, and accepts the others later.
    eventually(lambda: len(server.listed("fd")) < descriptors + 25)  # those of the clients that have left are closed
    used = server.listed("fd")
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (max(used) + 1, limits[1]))
    accepted, others = ([server.connect() for _ in range(count)] for count in (max(used) + 1 - len(used), 10))
    server.wait_for_log("cannot accept a client: Too many open files")
    before = server.processor_seconds()
    time.sleep(2)
    assert server.processor_seconds() - before < 1
    assert client.ask(b"") == (OK, b"")
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
    for other in accepted + others:
        assert other.ask(b"") == (OK, b"")


def test_a_slow_reader_does_not_hold_up_the_end(start_server):
    server = start_server()
    client = server.connect()
    client.socket.settimeout(3)
    with pytest.raises(TimeoutError):
        client.flood()
    client.socket.settimeout(60)

    ended = threading.Event()

    def read_slowly() -> None:
        while not ended.wait(0.5) and client.socket.recv(80):
            pass

    reader = threading.Thread(target=read_slowly)
    reader.start()
    try:
        assert json.loads(server.stop())["compilations_after_warmup"] == 0
    finally:
        ended.set()
        reader.join()
