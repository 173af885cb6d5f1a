"""A running server: keys, ids, the log, health, metrics, options of requests, and answers by value."""

import http.client
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from funnel_engine.results import finish_vectors
from funnel_engine.text import JsonTokenizer
from funnel_serving.refusals import KINDS
from gated_engine import GatedEngine
from running_server import client, running, wait_for
from tiny_models import TEXT, WORDS, make_engine, make_tokenizer

KEY = "a-key-of-this-server"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    make_tokenizer().save(str(file))
    engine = make_engine(tokenizer=JsonTokenizer(file), text=TEXT, max_batch_tokens=16)
    engine.warmup(progress=False)
    return engine


@pytest.fixture(scope="module")
def server(engine):
    with running(engine) as server:
        yield server


@pytest.mark.slow
def test_thousands_of_requests_of_many_clients_get_their_own_vectors(server, engine):
    """And nothing is compiled, and no row of the queue is forgotten."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS[4:], length % 10 + 1)) for length in range(50)]
    vectors = engine.embed(texts, normalize=False)

    def ask(seed):
        generator = np.random.default_rng(seed)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        for _ in range(150):
            chosen, size = generator.integers(0, len(texts), generator.integers(1, 5)), int(generator.integers(1, 25))
            body = {"inputs": [texts[index] for index in chosen], "dimensions": size}
            connection.request("POST", "/embed", json.dumps(body))
            found = json.loads(connection.getresponse().read())
            np.testing.assert_allclose(found, finish_vectors(vectors[chosen], size, normalize=True), atol=1e-5)
        connection.close()

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(ask, range(16)))
    with client(server) as asking:
        metrics = read_metrics(asking)
    assert metrics["funnel_compilations_after_warmup_total"] == 0
    assert metrics["funnel_waiting_rows"] == metrics["funnel_waiting_requests"] == metrics["te_queue_size"] == 0
    assert metrics["te_embed_duration_count"] == metrics['funnel_requests_total{method="embed"}'] >= 16 * 150


def test_the_openai_client_gets_the_engines_vectors(server, engine):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as api:
        reply = api.embeddings.create(model="tiny", input=["a small funnel", "tokens"], dimensions=8)
    expected = engine.embed(["a small funnel", "tokens"], truncate_dim=8)
    np.testing.assert_allclose([each.embedding for each in reply.data], expected, atol=1e-6)
    assert reply.usage.total_tokens == 6


def test_a_single_request_has_the_bits_of_the_engine(server, engine):
    with client(server) as asking:
        for options, theirs in (({"normalize": False}, {"normalize": False}), ({"dimensions": 7}, {"truncate_dim": 7})):
            reply = asking.post("/embed", json={"inputs": ["a small funnel", "tokens"], **options})
            np.testing.assert_array_equal(
                np.array(reply.json(), np.float32), engine.embed(["a small funnel", "tokens"], **theirs)
            )


def test_headers_say_what_was_computed_and_how_long_it_took(server):
    with client(server) as asking:
        reply = asking.post("/embed", json={"inputs": "a " * 50, "truncate": True})
    assert (reply.headers["x-compute-tokens"], reply.headers["x-truncated-inputs"]) == ("16", "1")
    assert {f"x-{part}-time" for part in ("total", "tokenization", "queue", "inference")} < set(reply.headers)


def test_a_sane_request_id_is_kept_and_another_one_is_made(server, caplog):
    caplog.set_level(logging.INFO, "funnel_serving")
    with client(server) as asking:
        for given in ("abc-1.2", "a" * 129, "with space", ""):
            reply = asking.post("/embed", json={"inputs": "a"}, headers={"x-request-id": given})
            made = reply.headers["x-request-id"]
            assert (made == given) == (given == "abc-1.2")
            assert made
            wait_for(lambda made=made: any(getattr(record, "id", None) == made for record in caplog.records))
    record = next(record for record in caplog.records if getattr(record, "id", None) == "abc-1.2")
    assert (record.method, record.path, record.status) == ("POST", "/embed", 200)


def test_health_and_metrics_are_open_and_everything_else_needs_a_key(engine):
    with running(engine, api_keys=("another-key", KEY)) as server, client(server) as asking:
        for path in ("/health", "/health/live", "/health/ready", "/ping", "/metrics"):
            assert asking.get(path).status_code == 200
        for value in (None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x", "Bearer \xe9"):
            headers = {} if value is None else {"authorization": value.encode("latin-1")}
            for method, path in (("POST", "/embed"), ("GET", "/info"), ("GET", "/nothing")):
                reply = asking.request(
                    method, path, headers=headers, content=b'{"inputs": "a"}' if method == "POST" else b""
                )
                assert reply.status_code == 401
                assert reply.headers["www-authenticate"] == "Bearer"
        for value in (f"Bearer {KEY}", f"bearer {KEY}", "Bearer another-key"):
            assert asking.post("/embed", json={"inputs": "a"}, headers={"authorization": value}).status_code == 200
    with running(engine, api_keys=(KEY,), metrics_need_key=True) as server, client(server) as asking:
        assert asking.get("/metrics").status_code == 401
        assert asking.get("/health").status_code == 200


def test_unknown_paths_and_methods(server):
    with client(server) as asking:
        reply = asking.get("/v1/nothing")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        assert asking.get("/embed").status_code == 405
        assert asking.get("/embed").headers["allow"] == "POST"
        assert "it takes POST" in asking.get("/embed").json()["error"]


def test_the_queue_is_bounded_and_a_deadline_is_kept(engine):
    gated = GatedEngine(engine)
    with (
        running(gated, max_waiting_rows=40, request_seconds=1.0, stall_seconds=0.2) as server,
        client(server) as asking,
    ):
        wait = [
            threading.Thread(target=asking.post, args=("/embed",), kwargs={"json": {"inputs": "a"}}) for _ in range(2)
        ]
        wait[0].start()
        wait_for(lambda: len(gated.started) == 1)
        for thread in wait[1:]:
            thread.start()
        with client(server) as other:
            timed_out = other.post("/v1/embeddings", json={"input": ["a"] * 4, "model": "tiny"})
            assert (timed_out.status_code, timed_out.json()["error"]["code"]) == (504, "timeout")
            assert other.get("/health/live").status_code == 503
            assert other.get("/health").json() == {"status": "stalled"}
            never = other.post("/embed", json={"inputs": ["a " * 10] * 4})
            assert never.status_code == 413
            gated.gate.set()
            for thread in wait:
                thread.join()
            wait_for(lambda: other.get("/health/live").status_code == 200)
            assert other.post("/embed", json={"inputs": "a"}).status_code == 200


def test_too_many_requests_are_told_when_to_come_back(engine):
    gated = GatedEngine(engine)
    with running(gated, max_waiting_requests=1) as server, ThreadPoolExecutor(2) as pool:

        def ask(length):
            with client(server) as asking:
                return asking.post("/v1/embeddings", json={"input": "a " * length, "model": "tiny"})

        first = pool.submit(ask, 14)
        wait_for(lambda: len(gated.started) == 1)
        second = pool.submit(ask, 1)
        wait_for(lambda: len(server.service.batcher._waiting) == 1)
        refused = ask(1)
        assert refused.status_code == 429
        assert ask(100_000).status_code == 429, "what must be refused is tokenised before, or it would be too long"
        assert refused.headers["retry-after"] == "1"
        gated.gate.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]


def test_all_series_exist_before_the_first_request(engine):
    with running(engine) as server, client(server) as asking:
        before = read_metrics(asking)
        for kind in KINDS:
            assert before[f'funnel_failures_total{{kind="{kind}"}}'] == 0
        asking.post("/embed", json={"inputs": ["a", "b"]})
        asking.post("/embed", json={"inputs": "a"})
        asking.post("/embed", json={"inputs": []})
        asking.post("/predict", json={"inputs": "a"})
        after = read_metrics(asking)
        assert set(after) == set(before)
        changes = {name: after[name] - before[name] for name in after if not name.endswith(("_sum", "_bucket"))}
        assert (
            changes['funnel_failures_total{kind="empty"}'] == changes['funnel_failures_total{kind="unsupported"}'] == 1
        )
        assert changes['te_embed_success{method="batch"}'] == changes['te_embed_success{method="single"}'] == 1
        assert changes['te_request_failure{err="validation"}'] == changes['te_request_failure{err="model_type"}'] == 1
        assert changes["funnel_sequences_total"] == changes["te_request_input_length_count"] == 3
        assert changes['funnel_http_responses_total{status="2xx"}'] >= 2


def read_metrics(asking):
    lines = asking.get("/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_the_description_and_the_tokenizer_are_there(server):
    with client(server) as asking:
        description = json.loads(asking.get("/openapi.json").content)
        assert "/v1/embeddings" in description["paths"]
        reply = asking.post("/tokenize", json={"inputs": "a small"})
        assert [token["text"] for token in reply.json()[0]] == ["<bos>", "a", "small"]
        assert asking.post("/decode", json={"ids": [4, 5]}).json() == ["a small"]
