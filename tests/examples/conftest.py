"""A tiny model like EmbeddingGemma, for the examples of the README and of examples/."""

import pytest

from funnel_engine import convert
from sentence_models import save_embedding_gemma


@pytest.fixture(scope="session")
def embedding_gemma(tmp_path_factory):
    """Folders `source` and `checkpoint`. It has layers enough for the funnel of the README."""
    folder = tmp_path_factory.mktemp("embedding_gemma")
    save_embedding_gemma(folder, layers=14)
    convert(folder / "source", folder / "checkpoint", dtype="float32")
    return folder
