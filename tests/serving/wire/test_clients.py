"""Official clients against a server that listens: openai-python, huggingface_hub and curl."""

import asyncio
import json
import shutil
import subprocess

import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from funnel_serving import wire
from funnel_serving.refusals import Refusal
from serving_apps import listening

TEXTS = ["a", "the small funnel pools pairs of tokens " * 5, "memory", "tokens and tokens", "a large funnel " * 9, "of"]


@pytest.fixture(scope="module")
def address(embedder):
    with listening(embedder.app) as each:
        yield each


@pytest.fixture(scope="module")
def sdk(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused") as each:
        yield each


def test_openais_client_gets_base64_by_default_and_decodes_it(sdk, engine):
    reply = sdk.embeddings.create(model="embedder", input=TEXTS)
    assert [item.index for item in reply.data] == list(range(len(TEXTS)))
    np.testing.assert_allclose([item.embedding for item in reply.data], engine.embed(TEXTS), atol=1e-5)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens == len(engine.token_ids(TEXTS).ids)


def test_openais_client_gets_numbers_and_fewer_dimensions(sdk, engine):
    reply = sdk.embeddings.create(model="embedder", input=TEXTS[1], encoding_format="float", dimensions=7)
    np.testing.assert_allclose([reply.data[0].embedding], engine.embed(TEXTS[1], truncate_dim=7), atol=1e-5)


def test_openais_client_lists_the_model(sdk):
    (model,) = sdk.models.list()
    assert model.id == "embedder"
    assert sdk.models.retrieve("embedder") == model


def test_openais_asynchronous_client(address, engine):
    async def embed():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="unused") as each:
            return await each.embeddings.create(model="embedder", input=TEXTS)

    reply = asyncio.run(embed())
    np.testing.assert_allclose([item.embedding for item in reply.data], engine.embed(TEXTS), atol=1e-5)


def test_openais_client_raises_what_it_raises_for_openai(sdk):
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.embeddings.create(model="embedder", input=["a", ""])
    assert (raised.value.param, raised.value.code) == ("input[1]", "empty")
    assert raised.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model="text-embedding-3-small", input="a")


@pytest.mark.parametrize(
    ("kind", "error"),
    [("unauthorized", openai.AuthenticationError), ("unhealthy", openai.InternalServerError)],
)
def test_openais_client_knows_the_other_refusals(kind, error):
    async def refuse(scope, receive, send):
        await wire.refusal_response(scope["path"], Refusal(kind, "a reason"))(scope, receive, send)

    with (
        listening(refuse) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as each,
        pytest.raises(error) as raised,
    ):
        each.embeddings.create(model="embedder", input="a")
    assert raised.value.body["message"] == "a reason"
    assert raised.value.code == kind


def test_openais_client_asks_again_when_the_queue_was_full(embedder, engine):
    """The server refuses it twice, as a full queue does; the client waits as long as it is told."""
    refusals = [Refusal("overloaded", "the queue is full", retry_after=0.02) for _ in range(2)]

    async def refuse_at_first(scope, receive, send):
        if refusals:
            await wire.refusal_response(scope["path"], refusals.pop())(scope, receive, send)
        else:
            await embedder.app(scope, receive, send)

    with listening(refuse_at_first) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as each:
        reply = each.embeddings.create(model="embedder", input="a")
        assert not refusals
        np.testing.assert_allclose([reply.data[0].embedding], engine.embed("a"), atol=1e-5)
        refusals.append(Refusal("overloaded", "the queue is full", retry_after=0.02))
        with pytest.raises(openai.RateLimitError) as raised:
            each.with_options(max_retries=0).embeddings.create(model="embedder", input="a")
    assert raised.value.response.headers["retry-after"] == "1"
    assert raised.value.response.headers["retry-after-ms"] == "20"


@pytest.mark.parametrize("path", ["", "/", "/embed"])
def test_hugging_faces_client_gets_vectors(address, engine, path):
    client = InferenceClient(f"{address}{path}")
    np.testing.assert_allclose(client.feature_extraction(TEXTS[1]), engine.embed(TEXTS[1]), atol=1e-5)
    found = client.feature_extraction(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, engine.embed(TEXTS), atol=1e-5)


def test_hugging_faces_client_has_options(address, engine):
    client = InferenceClient(address)
    long = "tokens " * 1000
    options = {"normalize": False, "prompt_name": "query", "truncate": True, "dimensions": 9}
    found = client.feature_extraction(long, truncation_direction="right", **options)
    expected = engine.embed(long, normalize=False, prompt_name="query", truncate=True, truncate_dim=9)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(HfHubHTTPError, match="422"):
        client.feature_extraction(long, truncate=False)


def test_hugging_faces_client_compares_sentences(address, engine):
    vectors = engine.embed(TEXTS)
    found = InferenceClient(f"{address}/similarity").sentence_similarity(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose(found, vectors[1:] @ vectors[0], atol=1e-5)


def test_hugging_faces_client_classifies_texts(classifier):
    expected = classifier.post("/classify", json={"inputs": "a small funnel"}).json()[0]
    with listening(classifier.app) as address:
        client = InferenceClient(f"{address}/classify")
        assert [(item.label, item.score) for item in client.text_classification("a small funnel")] == [
            (item["label"], pytest.approx(item["score"], abs=1e-6)) for item in expected
        ]
        assert len(client.text_classification("a small funnel", top_k=1)) == 1
        with pytest.raises(HfHubHTTPError, match="422"):
            client.text_classification("a small funnel", function_to_apply="sigmoid")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
def test_curl(address, engine):
    command = ["curl", "--silent", "--show-error", "--fail-with-body", f"{address}/embed", "--json"]
    done = subprocess.run([*command, '{"inputs": "a"}'], capture_output=True, check=True, timeout=60)
    np.testing.assert_allclose(json.loads(done.stdout), engine.embed("a"), atol=1e-5)
    refused = subprocess.run([*command, '{"inputs": '], capture_output=True, check=False, timeout=60)
    assert refused.returncode == 22
    assert json.loads(refused.stdout)["error_type"] == "Validation"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/nothing", None, 404),
        ("GET", "/v1/embeddings", None, 405),
        ("GET", "/embed", None, 405),
        ("POST", "/v1/embeddings", b"{", 400),
        ("POST", "/embed", b"{", 422),
        ("POST", "/v1/embeddings", b" " * (2**25 + 1), 413),
        ("POST", "/embed", b" " * (2**25 + 1), 413),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_the_refusals_of_http_itself_have_the_form_of_the_route(embedder, method, path, body, status):
    reply = embedder.request(method, path, content=body)
    assert reply.status_code == status
    if path.startswith("/v1"):
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.json()["error"]["type"] == "invalid_request_error"
    else:
        assert reply.json()["error_type"] == "Validation"
