"""LlamaIndex's index and ingestion cache with our embedding model."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter

from funnel_engine import Engine, InputError
from funnel_serving.adapters.llama_index import FunnelEmbedding

TEXTS = ["the small funnel pools pairs", "a large memory", "tokens and pairs of tokens", "keeps every token"]


@pytest.fixture(scope="module")
def embedding(checkpoint):
    return FunnelEmbedding(checkpoint)


def test_queries_and_documents_have_their_prompts_and_go_in_one_call(checkpoint):
    embedding = FunnelEmbedding(checkpoint)
    engine = Engine.load(checkpoint)
    calls = embedding._embedder.engine.stats()["calls"]
    documents = embedding.get_text_embedding_batch(TEXTS)
    assert embedding._embedder.engine.stats()["calls"] == calls + 1
    np.testing.assert_allclose(documents, engine.embed(TEXTS, prompt_name="document"), atol=1e-6)
    query = embedding.get_query_embedding(TEXTS[0])
    np.testing.assert_allclose(query, engine.embed(TEXTS[0], prompt_name="query")[0], atol=1e-6)
    assert embedding.get_text_embedding(TEXTS[1]) == pytest.approx(documents[1], abs=1e-6)


def test_asynchronous_calls_give_the_same(embedding):
    async def all_three():
        return await asyncio.gather(
            embedding.aget_text_embedding_batch(TEXTS),
            embedding.aget_query_embedding("memory"),
            embedding.aget_text_embedding("memory"),
        )

    documents, query, text = asyncio.run(all_three())
    np.testing.assert_allclose(documents, embedding.get_text_embedding_batch(TEXTS), atol=1e-6)
    assert query == embedding.get_query_embedding("memory")
    assert text == embedding.get_text_embedding("memory")


def test_an_index_finds_the_nearest_text(embedding):
    index = VectorStoreIndex.from_documents([Document(text=text) for text in TEXTS], embed_model=embedding)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("memory")
    scores = np.array(embedding.get_text_embedding_batch(TEXTS)) @ embedding.get_query_embedding("memory")
    assert found.text == TEXTS[int(scores.argmax())]
    assert found.score == pytest.approx(scores.max(), abs=1e-6)


def test_an_ingestion_cache_does_not_return_vectors_of_another_funnel(checkpoint):
    cache = IngestionCache()

    def ingest(embedding):
        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), embedding], cache=cache)
        (node,) = pipeline.run(documents=[Document(text=TEXTS[0], id_="one")])
        return node.embedding

    plain, funneled = FunnelEmbedding(checkpoint), FunnelEmbedding(checkpoint, funnel="1:2/mean")
    first = ingest(plain)
    calls = plain._embedder.engine.stats()["calls"]
    assert ingest(plain) == first
    assert plain._embedder.engine.stats()["calls"] == calls, "the cache is not used at all"
    np.testing.assert_allclose(ingest(funneled), funneled.get_text_embedding(TEXTS[0]), atol=1e-6)
    assert np.abs(np.subtract(ingest(funneled), first)).max() > 1e-3


def test_it_is_stored_and_made_again(checkpoint):
    embedding = FunnelEmbedding(checkpoint, funnel="1:2/mean", truncate_dim=8, load_options={"max_batch_tokens": 512})
    again = FunnelEmbedding.from_json(embedding.to_json())
    assert again.to_dict() == embedding.to_dict()
    assert again.get_query_embedding("memory") == embedding.get_query_embedding("memory")
    assert len(again.get_query_embedding("memory")) == 8


def test_an_empty_text_is_refused(embedding):
    with pytest.raises(InputError, match="input 1 is an empty text"):
        embedding.get_text_embedding_batch(["a", ""])
