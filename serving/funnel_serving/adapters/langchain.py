"""Embeddings for LangChain.

embeddings = FunnelEmbeddings("my-gemma")
store = InMemoryVectorStore(embeddings)
"""

from os import PathLike
from typing import Any

from funnel_serving.adapters.embedder import Embedder, not_installed

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise not_installed("langchain-core", error) from error


class FunnelEmbeddings(Embeddings):
    """Embeds in this process; the arguments are those of `Embedder`. The asynchronous methods run in a thread."""

    def __init__(self, checkpoint: str | PathLike[str], **options: Any):
        self.embedder = Embedder(checkpoint, **options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector for each text, with the checkpoint's prompt for documents."""
        return self.embedder.documents(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of a text, with the checkpoint's prompt for queries."""
        return self.embedder.queries([text])[0].tolist()
