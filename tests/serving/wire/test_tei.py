"""The routes of text-embeddings-inference: shapes, values, headers and refusals."""

import numpy as np
import pytest

from sentence_models import PROMPTS

TEXTS = ["a", "the small funnel pools pairs of tokens " * 5, "memory", "tokens and tokens", "a large funnel " * 9, "of"]
LONG = "tokens " * 1000


def post(client, path, **body):
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(client, path, **body):
    """The status and the body of a refusal."""
    reply = client.post(path, json=body)
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error", "error_type"]
    return reply.status_code, reply.json()


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"normalize": False}, {"normalize": False}),
        ({"dimensions": 5}, {"truncate_dim": 5}),
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
        ({"truncate": True}, {"truncate": True}),
        ({"truncate": None, "normalize": None, "prompt_name": None, "truncation_direction": None}, {}),
    ],
)
def test_embed_gives_the_engines_vectors_in_the_order_of_the_request(embedder, engine, options, arguments):
    found = np.array(post(embedder, "/embed", inputs=TEXTS, **options))
    np.testing.assert_allclose(found, engine.embed(TEXTS, **arguments), atol=1e-5)


def test_one_input_gives_an_array_with_one_vector(embedder, engine):
    np.testing.assert_allclose(post(embedder, "/embed", inputs="a"), engine.embed("a"), atol=1e-5)
    np.testing.assert_allclose(post(embedder, "/embed", inputs=[2, 150, 1]), engine.embed([[2, 150, 1]]), atol=1e-5)
    np.testing.assert_allclose(post(embedder, "/", inputs="a"), engine.embed("a"), atol=1e-5)


def test_truncation_cuts_either_side(embedder, engine):
    ids = engine.token_ids("a " + LONG, truncate=True).ids
    right = post(embedder, "/embed", inputs="a " + LONG, truncate=True)
    np.testing.assert_allclose(right, engine.embed([ids]), atol=1e-5)
    for direction in ("Left", "left"):
        left = post(embedder, "/embed", inputs="a " + LONG, truncate=True, truncation_direction=direction)
        assert np.abs(np.subtract(left, right)).max() > 1e-4


def test_embed_all_gives_the_rows(embedder, engine):
    found = post(embedder, "/embed_all", inputs=TEXTS)
    for rows, expected in zip(found, engine.hidden_states(TEXTS), strict=True):
        np.testing.assert_allclose(rows, expected, atol=1e-4)


def test_similarity_is_the_cosine_with_the_source(embedder, engine):
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS}
    found = post(embedder, "/similarity", inputs=inputs)
    vectors = engine.embed(TEXTS)
    np.testing.assert_allclose(found, vectors @ vectors[0], atol=1e-5)
    with_prompt = post(embedder, "/similarity", inputs=inputs, parameters={"prompt_name": "query"})
    vectors = engine.embed(TEXTS, prompt_name="query")
    np.testing.assert_allclose(with_prompt, vectors @ vectors[0], atol=1e-5)


def test_tokenize_gives_ids_and_the_characters_of_each_token(embedder, engine):
    text = "a small émile"
    (tokens,) = post(embedder, "/tokenize", inputs=text)
    assert [token["id"] for token in tokens] == engine.token_ids(text).ids.tolist()
    assert [list(token) for token in tokens] == [["id", "text", "special", "start", "stop"]] * len(tokens)
    assert [token["special"] for token in tokens] == [True, *[False] * (len(tokens) - 2), True]
    assert (tokens[0]["start"], tokens[0]["stop"]) == (None, None)
    covered = {position for token in tokens[1:-1] for position in range(token["start"], token["stop"])}
    assert covered == set(range(len(text)))
    (bare,) = post(embedder, "/tokenize", inputs=[text], add_special_tokens=False)
    assert bare == tokens[1:-1]


def test_tokenize_puts_the_prompt_before_the_text(embedder, engine):
    (tokens,) = post(embedder, "/tokenize", inputs="a small", prompt_name="query")
    assert [token["id"] for token in tokens] == engine.token_ids("a small", prompt_name="query").ids.tolist()
    assert max(token["stop"] or 0 for token in tokens) == len("a small")
    assert len(tokens) > len(PROMPTS["query"]) / 8


def test_decode_gives_the_texts_of_ids(embedder):
    sequences = [[token["id"] for token in tokens] for tokens in post(embedder, "/tokenize", inputs=TEXTS)]
    assert post(embedder, "/decode", ids=sequences) == TEXTS
    assert post(embedder, "/decode", ids=sequences[0]) == TEXTS[:1]
    assert post(embedder, "/decode", ids=sequences[0], skip_special_tokens=False) == ["<bos>a<eos>"]


def test_predict_gives_probabilities_of_all_labels_the_best_first(classifier):
    (one, *_), batch = post(classifier, "/predict", inputs="a"), post(classifier, "/predict", inputs=[["a"], ["of"]])
    assert list(one) == ["label", "score"] or list(one) == ["score", "label"]
    assert batch[0][0]["label"] == one["label"]
    for labelled in batch:
        scores = [item["score"] for item in labelled]
        assert sorted(item["label"] for item in labelled) == ["news", "other", "sport"]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-6)
        assert min(scores) > 0


