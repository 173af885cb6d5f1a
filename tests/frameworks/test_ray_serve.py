"""The deployment of Ray Serve answers as `funnel serve` does, and asks for replicas by rows."""

import asyncio
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)
import ray
from ray import serve

from funnel_engine import Engine
from funnel_serving.ray.deployment import WAITING_ROWS, RowsPolicy, deploy
from funnel_serving.settings import Settings

PORT = 18231
ADDRESS = f"http://127.0.0.1:{PORT}"
TEXTS = ["the small funnel pools pairs", "a large memory"]
DOCUMENTS = ["the small funnel pools pairs of tokens and keeps every large memory " * 8] * 400


@pytest.fixture(scope="module")
def served(checkpoint):
    """One replica, and a second one as soon as rows wait; there is no third."""
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    settings = Settings(checkpoint=checkpoint, warmup="none", max_batch_tokens=1024)
    serve.run(
        deploy(
            settings,
            max_replicas=2,
            rows_per_replica=2048,
            upscale_delay_s=0.1,
            downscale_delay_s=600,
            look_back_period_s=1,
            metrics_interval_s=0.2,
        )
    )
    yield
    serve.shutdown()
    ray.shutdown()


def post(texts, **fields):
    body = {"model": "checkpoint", "input": texts, "encoding_format": "float"} | fields
    return httpx.post(f"{ADDRESS}/v1/embeddings", json=body, timeout=120)


def replicas():
    return serve.status().applications["default"].deployments["funnel"].replica_states


def test_it_answers_as_the_server_does(served, checkpoint):
    reply = post(TEXTS)
    assert reply.status_code == 200, reply.text
    vectors = [each["embedding"] for each in reply.json()["data"]]
    np.testing.assert_allclose(vectors, Engine.load(checkpoint).embed(TEXTS), atol=2e-5)
    assert httpx.get(f"{ADDRESS}/health/ready").json() == {"status": "ready"}
    assert httpx.get(f"{ADDRESS}/v1/models").json()["data"][0]["id"] == "checkpoint"
    refused = post(["a", ""])
    assert refused.status_code == 400
    assert "empty" in refused.json()["error"]["message"]
    assert "x-request-id" in refused.headers


def test_waiting_rows_bring_a_second_replica(served):
    assert replicas().get("RUNNING") == 1

    async def load():
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"model": "checkpoint", "input": DOCUMENTS}
            sent = [asyncio.create_task(client.post(f"{ADDRESS}/v1/embeddings", json=body)) for _ in range(6)]
            until = time.monotonic() + 90
            while sum(replicas().values()) < 2:
                assert time.monotonic() < until
                await asyncio.sleep(0.2)
            return [reply.status_code for reply in await asyncio.gather(*sent)]

    assert asyncio.run(load()) == [200] * 6


@pytest.mark.parametrize(("waiting", "wanted"), [({}, 0), ({"a": 5}, 1), ({"a": 900, "b": 100}, 10), ({"a": 101}, 2)])
def test_the_policy_divides_the_rows_of_all_replicas(waiting, wanted):
    context = SimpleNamespace(aggregated_metrics={WAITING_ROWS: waiting} if waiting else None)
    assert RowsPolicy(100)(context) == (wanted, {})
