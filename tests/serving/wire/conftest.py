"""A client of each kind of model. Everything is real but the socket; `test_clients.py` has that too."""

import pytest

from funnel_engine import Engine
from served_models import save_classifier, save_embedder
from serving_apps import client


@pytest.fixture(scope="session")
def embedder_path(tmp_path_factory):
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="session")
def classifier_path(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("classifier"), "Gemma2ForSequenceClassification")


@pytest.fixture(scope="session")
def reranker_path(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("reranker"), "Gemma2ForSequenceClassification", ("relevant",))


@pytest.fixture(scope="session")
def tagger_path(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("tagger"), "Gemma2ForTokenClassification")


@pytest.fixture(scope="session")
def engine(embedder_path):
    """The engine alone, with the checkpoint of the embedder."""
    return Engine.load(embedder_path, max_batch_tokens=512)


@pytest.fixture(scope="session")
def embedder(embedder_path):
    with client(embedder_path, allow_token_ids=True) as each:
        yield each


@pytest.fixture(scope="session")
def classifier(classifier_path):
    with client(classifier_path) as each:
        yield each


@pytest.fixture(scope="session")
def reranker(reranker_path):
    with client(reranker_path) as each:
        yield each


@pytest.fixture(scope="session")
def tagger(tagger_path):
    with client(tagger_path) as each:
        yield each