def test_raw_scores_are_logits_with_the_same_order(classifier):
    scores, logits = (post(classifier, "/predict", inputs="a", raw_scores=raw) for raw in (False, True))
    assert [item["label"] for item in scores] == [item["label"] for item in logits]
    powers = np.exp([item["score"] for item in logits])
    np.testing.assert_allclose([item["score"] for item in scores], powers / powers.sum(), atol=1e-6)


def test_a_pair_is_not_two_texts(classifier):
    pair = post(classifier, "/predict", inputs=["a small", "funnel"])
    batch = post(classifier, "/predict", inputs=[["a small", "funnel"]])
    alone = post(classifier, "/predict", inputs="a small")
    assert [list(item) for item in pair] == [["label", "score"]] * 3
    assert [item["label"] for item in pair] == [item["label"] for item in batch[0]]
    np.testing.assert_allclose(*([item["score"] for item in each] for each in (pair, batch[0])), atol=1e-6)
    assert np.abs(np.subtract(*([item["score"] for item in each] for each in (pair, alone)))).max() > 1e-4


def test_rerank_sorts_by_relevance(reranker):
    ranks = post(reranker, "/rerank", query="a small", texts=TEXTS, return_text=True)
    assert sorted(rank["index"] for rank in ranks) == list(range(len(TEXTS)))
    assert all(rank["text"] == TEXTS[rank["index"]] for rank in ranks)
    scores = [rank["score"] for rank in ranks]
    assert scores == sorted(scores, reverse=True)
    logits = post(reranker, "/rerank", query="a small", texts=TEXTS, raw_scores=True)
    assert [list(rank) for rank in logits] == [["index", "score"]] * len(TEXTS)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp([-rank["score"] for rank in logits])), atol=1e-6)
    for rank in logits:  # the pair alone, by the other route
        ((alone,),) = post(reranker, "/predict", inputs=[["a small", TEXTS[rank["index"]]]], raw_scores=True)
        assert alone["score"] == pytest.approx(rank["score"], abs=1e-5)
    assert [rank["index"] for rank in post(reranker, "/", query="a small", texts=TEXTS)] == [
        rank["index"] for rank in logits
    ]


def test_headers_say_what_the_request_cost(embedder):
    reply = embedder.post("/embed", json={"inputs": ["a", "émile " + LONG], "truncate": True})
    assert reply.headers["x-compute-type"] == "cpu"
    assert reply.headers["x-compute-characters"] == str(len("a" + "émile " + LONG))
    assert reply.headers["x-compute-tokens"] == str(3 + 512)
    assert reply.headers["x-truncated-inputs"] == "1"
    total, inference = (int(reply.headers[f"x-{name}-time"]) for name in ("total", "inference"))
    assert 0 <= inference <= total
    assert {"x-compute-time", "x-tokenization-time", "x-queue-time"} <= set(reply.headers)


@pytest.mark.parametrize(
    ("path", "body", "status", "error_type"),
    [
        ("/embed", {"inputs": ""}, 400, "Empty"),
        ("/embed", {"inputs": []}, 400, "Empty"),
        ("/embed", {"inputs": LONG}, 422, "Validation"),
        ("/embed", {"inputs": LONG, "truncate": False}, 422, "Validation"),
        ("/embed", {"inputs": "a", "dimensions": 37}, 422, "Validation"),
        ("/embed", {"inputs": "a", "prompt_name": "passage"}, 422, "Validation"),
        ("/embed", {"inputs": [[512]]}, 422, "Validation"),
        ("/embed", {"inputs": 1}, 422, "Validation"),
        ("/embed", {}, 422, "Validation"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty"),
        ("/rerank", {"query": "a", "texts": []}, 400, "Empty"),
        ("/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend"),
        ("/predict", {"inputs": "a"}, 424, "Backend"),
        ("/classify", {"inputs": "a"}, 424, "Backend"),
        ("/tag", {"inputs": "a"}, 424, "Backend"),
    ],
    ids=str,
)
def test_refusals_have_teis_status_and_type(embedder, path, body, status, error_type):
    found, error = refusal(embedder, path, **body)
    assert (found, error["error_type"]) == (status, error_type)


def test_a_classifier_with_several_labels_does_not_rerank(classifier):
    status, error = refusal(classifier, "/rerank", query="a", texts=["b"])
    assert (status, error["error_type"]) == (424, "Backend")
    assert "3 labels" in error["error"]


def test_info_describes_the_model_and_the_limits(embedder, classifier, reranker, tagger):
    info = embedder.get("/info").json()
    assert info["model_id"] == info["served_model_name"] == "embedder"
    assert info["model_dtype"] == "float32"
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (info["max_input_length"], info["max_batch_tokens"], info["auto_truncate"]) == (512, 512, False)
    assert info["funnel"] == "none"
    assert "attention" in info["engine"]
    assert classifier.get("/info").json()["model_type"] == {
        "classifier": {
            "id2label": {"0": "news", "1": "sport", "2": "other"},
            "label2id": {"news": 0, "sport": 1, "other": 2},
        }
    }
    assert list(reranker.get("/info").json()["model_type"]) == ["reranker"]
    assert list(tagger.get("/info").json()["model_type"]) == ["tagger"]
