"""The server of examples/serve.py: many clients get their own vectors, and a wrong request gets a message."""

import http.client
import importlib.util
import json
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from funnel_engine import Engine, FunnelConfig, convert
from sentence_models import save_embedding_gemma
from tiny_models import TEXT, make_engine, tokenize

FILE = Path(__file__).parents[2] / "examples" / "serve.py"
TEXTS = ["a small funnel", "pools pairs of tokens", "a", "funnel of a funnel", "small pairs", "tokens"]


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine():
    return make_engine(tokenizer=tokenize, text=TEXT)


@pytest.fixture
def server(serve, engine):
    with serve.make_server(engine, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, body, path="/embed", method="POST", headers=None):
    """The status and the JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = json.dumps(body) if isinstance(body, (dict, list)) else body
    connection.request(method, path, data, headers or {})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_every_client_gets_the_vectors_of_its_own_texts(server, engine):
    requests = [[text] for text in TEXTS] + [TEXTS[:3], TEXTS[2:]]
    with ThreadPoolExecutor(len(requests)) as clients:
        answers = list(clients.map(lambda texts: ask(server, {"texts": texts}), requests))
    for texts, (status, content) in zip(requests, answers, strict=True):
        assert status == 200
        np.testing.assert_allclose(content["vectors"], engine.embed(texts), atol=1e-5)


def test_requests_that_wait_share_a_batch(serve, engine):
    """The queue is filled before the thread of the batcher starts."""
    batcher = object.__new__(serve.Batcher)
    batcher.engine, batcher.waiting = engine, queue.Queue(serve.MAX_WAITING)
    with ThreadPoolExecutor(len(TEXTS)) as clients:
        answers = [clients.submit(batcher.embed, [text], None) for text in TEXTS]
        while batcher.waiting.qsize() < len(TEXTS):
            pass
        calls = engine.stats()["calls"]
        threading.Thread(target=batcher.run, daemon=True).start()
        vectors = np.concatenate([answer.result() for answer in answers])
    assert engine.stats()["calls"] == calls + 1
    np.testing.assert_allclose(vectors, engine.embed(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("status", "message", "body"),
    [
        (400, "Expecting value", b"texts"),
        (400, "can't decode byte", b"\xff\xfe\xfd\xfc\xfb"),
        (400, "must be a JSON object", ["a"]),
        (400, '"texts" must be a list of strings', {}),
        (400, '"texts" must be a list of strings', {"texts": ["a", 2]}),
        (400, "is empty", {"texts": []}),
        (400, "more than the limit of 64", {"texts": ["a " * 100]}),
        (400, "prompt", {"texts": ["a"], "prompt_name": "unknown"}),
        (400, "prompt", {"texts": ["a"], "prompt_name": ["list"]}),
    ],
)
def test_a_wrong_request_gets_a_status_and_a_message(server, status, message, body):
    answer = ask(server, body)
    assert answer[0] == status
    assert message in answer[1]["error"]
    assert ask(server, {"texts": ["a"]})[0] == 200


def test_other_paths_and_a_body_without_a_length_or_too_long(server):
    assert ask(server, "", "/health", "GET") == (200, {"status": "ready"})
    assert ask(server, "", "/", "GET")[0] == 404
    assert ask(server, "{}", "/other")[0] == 404
    assert ask(server, iter([b"{}"]), headers={"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(server, "", headers={"Content-Length": str(2**20 + 1)})[0] == 413


def test_a_full_queue_and_a_broken_engine_are_told(serve, server, engine, monkeypatch):
    batcher = server.RequestHandlerClass.batcher
    with monkeypatch.context() as patch:
        patch.setattr(batcher, "waiting", queue.Queue(1))
        batcher.waiting.put(None)
        assert ask(server, {"texts": ["a"]})[0] == 503
    with monkeypatch.context() as patch:
        patch.setattr(engine, "embed", lambda _: 1 / 0)
        assert ask(server, {"texts": ["a"]}) == (500, {"error": "the engine failed; see the server's log"})
    assert ask(server, {"texts": ["a"]})[0] == 200


def test_the_command_loads_a_checkpoint_and_serves_it(serve, tmp_path, monkeypatch, capsys):
    save_embedding_gemma(tmp_path, layers=2)
    convert(tmp_path / "source", tmp_path / "checkpoint", dtype="float32")
    made, make_server = queue.Queue(), serve.make_server

    def remember(*arguments):
        server = make_server(*arguments)
        made.put(server)
        return server

    monkeypatch.setattr(serve, "make_server", remember)
    monkeypatch.setattr(serve, "BATCH_TOKENS", 64)  # fewer buckets to compile
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path / "checkpoint"), "--funnel", "1:2/mean", "--port", "0"])
    thread = threading.Thread(target=serve.main, daemon=True)
    thread.start()
    server = made.get(timeout=240)
    status, content = ask(server, {"texts": ["a text"], "prompt_name": "query"})
    server.shutdown()
    thread.join()
    engine = Engine.load(tmp_path / "checkpoint", funnel=FunnelConfig.after(1, pool="mean"), max_batch_tokens=64)
    assert status == 200
    np.testing.assert_allclose(content["vectors"], engine.embed("a text", prompt_name="query"), atol=1e-5)
    assert capsys.readouterr().out == f"ready on http://127.0.0.1:{server.server_port}\n"
