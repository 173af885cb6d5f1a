"""Our components in Haystack's pipelines, run and stored."""

import numpy as np
import pytest

pytest.importorskip("haystack", reason="haystack-ai is not installed")
from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore

from funnel_engine import Engine, FunnelConfig, InputError
from funnel_serving.adapters.haystack import FunnelDocumentEmbedder, FunnelTextEmbedder

TEXTS = ["the small funnel pools pairs", "a large memory", "tokens and pairs of tokens", "keeps every token"]


def test_queries_and_documents_have_their_prompts(checkpoint):
    engine = Engine.load(checkpoint)
    given = [Document(content=text, meta={"place": index}) for index, text in enumerate(TEXTS)]
    documents = FunnelDocumentEmbedder(checkpoint).run(given)["documents"]
    vectors = [document.embedding for document in documents]
    np.testing.assert_allclose(vectors, engine.embed(TEXTS, prompt_name="document"), atol=1e-6)
    assert [document.meta["place"] for document in documents] == [0, 1, 2, 3]
    assert given[0].embedding is None, "what the caller gave was changed"
    query = FunnelTextEmbedder(checkpoint).run("memory")["embedding"]
    np.testing.assert_allclose(query, engine.embed("memory", prompt_name="query")[0], atol=1e-6)


def test_pipelines_find_the_nearest_text_also_when_they_were_stored(checkpoint):
    store = InMemoryDocumentStore()
    indexing, querying = Pipeline(), Pipeline()
    indexing.add_component("embedder", FunnelDocumentEmbedder(checkpoint, funnel="1:2/mean"))
    indexing.add_component("writer", DocumentWriter(store))
    indexing.connect("embedder.documents", "writer.documents")
    indexing.run({"embedder": {"documents": [Document(content=text) for text in TEXTS]}})
    querying.add_component("embedder", FunnelTextEmbedder(checkpoint, funnel="1:2/mean"))
    querying = Pipeline.loads(querying.dumps(), allowed_modules=["funnel_serving.*"])
    querying.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    querying.connect("embedder.embedding", "retriever.query_embedding")
    (found,) = querying.run({"embedder": {"text": "memory"}})["retriever"]["documents"]
    engine = Engine.load(checkpoint, funnel=FunnelConfig.parse("1:2/mean"))
    scores = engine.embed(TEXTS, prompt_name="document") @ engine.embed("memory", prompt_name="query")[0]
    assert found.content == TEXTS[int(scores.argmax())]


def test_warm_up_loads_and_components_share_one_engine(checkpoint):
    text, documents = FunnelTextEmbedder(checkpoint), FunnelDocumentEmbedder(checkpoint)
    other = FunnelTextEmbedder(checkpoint, funnel="1:2")
    assert text.embedder is None
    for each in (text, documents, other):
        each.warm_up()
    assert text.embedder.engine is documents.embedder.engine
    assert text.embedder.engine is not other.embedder.engine
    loaded = text.embedder
    text.warm_up()
    assert text.embedder is loaded


def test_a_document_without_text_is_named(checkpoint):
    document = Document(content=None, id="empty one")
    with pytest.raises(InputError, match="document empty one has no text"):
        FunnelDocumentEmbedder(checkpoint).run([Document(content="a"), document])
