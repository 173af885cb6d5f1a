"""A tiny EmbeddingGemma with prompts, as sentence-transformers saves it and as the engine loads it."""

import pytest

from funnel_engine import convert
from sentence_models import save_embedding_gemma


@pytest.fixture(scope="session")
def embedding_gemma(tmp_path_factory):
    """A folder with `source` and `checkpoint`."""
    folder = tmp_path_factory.mktemp("model")
    save_embedding_gemma(folder)
    convert(folder / "source", folder / "checkpoint", dtype="float32")
    return folder


@pytest.fixture(scope="session")
def checkpoint(embedding_gemma):
    return embedding_gemma / "checkpoint"
