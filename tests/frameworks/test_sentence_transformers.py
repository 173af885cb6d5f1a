"""The evaluators of sentence-transformers give our encoder the scores that they give the library's own model."""

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    MSEEvaluator,
    ParaphraseMiningEvaluator,
    RerankingEvaluator,
    TranslationEvaluator,
    TripletEvaluator,
)

from funnel_engine import InputError
from funnel_serving.adapters.sentence_transformers import FunnelEncoder
from sentence_models import PROMPTS, WORDS


@pytest.fixture(scope="module")
def library(embedding_gemma):
    return SentenceTransformer(str(embedding_gemma / "source"), device="cpu")


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return FunnelEncoder(checkpoint)


def texts(count, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(2, 9))) for _ in range(count)]


def keyed(prefix, count, seed):
    return {f"{prefix}{index}": text for index, text in enumerate(texts(count, seed))}


FIRST, SECOND = texts(12, 0), texts(12, 1)
SCORES = np.random.default_rng(2).random(12).tolist()
QUERIES, CORPUS = keyed("q", 4, 3), keyed("d", 15, 4)
RELEVANT = {f"q{index}": {f"d{index}", f"d{index + 5}"} for index in range(4)}
EVALUATORS = {
    "similarity": lambda model: EmbeddingSimilarityEvaluator(FIRST, SECOND, SCORES, truncate_dim=16),
    "similarity in int8": lambda model: EmbeddingSimilarityEvaluator(FIRST, SECOND, SCORES, precision="int8"),
    "binary": lambda model: BinaryClassificationEvaluator(FIRST, SECOND, [0, 1] * 6),
    "retrieval": lambda model: InformationRetrievalEvaluator(QUERIES, CORPUS, RELEVANT),
    "retrieval with a literal prompt": lambda model: InformationRetrievalEvaluator(
        QUERIES, CORPUS, RELEVANT, query_prompt="find: "
    ),
    "reranking": lambda model: RerankingEvaluator(
        [{"query": FIRST[index], "positive": FIRST[index + 1 : index + 3], "negative": SECOND[:4]} for index in (0, 3)]
    ),
    "triplets": lambda model: TripletEvaluator(FIRST, SECOND, texts(12, 5)),
    "translation": lambda model: TranslationEvaluator(FIRST, SECOND),
    "paraphrases": lambda model: ParaphraseMiningEvaluator(CORPUS, duplicates_list=[("d0", "d3"), ("d2", "d9")]),
    "error": lambda model: MSEEvaluator(FIRST, SECOND, teacher_model=model),
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_scores_are_those_of_the_library(name, library, encoder):
    evaluator = EVALUATORS[name](library)
    ours, theirs = evaluator(encoder), evaluator(library)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert len(ours) > 0


def test_vectors_are_those_of_the_library_with_each_prompt(library, encoder):
    for method in ("encode", "encode_query", "encode_document"):
        ours, theirs = getattr(encoder, method)(FIRST), getattr(library, method)(FIRST)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(encoder.encode_query(FIRST) - encoder.encode_document(FIRST)).max() > 0.01
    np.testing.assert_array_equal(encoder.encode_query(FIRST), encoder.encode(FIRST, prompt=PROMPTS["query"]))
    short = encoder.encode(FIRST)[:, :8]
    short /= np.linalg.norm(short, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(FIRST, truncate_dim=8), short, atol=1e-6)


def test_results_have_the_form_that_is_asked_for(encoder):
    assert encoder.encode(FIRST[0]).shape == (36,)
    assert torch.is_tensor(encoder.encode(FIRST, convert_to_tensor=True))
    rows = encoder.encode(FIRST, convert_to_numpy=False)
    assert isinstance(rows, list)
    assert all(torch.is_tensor(row) for row in rows)
    assert encoder.encode([]).shape == (0, 36)
    vectors = encoder.encode(np.array(FIRST))
    np.testing.assert_allclose(encoder.similarity(vectors, vectors), vectors @ vectors.T, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(vectors, vectors), np.ones(12), atol=1e-6)


def test_an_empty_text_is_embedded_as_a_blank_and_a_long_one_is_cut(encoder, checkpoint):
    np.testing.assert_array_equal(encoder.encode([""]), encoder.encode([" "]))
    long = "small " * 20_000
    assert encoder.encode([long]).shape == (1, 36)
    with pytest.raises(InputError, match="more than the limit"):
        FunnelEncoder(checkpoint, truncate=False).encode([long])


def test_the_funnel_is_used(checkpoint, encoder):
    funneled = FunnelEncoder(checkpoint, funnel="1:2/mean")
    assert str(funneled.embedder.engine.funnel) == "1:2/mean"
    assert np.abs(funneled.encode(FIRST) - encoder.encode(FIRST)).max() > 1e-3
