"""An embedding model for LlamaIndex.

Settings.embed_model = FunnelEmbedding("my-gemma")
index = VectorStoreIndex.from_documents(documents)
"""

import asyncio
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from funnel_serving.adapters.embedder import Embedder, not_installed
from funnel_serving.engines import fingerprint

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
except ModuleNotFoundError as error:
    raise not_installed("llama-index-core", error) from error

LARGEST_BATCH = 2048  # that BaseEmbedding allows; the engine makes its own batches of it


class FunnelEmbedding(BaseEmbedding):
    """Embeds in this process. The asynchronous methods run in a thread.

    All that changes a vector is a field, because the cache of an ingestion pipeline compares fields: it never returns
    vectors of another checkpoint or funnel. An `embeddings_cache` compares only texts; give each model its own.

    Args:
        checkpoint: a folder that `convert` wrote.
        funnel, truncate, truncate_dim: see `Embedder`.
        load_options: further arguments of `Engine.load`.
        fields: those of `BaseEmbedding`.
    """

    checkpoint: str
    checkpoint_sha256: str = Field(description="The SHA-256 of the checkpoint's manifest.")
    funnel: str = Field(description="The short form of the funnel that runs.")
    truncate: bool
    truncate_dim: int | None
    load_options: dict[str, Any]

    _embedder: Embedder = PrivateAttr()

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        *,
        funnel: str | None = None,
        truncate: bool = False,
        truncate_dim: int | None = None,
        load_options: dict[str, Any] | None = None,
        **fields: Any,
    ):
        options = load_options or {}
        embedder = Embedder(checkpoint, funnel=funnel, truncate=truncate, truncate_dim=truncate_dim, **options)
        super().__init__(
            **{"model_name": Path(checkpoint).name, "embed_batch_size": LARGEST_BATCH}
            | fields
            | {
                "checkpoint": fspath(checkpoint),
                "checkpoint_sha256": fingerprint(checkpoint),
                "funnel": str(embedder.engine.funnel),
                "truncate": truncate,
                "truncate_dim": truncate_dim,
                "load_options": options,
            }
        )
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex stores this class."""
        return "FunnelEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embedder.queries([query])[0].tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.documents(texts).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
