"""Components for Haystack's pipelines: one embeds queries, one embeds documents.

indexing.add_component("embedder", FunnelDocumentEmbedder("my-gemma"))
querying.add_component("embedder", FunnelTextEmbedder("my-gemma"))
"""

import dataclasses
from os import PathLike, fspath
from typing import Any

from funnel_kernels.errors import InputError
from funnel_serving.adapters.embedder import Embedder, not_installed

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ModuleNotFoundError as error:
    raise not_installed("haystack-ai", error) from error


class LoadedOnce:
    """What both components share: a stored pipeline has their arguments, and `warm_up` loads the checkpoint.

    The arguments are those of `Embedder`. Components of one process with the same arguments share one engine.
    """

    def __init__(self, checkpoint: str | PathLike[str], **options: Any):
        self.checkpoint, self.options = fspath(checkpoint), options
        self.embedder: Embedder | None = None

    def warm_up(self) -> None:
        """Loads the checkpoint, unless it is loaded."""
        self.loaded()

    def loaded(self) -> Embedder:
        if self.embedder is None:
            self.embedder = Embedder(self.checkpoint, **self.options)
        return self.embedder

    def to_dict(self) -> dict[str, Any]:
        """This component, as Haystack stores it."""
        return default_to_dict(self, checkpoint=self.checkpoint, **self.options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """The component that `to_dict` stored."""
        return default_from_dict(cls, data)


@component
class FunnelTextEmbedder(LoadedOnce):
    """Embeds a query, with the checkpoint's prompt for queries."""

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """The vector of a text, as "embedding"."""
        return {"embedding": self.loaded().queries([text])[0].tolist()}


@component
class FunnelDocumentEmbedder(LoadedOnce):
    """Embeds documents, with the checkpoint's prompt for documents."""

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Copies of the documents with their vectors, as "documents".

        Raises:
            InputError: a document has no text.
        """
        texts = []
        for document in documents:
            if not document.content:
                raise InputError(f"document {document.id} has no text; leave it out")
            texts.append(document.content)
        vectors = self.loaded().documents(texts).tolist()
        return {
            "documents": [
                dataclasses.replace(document, embedding=vector)
                for document, vector in zip(documents, vectors, strict=True)
            ]
        }
