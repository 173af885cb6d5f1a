"""LangChain's vector store finds what our embeddings say is nearest."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed")
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from funnel_engine import Engine, InputError
from funnel_serving.adapters.langchain import FunnelEmbeddings

TEXTS = ["the small funnel pools pairs", "a large memory", "tokens and pairs of tokens", "keeps every token"]


@pytest.fixture(scope="module")
def embeddings(checkpoint):
    return FunnelEmbeddings(checkpoint)


def test_queries_and_documents_have_their_prompts(embeddings, checkpoint):
    engine = Engine.load(checkpoint)
    documents, query = embeddings.embed_documents(TEXTS), embeddings.embed_query(TEXTS[0])
    np.testing.assert_allclose(documents, engine.embed(TEXTS, prompt_name="document"), atol=1e-6)
    np.testing.assert_allclose(query, engine.embed(TEXTS[0], prompt_name="query")[0], atol=1e-6)
    assert type(documents[0][0]) is type(query[0]) is float
    assert embeddings.embed_documents([]) == []


def test_a_vector_store_finds_the_nearest_text(embeddings):
    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document(text) for text in TEXTS])
    scores = np.array(embeddings.embed_documents(TEXTS)) @ embeddings.embed_query("memory")
    (found, score), *_ = store.similarity_search_with_score("memory", k=2)
    assert found.page_content == TEXTS[int(scores.argmax())]
    assert score == pytest.approx(scores.max(), abs=1e-6)


def test_asynchronous_calls_give_the_same(embeddings):
    async def both():
        return await asyncio.gather(embeddings.aembed_documents(TEXTS), embeddings.aembed_query("memory"))

    documents, query = asyncio.run(both())
    assert documents == embeddings.embed_documents(TEXTS)
    assert query == embeddings.embed_query("memory")


def test_an_empty_text_is_refused(embeddings):
    with pytest.raises(InputError, match="input 1 is an empty text"):
        embeddings.embed_documents(["a", ""])
