"""What hostile and broken clients do: each gets a clear status or loses its connection, and the server goes on."""

import contextlib
import json
import re
import threading
import time

import numpy as np
import pytest

from funnel_engine.text import JsonTokenizer
from gated_engine import GatedEngine
from running_server import client, connect, post, read_all, running, wait_for
from tiny_models import TEXT, make_engine, make_tokenizer

SECONDS = 0.5  # the limit for slow clients
ASK = post("/embed", {"inputs": "a"})


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    make_tokenizer().save(str(file))
    engine = make_engine(tokenizer=JsonTokenizer(file), text=TEXT)
    engine.embed(["a"])
    return engine


@pytest.fixture(scope="module")
def server(engine):
    with running(engine, body_seconds=SECONDS, max_body_bytes=10**6, max_waiting_rows=30_000) as server:
        yield server


@pytest.fixture(autouse=True)
def the_server_goes_on(server):
    yield
    with client(server) as http:
        assert http.post("/embed", json={"inputs": "a"}).status_code == 200
    wait_for(lambda: not server.server_state.connections and not server.server_state.tasks)


def statuses(received):
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", received)]


def test_slow_and_half_sent_requests_time_out(server):
    """Also if it sends a byte now and then, and also after the headers."""
    for begin in (b"", b"POST /embed HT", ASK.partition(b"\r\n\r\n")[0], ASK[:-3], b"\r\n"):
        with connect(server) as connection:
            connection.sendall(begin)
            assert statuses(read_all(connection)) == [408], begin
    with connect(server) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in ASK[: len(ASK) // 2]:
            connection.sendall(bytes([byte]))
            time.sleep(0.03)
        pytest.fail("the server reads for ever")


def test_clients_that_leave_at_any_moment(server):
    for length in range(0, len(ASK) + 1, 7):
        with connect(server) as connection:
            connection.sendall(ASK[:length])


def test_a_client_that_leaves_takes_its_request_out_of_the_queue(engine):
    gated = GatedEngine(engine)
    with running(gated) as server:
        with connect(server) as connection:
            connection.sendall(post("/embed", {"inputs": "a " * 40}))
            wait_for(lambda: len(gated.started) == 1)
            with connect(server) as other:
                other.sendall(ASK)
                wait_for(lambda: server.service.batcher._waiting)
            wait_for(lambda: not server.service.batcher._waiting)
            gated.gate.set()
            connection.shutdown(1)
            wait_for(lambda: not server.server_state.tasks)
        assert server.service.metrics.dropped._value.get() == 1
        assert len(gated.started) == 1


def test_a_client_that_does_not_read_loses_its_connection(server):
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(post("/embed_all", {"inputs": ["a " * 60] * 400}))  # replies of megabytes
        wait_for(lambda: server.server_state.total_requests)
        wait_for(lambda: not server.server_state.connections)


def test_bodies_that_are_too_large(server):
    large = post("/embed", b"[" * 5_000_000, connection="close")
    assert b"the body has 5000000 bytes, more than the limit of 1000000" in exchange(server, large)
    asking = post("/embed", b"", expect="100-continue").replace(b"content-length: 0", b"content-length: 5000000")
    assert statuses(exchange(server, asking)) == [413]
    with client(server) as http:
        for size in (2 * 10**6, 100 * 10**6):
            assert http.post("/embed", content=b"x" * size).status_code == 413
        chunks = (b"x" * 65536 for _ in range(200))  # whose total nobody tells
        assert http.post("/embed", content=chunks).status_code == 413
        assert http.post("/embed", json={"inputs": "a"}).status_code == 200


def test_headers_that_are_too_many(server):
    for flood in (b"x: y\r\n" * 40_000, b"x: " + b"y" * 200_000 + b"\r\n", b"x" * 200_000):
        received = exchange(server, b"GET /info HTTP/1.1\r\n" + flood + b"\r\n")
        assert statuses(received) in ([431], [400], []), received[:100]
    assert statuses(exchange(server, b"GET /info HTTP/1.1\r\n" + b"x: " + b"y" * 70_000 + b"\r\n\r\n"))[:1] == [431]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (422, b""),
        (422, b"{"),
        (422, b"\xff\xfe"),
        (422, b"[" * 100_000 + b"]" * 100_000),
        (422, b'{"inputs": ' * 50_000),
        (422, b'{"inputs": [NaN]}'),
        (422, b'{"inputs": "\\ud800"}'),
        (422, b'{"inputs": 1e999}'),
        (422, b'{"inputs": [[1e5]]}'),
        (422, b'{"inputs": [[123456789012345678901234567890]]}'),
        (422, b'{"inputs": {"a": 1}}'),
        (422, b'{"inputs": "a", "dimensions": -1}'),
        (400, b'{"inputs": []}'),
        (422, json.dumps({"inputs": "a " * 400_000}).encode()),
        (413, json.dumps({"inputs": ["a " * 60] * 600}).encode()),
        (200, json.dumps({"inputs": "\x00 \n \x7f \u2028"}).encode()),
    ],
)
def test_bodies_that_are_wrong(server, status, body):
    assert statuses(exchange(server, post("/embed", body, connection="close"))) == [status]


def test_ten_thousand_texts_are_served_beside_short_requests(server, engine):
    texts = ["a", "a small", "funnel pools"] * 3334
    replies = []

    def ask():
        with client(server) as http:
            replies.append(http.post("/embed", json={"inputs": texts}))

    thread = threading.Thread(target=ask)
    thread.start()
    with client(server) as http:
        while thread.is_alive():
            assert http.post("/embed", json={"inputs": "a"}).status_code == 200
    thread.join()
    expected = np.tile(engine.embed(texts[:3]), (3334, 1))
    np.testing.assert_allclose(replies[0].json(), expected, atol=1e-5)


def test_pipelined_requests_are_answered_in_order(server):
    sizes = [3, 1, 7, 2, 5]
    sent = b"".join(post("/embed", {"inputs": "a", "dimensions": size}) for size in sizes)
    with connect(server) as connection:
        connection.sendall(sent + post("/embed", b"{}", connection="close"))
        received = read_all(connection)
    assert statuses(received) == [200] * 5 + [422]
    vectors = re.findall(rb"\r\n\r\n(\[\[.*?\]\])", received)
    assert [len(json.loads(vector)[0]) for vector in vectors] == sizes


def test_bytes_that_are_not_http(server):
    for data in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /embed HTTP/1.1\r\ncontent-length: x\r\n\r\n"):
        assert statuses(exchange(server, data)) == [400]
    two_lengths = b"POST /embed HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n"
    assert statuses(exchange(server, two_lengths)) == [400]


def test_no_thread_is_left(engine):
    before = set(threading.enumerate())
    with running(engine) as server, client(server) as http:
        for _ in range(5):
            http.post("/embed", json={"inputs": ["a " * 50] * 100})
    left = {thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()}
    assert not {name for name in left if not name.startswith("tokenizer")}


def exchange(server, data):
    """What the server answers until it closes the connection."""
    with connect(server) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        return read_all(connection)
