"""`/v1/embeddings` and `/v1/models`: shapes, values, and refusals."""

import base64

import numpy as np
import pytest

TEXTS = ["a", "the small funnel pools pairs of tokens " * 5, "memory", "tokens and tokens", "a large funnel " * 9, "of"]


def embed(client, **body):
    reply = client.post("/v1/embeddings", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def vectors(reply):
    return np.array([item["embedding"] for item in reply["data"]], np.float32)


def refusal(client, **body):
    """The status of a refusal and the object in its body."""
    reply = client.post("/v1/embeddings", json=body)
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    return reply.status_code, reply.json()["error"]


def test_the_reply_has_openais_shape(embedder):
    reply = embed(embedder, input=["a", "small tokens"], model="embedder")
    lengths = [len(ids) for ids in embedder.post("/tokenize", json={"inputs": ["a", "small tokens"]}).json()]
    assert list(reply) == ["object", "data", "model", "usage"]
    assert reply["object"] == "list"
    assert reply["model"] == "embedder"
    assert reply["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    assert [list(item) for item in reply["data"]] == [["object", "index", "embedding"]] * 2
    assert [item["index"] for item in reply["data"]] == [0, 1]
    assert {item["object"] for item in reply["data"]} == {"embedding"}


def test_vectors_are_the_engines_in_the_order_of_the_request(embedder, engine):
    found = vectors(embed(embedder, input=TEXTS))
    np.testing.assert_allclose(found, engine.embed(TEXTS), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_base64_has_the_bits_of_the_numbers(embedder):
    numbers = vectors(embed(embedder, input=TEXTS))
    encoded = embed(embedder, input=TEXTS, encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in encoded["data"]]
    np.testing.assert_array_equal(np.stack(decoded), numbers)


def test_token_ids_give_the_vectors_of_their_text(embedder, engine):
    sequences = [sequence.tolist() for sequence in np.split(*split_points(engine.token_ids(TEXTS)))]
    np.testing.assert_allclose(vectors(embed(embedder, input=sequences)), engine.embed(TEXTS), atol=1e-5)
    np.testing.assert_allclose(vectors(embed(embedder, input=sequences[1])), engine.embed(TEXTS[1]), atol=1e-5)


def split_points(ragged):
    return ragged.ids, ragged.offsets[1:-1]


def test_dimensions_are_cut_and_then_normalised(embedder, engine):
    found = vectors(embed(embedder, input=TEXTS, dimensions=5))
    np.testing.assert_allclose(found, engine.embed(TEXTS, truncate_dim=5), atol=1e-5)


@pytest.mark.parametrize(("limit", "tokens"), [(-1, 512), (7, 7), (512, 512), (1, 1)])
def test_truncation_runs_so_many_tokens_and_usage_says_so(embedder, limit, tokens):
    reply = embedder.post("/v1/embeddings", json={"input": "tokens " * 1000, "truncate_prompt_tokens": limit})
    assert reply.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert reply.headers["x-truncated-inputs"] == "1"


def test_without_truncation_a_long_input_is_refused(embedder):
    status, error = refusal(embedder, input=["a", "tokens " * 1000])
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert "512" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        ({"input": "a", "dimensions": 37}, "dimensions"),
        ({"input": "a", "dimensions": -1}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": [[2, 512]]}, None),
        ({"input": [[2, -1]]}, None),
        ({"input": [[2**65]]}, None),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({}, "input"),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_by_name(embedder, body, param):
    status, error = refusal(embedder, **body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)


def test_token_ids_are_refused_unless_the_server_allows_them(classifier):
    status, error = refusal(classifier, input=[[2, 5]])
    assert (status, error["param"]) == (400, "input")
    assert "check_embedding_ctx_length=False" in error["message"]


def test_another_model_is_not_found(embedder):
    status, error = refusal(embedder, input="a", model="text-embedding-3-small")
    assert (status, error["code"], error["param"]) == (404, "not_found", "model")
    assert "'embedder'" in error["message"]


def test_the_model_is_listed_with_its_limit(embedder):
    (card,) = embedder.get("/v1/models").json()["data"]
    created = card.pop("created")
    assert isinstance(created, int)
    assert card == {"id": "embedder", "object": "model", "owned_by": "funnel-engine", "max_model_len": 512}
    assert embedder.get("/v1/models/embedder").json() == card | {"created": created}
    assert embedder.get("/v1/models/google/embeddinggemma-300m").status_code == 404


def test_embeddings_without_v1_is_the_same(embedder):
    body = {"input": TEXTS[:2]}
    assert embedder.post("/embeddings", json=body).content == embedder.post("/v1/embeddings", json=body).content
