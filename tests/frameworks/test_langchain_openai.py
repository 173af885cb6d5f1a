"""LangChain's OpenAIEmbeddings as a client of the server."""

import numpy as np
import pytest

from funnel_engine import Engine
from served_models import save_embedder
from serving_apps import MAX_BATCH_TOKENS, application, listening

langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")

TEXTS = ["a", "the small funnel pools pairs of tokens", "memory", "tokens and tokens"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def address(checkpoint):
    with application(checkpoint) as app, listening(app) as each:
        yield f"{each}/v1"


def test_it_gives_the_engines_vectors(address, checkpoint):
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="embedder", base_url=address, api_key="unused", check_embedding_ctx_length=False
    )
    expected = Engine.load(checkpoint, max_batch_tokens=MAX_BATCH_TOKENS).embed(TEXTS)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[1]), expected[1], atol=1e-5)


def test_ids_of_openais_vocabulary_are_refused_with_the_remedy(address, monkeypatch):
    """As `check_embedding_ctx_length=True` sends them; OpenAI's tokenizer itself would be downloaded."""

    class Encoding:
        def encode_ordinary(self, text):
            return [len(word) for word in text.split()]

        def encode(self, text, **options):
            return self.encode_ordinary(text)

    monkeypatch.setattr("tiktoken.encoding_for_model", lambda name: Encoding())
    embeddings = langchain_openai.OpenAIEmbeddings(model="embedder", base_url=address, api_key="unused")
    with pytest.raises(Exception, match="check_embedding_ctx_length=False"):
        embeddings.embed_documents(TEXTS)
